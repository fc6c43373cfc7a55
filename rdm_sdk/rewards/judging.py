"""One reward and one batch: what the reward is given, its scores and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.method.noise import per_sample
from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.rewards.checks import checked_scores, unchanged
from rdm_sdk.types import RewardOutput


def copied(reward: Reward, given: RewardBatch) -> RewardBatch:
    """Return the batch with what the reward reads copied, so that a change in place reaches no other reward."""
    copy = given.with_latents(given.latents.clone())
    return copy.with_images(given.images.clone()) if reward.capabilities.space == "pixel" else copy


def as_declared(
    reward: Reward, chunk: RewardBatch, device: torch.device, rows: Sequence[int] | None = None
) -> RewardBatch:
    """Return the chunk as the reward wants it: its dtype, on its device, without a graph, with copies of all lists.

    `rows` are those that it is shown, in order; None is all.
    """
    dtype = getattr(torch, reward.capabilities.dtype)
    pixels = reward.capabilities.space == "pixel"
    if rows is not None and len(rows) < len(chunk):
        chunk = chunk.select(rows)
    columns = {name: list(values) for name, values in chunk.columns.items()}
    images = chunk.images if pixels else None
    chunk = replace(chunk, prompts=list(chunk.prompts), columns=columns, context=None, logged={})
    if images is not None:
        return chunk.with_images(images.detach().to(device, dtype))
    return chunk.with_latents(chunk.latents.detach().to(device, dtype))


def nothing(latents: Tensor, graded: bool) -> RewardOutput:
    """Return the output of a reward that is for none of some samples `[N, *x]`."""
    scores = torch.full((len(latents),), torch.nan, device=latents.device)
    applies = torch.zeros(len(latents), dtype=torch.bool)
    return RewardOutput(scores, torch.zeros_like(latents) if graded else None, applies=applies)


def of_all(
    given: RewardBatch,
    rows: Sequence[int],
    count: int,
    device: torch.device,
    scores: Tensor,
    told: Tensor | None = None,
) -> RewardOutput:
    """Return the scores `[n]` of the rows that a reward was shown, and what it logged of them, as those of all `count`.

    The others have NaN. `given` is the batch of the rows; `told`, bool `[n]`, is which of them the reward says it was
    for itself, None is all of them.
    """
    logged = {name: spread(values, rows, count, device, torch.nan) for name, values in (given.logged or {}).items()}
    applies = torch.zeros(count, dtype=torch.bool)
    applies[list(rows)] = torch.ones(len(rows), dtype=torch.bool) if told is None else told
    return RewardOutput(spread(scores, rows, count, device, torch.nan), logged=logged, applies=applies)


def spread(values: Tensor, rows: Sequence[int], count: int, device: torch.device, fill: float) -> Tensor:
    """Return values `[n, ...]` of some rows as those of all `count`, `[N, ...]` in float32, on a device."""
    values = values.to(device, torch.float32)
    if len(rows) == count:
        return values
    whole = torch.full((count, *values.shape[1:]), fill, device=values.device)
    whole[list(rows)] = values
    return whole


def differentiated(reward: Reward, chunk: RewardBatch, device: torch.device, rows: Sequence[int]) -> RewardOutput:
    """Return the scores of a chunk with their gradient with respect to its latents, for `gradient="autograd"`."""
    judged = as_declared(reward, chunk, device, rows)
    pixels = reward.capabilities.space == "pixel"
    leaf = (judged.images if pixels else judged.latents).requires_grad_()
    with torch.enable_grad(), unchanged(reward, judged):
        scores = reward.score(judged)
    checked = checked_scores(reward, judged, scores)
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores.nansum(), leaf, allow_unused=True)
    elif checked.isnan().all():
        gradient = torch.zeros_like(leaf)  # a chunk to which the reward does not apply
    else:
        gradient = None
    if gradient is None:
        raise RewardError(
            f"reward {reward.name!r} declares gradient='autograd', but its scores carry no gradient: remove no_grad, "
            "detach, PIL or NumPy from score(), or declare gradient='none'"
        )
    return pulled_back(reward, judged, chunk, rows, RewardOutput(checked, gradient))


def pulled_back(
    reward: Reward, given: RewardBatch, chunk: RewardBatch, rows: Sequence[int], output: RewardOutput
) -> RewardOutput:
    """Return the output of a whole chunk, from the scores `[n]` and the gradient of the rows that a reward was shown.

    The gradient is on what it reads, images `[n, 3, H, W]` or latents `[n, *x]`, and becomes one on the latents.
    `given` is the batch of these rows, which holds what the reward logged.
    """
    scores, gradient = output.scores, output.gradient
    pixels = reward.capabilities.space == "pixel"
    read = chunk.tracked_images if pixels else chunk.latents
    wanted = (len(rows), *read.shape[1:])
    if gradient is None or gradient.shape != wanted:
        got = "none" if gradient is None else f"one of shape {list(gradient.shape)}"
        raise RewardError(f"reward {reward.name!r} must return a gradient of shape {list(wanted)}; got {got}")
    if reward.capabilities.scope == "sample":
        # A sample that the reward does not apply to has no gradient, however its NaN came about.
        gradient = gradient.masked_fill(per_sample(scores.isnan().to(gradient.device), gradient), 0)
    device = chunk.latents.device
    gradient = spread(gradient, rows, len(chunk), device, 0.0)
    gradient = chunk.pull_back(gradient).float() if pixels else gradient
    return replace(of_all(given, rows, len(chunk), device, scores, output.applies), gradient=gradient)


def judged_with_models(reward: Reward, batch: RewardBatch, differentiate: bool) -> RewardOutput:
    """Return the field, or the scores alone, of a reward that needs the run's models."""
    batch = batch.with_nothing_logged()
    with unchanged(reward, batch):
        output = reward.field(batch) if differentiate else RewardOutput(reward.score(batch))
    if not isinstance(output, RewardOutput):
        raise RewardError(
            f"reward {reward.name!r}: field(batch) must return a RewardOutput; got {type(output).__name__}"
        )
    if differentiate and output.gradient is None:
        raise RewardError(
            f"reward {reward.name!r} declares gradient='field', and its field(batch) returned no gradient; return "
            "RewardOutput(scores, gradient)"
        )
    measured = {f"figure {name!r}": values for name, values in output.figures.items()}
    measured |= {} if output.magnitude is None else {"magnitude": output.magnitude}
    for what, values in measured.items():
        if values.shape != (len(batch),):
            raise RewardError(
                f"reward {reward.name!r} must return one value per sample for its {what}, shape [{len(batch)}]; got "
                f"{list(values.shape)}"
            )
    logged = {name: values.to(batch.latents.device) for name, values in (batch.logged or {}).items()}
    scores, gradient = checked_scores(reward, batch, output.scores), output.gradient
    if gradient is not None and gradient.shape == batch.latents.shape:
        # Without a score, a sample is in no statistic, so what is left of its gradient would be divided by nothing.
        leftover = per_sample(scores.isnan().to(gradient.device), gradient) & gradient.isfinite()
        gradient = gradient.masked_fill(leftover, 0)
    return replace(output, scores=scores, gradient=gradient, logged=logged)
