"""What a reward may not do or return: the checks of every evaluation, whatever its policy for exceptions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.base import Reward, RewardBatch
from rdm_sdk.types import RewardOutput


def rows_it_is_for(reward: Reward, batch: RewardBatch) -> list[int]:
    """Return the rows of a batch that a reward is for, by `Reward.applies`.

    Raises:
        RewardError: `applies` returned something else than one truth per sample, or a reward that compares the samples
            of a prompt is for a part of them.
    """
    answer: object = reward.applies(batch.prompts, batch.columns)
    count, kinds = len(batch), (bool, np.bool_)
    if not isinstance(answer, (list, tuple)) or len(answer) != count or not all(isinstance(a, kinds) for a in answer):
        raise RewardError(
            f"reward {reward.name!r}: applies(prompts, columns) must return a list of {count} times True or False, one "
            f"per sample; got {answer!r:.200}"
        )
    rows = [row for row, applies in enumerate(answer) if applies]
    size = batch.group_size
    if reward.capabilities.scope == "group" and len(rows) != size * len({row // size for row in rows}):
        raise RewardError(
            f"reward {reward.name!r} compares the samples of one prompt, so applies(prompts, columns) must say the "
            f"same of all {size}; got {answer!r:.200}"
        )
    return rows


def checked_scores(reward: Reward, batch: RewardBatch, scores: object) -> Tensor:
    """Return scores as float32 `[N]` on the latents' device, after checking type, shape and that none is infinite."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        got = f"a tensor of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        if inspect.iscoroutine(scores):
            scores.close()
            got += "; an asynchronous reward declares Capabilities(asynchronous=True) and writes score_async"
        raise RewardError(f"reward {reward.name!r} must return a floating-point tensor of scores; got {got}")
    if scores.shape != (len(batch),):
        raise RewardError(
            f"reward {reward.name!r} must return one score per sample, shape [{len(batch)}]; got {list(scores.shape)}"
        )
    scores = scores.detach().to(batch.latents.device, torch.float32)
    if scores.isinf().any():
        shown = ", ".join(f"{value:.4g}" for value in scores[:8].tolist()) + (", ..." if len(scores) > 8 else "")
        raise RewardError(f"reward {reward.name!r} returned an infinite score: {shown}")
    return scores


def checked_applies(reward: Reward, scores: Tensor, applies: object) -> Tensor | None:
    """Return which of the samples it was shown an asynchronous reward was for, bool `[n]`; None where it does not say.

    Raises:
        RewardError: it is something else, or a sample that the reward was not for has a score in `scores` `[n]`.
    """
    if applies is None:
        return None
    if not isinstance(applies, Tensor) or applies.dtype != torch.bool or applies.shape != scores.shape:
        got = f"{list(applies.shape)} {applies.dtype}" if isinstance(applies, Tensor) else type(applies).__name__
        raise RewardError(
            f"reward {reward.name!r} must return None as RewardOutput.applies, or one True or False per sample, a bool "
            f"tensor of shape {list(scores.shape)}; got {got}"
        )
    applies = applies.detach().cpu()
    if not bool(scores.cpu()[~applies].isnan().all()):
        raise RewardError(
            f"reward {reward.name!r} has scores for samples that it says it was not for; return NaN there"
        )
    return applies


def is_finite_gradient(reward: Reward, batch: RewardBatch, output: RewardOutput) -> Tensor:
    """Return whether a gradient is finite, or there is none: a scalar on its device, for whoever waits for that.

    Raises:
        RewardError: the gradient has another shape than the latents.
    """
    gradient = output.gradient
    if gradient is not None and gradient.shape != batch.latents.shape:
        raise RewardError(
            f"reward {reward.name!r} must return a gradient of the latents' shape {list(batch.latents.shape)}; "
            f"got {list(gradient.shape)}"
        )
    if gradient is None or not gradient.numel():
        return torch.ones_like(output.scores.sum())
    low, high = gradient.detach().aminmax()  # both NaN if a value is
    return (low > -torch.inf) & (high < torch.inf)


@contextmanager
def unchanged(reward: Reward, given: RewardBatch) -> Iterator[None]:
    """Raise if the block changes the images or latents in place: other rewards, and the caller, share their memory."""
    watched = given.images if reward.capabilities.space == "pixel" else given.latents
    before = watched._version, _fingerprint(watched)
    yield
    if (watched._version, _fingerprint(watched)) != before:
        raise RewardError(
            f"reward {reward.name!r} changes its {'images' if watched is not given.latents else 'latents'} in place, "
            "which other rewards share; use x * 2 instead of x.mul_(2), or clone() first (x.numpy() shares them too)"
        )


def _fingerprint(values: Tensor) -> tuple[int, bytes] | None:
    """Return what tells an edit of a tensor on the CPU: views in NumPy and `.data` edit it behind its version.

    That is the sum of all its bits, which costs as little as reading them, and a sample, because what is only moved,
    as a flipped image is, has the same sum.
    """
    if values.device.type != "cpu":
        return None
    as_it_lies = sorted(range(values.ndim), key=values.stride, reverse=True)  # a copy would cost ten times as much
    bits = np.from_dlpack(values.detach().permute(as_it_lies).contiguous().view(-1).view(torch.uint8))
    words = len(bits) // 8 * 8
    return int(bits[:words].view(np.uint64).sum()), bits[words:].tobytes() + bits[::4099].tobytes()


class InapplicableError(RewardError):
    """A reward that is NaN for all it was shown; under `on_error="skip"` it sits this batch out."""


def nothing_applies(reward: Reward, batch: RewardBatch) -> RewardError:
    """Return the error of a reward that is NaN for all it was shown."""
    if reward.capabilities.trains:
        return RewardError(
            f"reward {reward.name!r} is NaN for every sample: its {reward.capabilities.trains!r} role or the student "
            "has diverged; lower critic_learning_rate or learning_rate"
        )
    return InapplicableError(
        f"reward {reward.name!r} returned NaN (not applicable) for every sample; first prompt: {batch.prompts[0]!r}. "
        "If it is for some prompts only, let it say for which: by None in a column that it declares, or by applies(). "
        "It then sits the others out, as it does under reward_on_error='skip' in a run, on_error='skip' elsewhere"
    )
