"""The checks of the reward contract, one function each; `reward_kit.py` runs them.

A check takes a `Subject`; see `kit.Check`.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from rdm_sdk.method.noise import per_sample
from rdm_sdk.rewards.base import RewardConfig
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.judging import as_declared
from rdm_sdk.rewards.resolve import options_of, resolve_rewards
from rdm_sdk.rewards.spec import checked_model, parse_spec
from rdm_sdk.testing.batches import copied, resized
from rdm_sdk.testing.fresh_import import import_problem
from rdm_sdk.testing.kit import Check, Remark, advising, collector, require
from rdm_sdk.testing.random_states import drawn_from, random_states
from rdm_sdk.testing.reward_subject import Subject, assert_close, same, shown

STEPS = (0.003, 0.01, 0.03)
"""Ascent steps in units of an image's or latent's range; more than one, because 8-bit rounding swallows small ones."""


CHECKS: list[Check] = []
check = collector(CHECKS)


def stochastic(subject: Subject) -> str:
    """Return why a check that repeats a call does not apply, empty where it does."""
    return "the reward is declared stochastic" if subject.reward.capabilities.stochastic else ""


def no_gradient(subject: Subject) -> str:
    """Return why a check of gradients does not apply, empty where it does."""
    return "the reward declares no gradient" if subject.reward.capabilities.gradient == "none" else ""


@check()
def returns_scores(subject: Subject) -> None:
    """`score` returns a floating-point tensor with one entry per sample."""
    scores = subject.raw_scores(copied(subject.batch))
    if not isinstance(scores, Tensor):
        raise AssertionError(f"score() returned {type(scores).__name__}; return a tensor of shape [N]")
    count = len(subject.batch)
    require(
        scores.shape == (count,),
        f"score() returned shape {list(scores.shape)} for {count} samples; return one score per sample, [{count}], "
        "reducing over channels, height and width only",
    )
    require(scores.is_floating_point(), f"score() returned {scores.dtype}; return floats")


@check("returns_scores")
def finite_or_nan(subject: Subject) -> None:
    """Scores are finite; NaN is kept for samples that the reward does not apply to."""
    scores = subject.raw_scores(copied(subject.batch))
    require(
        not scores.isinf().any(),
        f"scores hold infinities: {shown(scores)}; keep logarithms and divisions away from 0 (add a small number)",
    )
    require(
        not scores.isnan().all(),
        "every score is NaN; if the reward applies to none of the kit's samples, write example(self), which returns "
        "a RewardBatch that it applies to",
    )


@check("finite_or_nan")
def leaves_inputs_alone(subject: Subject) -> None:
    """`score` changes neither images nor latents, prompts or columns."""
    batch = copied(subject.batch)
    before = copied(batch)
    subject.raw_scores(batch)
    require(
        torch.equal(batch.latents, before.latents) and batch.prompts == before.prompts,
        "score() changed its batch in place, which other rewards share; use x * 2 instead of x.mul_(2), sorted() "
        "instead of list.sort()",
    )
    require(dict(batch.columns) == dict(before.columns), "score() changed the batch's columns in place")


@check("leaves_inputs_alone")
def declared_range(subject: Subject) -> Remark | None:
    """Scores lie in the range that the capabilities declare."""
    declared = subject.reward.capabilities.range
    if declared is None:
        return Remark("skipped", "no range is declared")
    scores = subject.judge().scores
    scores = scores[~scores.isnan()]
    slack = 1e-5 * max([1.0, *(abs(bound) for bound in declared if abs(bound) != float("inf"))])
    require(
        scores.min() >= declared[0] - slack and scores.max() <= declared[1] + slack,
        f"scores span [{scores.min():.4g}, {scores.max():.4g}], outside the declared range {list(declared)}; correct "
        "Capabilities(range=...) or the scores",
    )
    return None


@check("leaves_inputs_alone", unless=stochastic)
def deterministic(subject: Subject) -> None:
    """Two calls on the same batch give the same scores, unless the reward declares that it is stochastic."""
    first, second = (subject.judge().scores for _ in range(2))
    require(
        same(first, second),
        f"two calls on the same batch differ by up to {(first - second).abs().max():.3g}; put dropout in eval mode, "
        "fix the generator, or declare Capabilities(stochastic=True)",
    )


@check("leaves_inputs_alone", unless=stochastic)
def rng_untouched(subject: Subject) -> None:
    """`score` leaves the random states of torch, NumPy and Python alone, unless it is declared stochastic."""
    with drawn_from():
        before = random_states()
        evaluate_reward(subject.reward, copied(subject.batch), gradients_of=())
        after = random_states()
    moved = [name for name in before if before[name] != after[name]]
    require(
        not moved,
        f"score() moved the random state of {', '.join(moved)}, which changes the training run; use a "
        "torch.Generator of your own, and never call manual_seed() in score()",
    )


@check("leaves_inputs_alone")
def torch_settings_untouched(subject: Subject) -> None:
    """`score` leaves alone what PyTorch keeps for all: its default dtype, and whether gradients are on."""
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    # Set as Python starts: earlier calls may have changed them already.
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    try:
        subject.judge()
        found = torch.get_default_dtype(), torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])
    require(
        found == (torch.float32, True),
        f"score() left torch with the default dtype {found[0]} and gradients {'on' if found[1] else 'off'}, which "
        "changes the training run; pass dtype= where it is needed, and write 'with torch.no_grad():'",
    )


@check("deterministic", unless=stochastic)
def chunk_invariant(subject: Subject) -> None:
    """Judging a batch in chunks gives the same scores as judging it at once."""
    advice = (
        "a sample's score must not depend on the others in the batch (no batch means, no batch norm in training mode, "
        "no prompts[0]); if it compares samples of one prompt, declare Capabilities(scope='group')"
    )
    parts = subject.judge(chunk_size=subject.chunk).scores
    assert_close(parts, subject.judge().scores, f"in chunks of {subject.chunk}, scores", advice)


@check("chunk_invariant", unless=stochastic)
def logs_the_same_in_chunks(subject: Subject) -> Remark | None:
    """What the reward logs (`batch.log`) at a step of a run has the same mean in chunks as at once."""
    batch = replace(subject.batch, step=0)
    whole = subject.judge(copied(batch)).logged
    if not whole:
        return Remark("skipped", "the reward logs nothing")
    parts = subject.judge(copied(batch), chunk_size=subject.chunk).logged
    require(
        whole.keys() == parts.keys(),
        f"it logs {', '.join(whole)} of a batch and {', '.join(parts) or 'nothing'} in chunks of {subject.chunk}; log "
        "the same figures at every call, NaN where there is no value",
    )
    advice = "log one value per sample: what a run shows must not depend on reward_batch_size"
    for name, values in whole.items():
        part, all_of_it = (figure.nanmean().reshape(1) for figure in (parts[name], values))
        if not (part.isnan().all() and all_of_it.isnan().all()):
            what = f"in chunks of {subject.chunk}, means of the logged {name!r}"
            assert_close(part, all_of_it, what, advice, 1e-3)
    return None


@check("chunk_invariant", unless=stochastic)
def permutation_equivariant(subject: Subject) -> None:
    """Shuffling images and prompts together shuffles the scores, and nothing else."""
    count, group = len(subject.batch), subject.batch.group_size
    generator = torch.Generator().manual_seed(1)
    if subject.reward.capabilities.scope == "group":
        groups = torch.arange(count).reshape(-1, group).flip(0)
        order = torch.stack([row.roll(1) for row in groups]).flatten()
    else:
        order = torch.randperm(count, generator=generator)
    assert_close(
        subject.judge(copied(subject.batch).select(order.tolist())).scores,
        subject.judge().scores[order],
        "with images and prompts shuffled together, scores",
        "pair images[i] with prompts[i], and do not use a sample's position",
    )


@check("deterministic")
def follows_the_prompt(subject: Subject) -> Remark | None:
    """Other prompts give other scores where the capabilities say so (a warning if not), and nowhere else."""
    declared = subject.reward.capabilities.prompts
    if not declared and subject.reward.capabilities.stochastic:
        return Remark("skipped", "the reward is declared stochastic, so nobody could tell why its scores differ")
    batch = copied(subject.batch)
    shift = batch.group_size
    batch.prompts[:] = [*batch.prompts[shift:], *batch.prompts[:shift]]
    if same(subject.judge(batch).scores, subject.judge().scores):
        text = "the scores do not change with the prompts; declare prompts=False, or read batch.prompts"
        return Remark("warning", text) if declared else None
    require(
        declared,
        "the scores change with the prompts, and the reward does not declare it: declare prompts=True, so that scoring "
        "without prompts is refused (a function does so with @declares(prompts=True))",
    )
    return None


@check("deterministic", unless=stochastic)
def declares_its_columns(subject: Subject) -> Remark | None:
    """Columns that the capabilities do not name change no score; a server is not sent them."""
    capabilities = subject.reward.capabilities
    declared = {*capabilities.columns, *capabilities.reads}
    kept = {name: values for name, values in subject.batch.columns.items() if name in declared}
    others = [name for name in subject.batch.columns if name not in kept]
    if not others:
        return Remark("skipped", "the samples have no column beside the declared ones")
    advice = f"declare what it reads of {', '.join(others)}, as Capabilities(reads=({others[0]!r},)) or in columns"
    with advising(advice):
        without = subject.judge(replace(copied(subject.batch), columns=kept)).scores
    assert_close(without, subject.judge().scores, "without the columns that it does not declare, scores", advice)
    return None


@check("leaves_inputs_alone", unless=no_gradient)
def gradient_not_zero(subject: Subject) -> None:
    """A reward that declares a gradient has one, for every sample that it applies to."""
    field = subject.reward.capabilities.gradient == "field"
    advice = "compute the score in torch from batch.images, without PIL, NumPy, no_grad, detach, round or argmax"
    with advising("field(batch) must return a RewardOutput with a gradient" if field else advice):
        output = subject.judge(differentiate=True)
    flat = cast("Tensor", output.gradient).flatten(1).abs().amax(1) == 0
    require(
        not (flat & ~output.scores.isnan()).any(),
        f"{int(flat.sum())} of {len(flat)} samples have a gradient of zero; is something rounded, clamped or detached?",
    )


@check("chunk_invariant", "gradient_not_zero", unless=lambda subject: no_gradient(subject) or stochastic(subject))
def gradient_chunk_invariant(subject: Subject) -> None:
    """Gradients, too, are the same in chunks as at once."""
    advice = "a sample's gradient must not depend on the others in the batch"
    parts, what = subject.gradient(subject.chunk), f"in chunks of {subject.chunk}, gradients"
    assert_close(parts, subject.gradient(), what, advice, 1e-3)


@check("gradient_not_zero", "deterministic", unless=lambda subject: no_gradient(subject) or stochastic(subject))
def gradient_keeps_scores(subject: Subject) -> None:
    """Asked for its gradient, the reward gives the scores that it gives without."""
    advice = "what a run learns from and what it logs, compares and evaluates must be one score, in the same units"
    given = subject.judge(differentiate=True).scores
    assert_close(given, subject.judge().scores, "with the gradient, scores", advice)


@check("gradient_not_zero")
def retains_no_graph(subject: Subject) -> None:
    """Nothing keeps the images or latents (and with them a graph) alive after `score` has returned."""
    reward = subject.reward
    batch = copied(subject.batch)
    leaf = batch.latents.clone()
    judged = as_declared(reward, batch.with_latents(leaf), leaf.device)
    leaf = judged.images if reward.capabilities.space == "pixel" else judged.latents
    if reward.capabilities.gradient == "field":
        judged = replace(judged, context=batch.context)
    del batch
    if reward.capabilities.gradient == "autograd":
        leaf.requires_grad_()
        reward.score(judged)
    else:
        subject.raw_scores(judged)
    watched = weakref.ref(leaf)
    del leaf, judged
    gc.collect()
    require(
        watched() is None,
        "the reward keeps the images or latents of its last call alive, so memory grows with every step; do not store "
        "them, or tensors computed from them, on self (store .item() or .detach().clone())",
    )


@check("leaves_inputs_alone")
def odd_sizes(subject: Subject) -> None:
    """Images (or latents) of sizes that nothing divides are judged too."""
    size = (37, 53) if subject.reward.capabilities.space == "pixel" else (5, 7)
    batch = resized(copied(subject.batch), size)
    with advising("resize or pad inside score(); reshape() and view() by fixed factors need sizes that divide"):
        subject.judge(batch)


@check("deterministic")
def bfloat16_input(subject: Subject) -> None:
    """Samples in bfloat16 are judged like the same values in float32."""
    half = copied(subject.batch)
    half = half.with_latents(half.latents.bfloat16())
    full = half.with_latents(half.latents.float())
    with advising("read batch.images (or batch.latents) as the host hands them over; do not decode them yourself"):
        ours, theirs = subject.judge(half).scores, subject.judge(full).scores
    assert_close(ours, theirs, "in bfloat16, scores", "let the host convert: it hands over Capabilities.dtype", 0.02)


@check("deterministic")
def device_round_trip(subject: Subject) -> None:
    """Moving the reward to another device and back changes nothing."""
    before = subject.judge().scores
    if torch.cuda.is_available():
        there = subject.judge(device="cuda").scores
        assert_close(there, before, "on CUDA, scores", "keep modules as attributes, or override to(device)", 0.02)
    subject.reward.to("cpu")
    assert_close(
        subject.judge().scores, before, "after to(device), scores", "to() must move modules, nothing else", 0.0
    )


@check("gradient_not_zero", unless=no_gradient)
def ascent_raises_score(subject: Subject) -> None:
    """A small step along the gradient raises the score."""
    gradient = subject.gradient()
    before = subject.judge().scores
    largest = gradient.abs().flatten(1).amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    direction = gradient / per_sample(largest, gradient)
    pixels = subject.reward.capabilities.space == "pixel"
    gains = []
    for step in STEPS:
        moved = subject.batch.latents + step * direction
        batch = copied(subject.batch).with_latents(moved.clamp(0, 1) if pixels else moved)
        gains.append(float((subject.judge(batch).scores - before).nanmean()))
    require(
        max(gains) > 0,
        f"steps of {STEPS} along the gradient change the mean score by {', '.join(f'{gain:.3g}' for gain in gains)}; "
        "is its sign wrong, or is it the gradient of something else?",
    )


@check("leaves_inputs_alone")
def config_round_trip(subject: Subject) -> None:
    """The reward's options survive being stored as JSON and being written into a spec."""
    config = subject.reward.config
    stored = config.model_dump(mode="json")
    with advising(
        "options must be numbers, texts, true, false, null or lists of them, and validators must not change them"
    ):
        again: RewardConfig = checked_model(type(config), stored, f"reward {subject.reward.name!r}")
        require(again == config, f"the options {config!r} came back from JSON as {again!r}")
        term = resolve_rewards(subject.reward)[0].term
        (parsed,) = parse_spec(str(term))
        require(parsed == term, f"the spec {str(term)!r} parses to {parsed!r}")
        written: RewardConfig = checked_model(type(config), options_of(parsed), f"reward {subject.reward.name!r}")
        require(written == config, f"the options {config!r} came back from the spec {str(term)!r} as {written!r}")


@check("returns_scores")
def imports_without_cuda(subject: Subject) -> Remark | None:
    """Importing the reward's module does not initialize CUDA, which would break forked workers and other devices.

    Nor does it change the default dtype of torch, or turn gradients off, for the whole program.
    """
    module = subject.reward.defined_in()
    if module == "__main__":
        return Remark("skipped", "the reward is defined in a script or a notebook")
    problem = import_problem(module)
    advice = "create nothing on a device at import, only in __init__ or score(), and set nothing that is torch's own"
    require(not problem, f"{problem}; {advice}")
    return None
