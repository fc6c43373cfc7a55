"""What a run's student makes when it samples to the end: how rewards score it, and what networks make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor

from rdm_sdk.errors import ConfigError, DataError, RDMError
from rdm_sdk.families.roles import STUDENT, TEACHER
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.training.data import collate
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.monitor import warn_of_skipped
from rdm_sdk.training.picture_filter import PictureFilter
from rdm_sdk.types import RewardOutput

NO_EVALUATION = (
    "evaluate() needs eval_dataset and a reward that judges images, beside or instead of 'dm'; name one in "
    "eval_rewards to hold it out, or add one with weight 0 to watch it in training as well, such as 'dm + 0*legibility'"
)


def evaluated(
    models: RunModels, judge: Judge, dataset: Dataset | None, size: int, prefix: str, targets: Mapping[str, float]
) -> dict[str, float]:
    """Return the figures of what the student makes of a dataset's prompts, always with the same noise.

    `targets` maps the names of the run's rewards to their weights; `size` samples are made and judged at a time.

    Raises:
        ConfigError: no reward judges finished samples, or there is no dataset.
    """
    if not judge.of_images or dataset is None:
        raise ConfigError(NO_EVALUATION)
    inputs = collate(list(dataset))
    with models.seeded(judge.settings.seed), models.exported_weights():
        outputs = _scored(models, judge, inputs["prompts"], inputs["columns"], size)
    return judge.agreed(_figures(outputs, prefix, {name: targets.get(name, 0.0) for name in judge.of_images}))


def _scored(
    models: RunModels, judge: Judge, prompts: Sequence[str], columns: Mapping[str, list[object]], size: int
) -> dict[str, RewardOutput]:
    """Sample the student for prompts, one each, and score the samples by every reward that needs no models.

    Where a reward compares within groups, every prompt (and its columns) is repeated for a group.

    Raises:
        DataError: there is no column that a reward needs.
    """
    judge.processes.note("evaluating the student")
    rewards = judge.of_images
    for label, reward in rewards.items():
        for column in reward.capabilities.columns:
            if column not in columns:
                raise DataError(f"reward {label!r} needs a column {column!r}, and what is evaluated has none: add it")
    in_groups = any(reward.capabilities.scope == "group" for reward in rewards.values())
    group = judge.settings.num_generations if in_groups else 1
    repeated = [prompt for prompt in prompts for _ in range(group)]
    entries = {name: [value for value in values for _ in range(group)] for name, values in columns.items()}
    latents = [models.sample_latents(repeated[start : start + size]) for start in range(0, len(repeated), size)]
    batch = RewardBatch(
        latents=torch.cat(latents), prompts=repeated, group_size=group, decode=models.to_images, columns=entries
    )
    with models.vae_at_hand():
        result = evaluate_rewards(rewards, batch, chunk_size=size, gradients_of=(), **judge.options)
    warn_of_skipped(result)
    return result.outputs


def look(
    models: RunModels, judge: Judge, prompts: list[str], shown: PictureFilter | None = None
) -> list[tuple[str, Tensor]]:
    """Return rows of pictures with labels: the student's, and what teacher and critics make of them at sigma 0.6.

    A row holds the prompts' images `[N, 3, H, W]` in [0, 1], of which some may be gray: those not to be `shown`.
    """
    latents = models.sample_latents(prompts)
    sigma = torch.full((len(latents),), 0.6, device=latents.device)
    last = torch.full((len(prompts),), models.policy.num_steps - 1, device=latents.device)
    context = judge.context(models.encode(prompts), last)
    x_t = context.add_noise(latents, sigma)
    critics = [role for role in models.roles.denoising_roles if role != STUDENT]
    names = [TEACHER, *("critic" if role == "fake" else f"critic {role}" for role in critics)]
    labels = [STUDENT, *(f"{name}, after\nnoise of 0.6" for name in names)]
    rows = [latents, *(context.denoiser(role)(x_t, sigma) for role in (TEACHER, *critics))]
    pictures = models.decode(rows)
    if shown is not None:
        pictures = [shown(images, prompts) for images in pictures]
    return list(zip(labels, pictures, strict=True))


def _figures(outputs: Mapping[str, RewardOutput], prefix: str, asked: Mapping[str, float]) -> dict[str, float]:
    """Return mean and deviation of every reward, over the samples it is for: `<prefix>_rewards/<name>/mean` and `/std`.

    What a reward logged itself is `<prefix>_rewards/<name>/<figure>`. The mean of the first that was `asked`, and is
    for some of the samples, is also `<prefix>_loss`, so that `load_best_model_at_end` has something to go by: negated,
    unless its weight (of which `asked` maps the names to) is. If that one was skipped there is none, because another's
    mean would mean something else.

    Raises:
        RDMError: there are none.
    """
    scores = {name: output.scores for name, output in outputs.items() if not output.scores.isnan().all()}
    if not scores:
        raise RDMError("every reward was skipped in evaluate(), or is for none of its prompts: nothing to report")
    found = {f"{prefix}_rewards/{name}/mean": of.nanmean().item() for name, of in scores.items()}
    spread = {name: of[~of.isnan()] for name, of in scores.items()}
    deviations = {f"{prefix}_rewards/{n}/std": of.std().item() if len(of) > 1 else 0.0 for n, of in spread.items()}
    logged = {f"{prefix}_rewards/{n}/{f}": v.nanmean().item() for n, o in outputs.items() for f, v in o.logged.items()}
    logged = {name: value for name, value in logged.items() if value == value}  # NaN for all is nothing logged
    first = next(name for name in asked if name in scores or name not in outputs)
    sign = 1.0 if asked[first] < 0 else -1.0
    loss = {f"{prefix}_loss": sign * found[f"{prefix}_rewards/{first}/mean"]} if first in scores else {}
    return logged | found | deviations | loss
