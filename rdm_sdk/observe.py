"""Looking at a student during training: the grid of pictures, and scores of finished samples."""

from __future__ import annotations

from pathlib import Path

import torch
from datasets import Dataset

from rdm_sdk.data import collate
from rdm_sdk.errors import ConfigError, DataError, RDMError
from rdm_sdk.export import STUDENT
from rdm_sdk.hosting import RoleTrainer
from rdm_sdk.models.roles import TEACHER
from rdm_sdk.report import image_grid
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_rewards


@torch.no_grad()
def training_grid(trainer: RoleTrainer, path: str | Path) -> Path:
    """Write the grid that shows a collapse early: student x_0, and what teacher and critics make of it re-noised.

    Prompts and seed are fixed, so that the grids of a run can be compared. The raw student is shown, not its moving
    average.
    """
    if trainer.train_dataset is None:
        raise DataError("write_images() shows the first training prompts: pass train_dataset to the trainer")
    prompts = list(dict.fromkeys(trainer.train_dataset[:64]["prompt"]))[:10]
    with trainer.seeded(trainer.args.seed):
        latents = trainer.sample_latents(prompts)
        rows = [("student x_0", latents)]
        sigma = torch.full((len(latents),), 0.6, device=latents.device)
        context = trainer.context(trainer.encode(prompts))
        x_t = context.add_noise(latents, sigma)
        rows.append(("teacher x_0\nfrom sigma 0.6", context.denoiser(TEACHER)(x_t, sigma)))
        critics = [role for role in trainer.roles.adapter_roles if role != STUDENT]
        rows += [(f"{role} x_0\nfrom sigma 0.6", context.denoiser(role)(x_t, sigma)) for role in critics]
        images = [(label, trainer.adapter.decode(row)) for label, row in rows]
    return image_grid(images, path, scale=max(1, 64 // images[0][1].shape[-1]))


@torch.no_grad()
def evaluate_student(trainer: RoleTrainer, dataset: Dataset | None, prefix: str) -> dict[str, float]:
    """Sample the student for the evaluation prompts, always with the same noise, and score the samples.

    Returns:
        The mean of every reward that can judge finished samples, as `<prefix>_rewards/<name>/mean`. The first of them
        is also `<prefix>_loss`, negated, so that `load_best_model_at_end` has something to go by.

    Raises:
        ConfigError: no reward judges finished samples, or there are no evaluation prompts.
    """
    judges = {own.label: own.reward for own in trainer.rewards if not own.reward.capabilities.needs_models}
    if not judges or dataset is None:
        raise ConfigError(
            "evaluate() needs eval_dataset and a reward that judges images, beside or instead of 'dm'; add one "
            "with weight 0 to watch it without training on it, such as 'dm + 0*legibility'"
        )
    size = trainer.args.per_device_eval_batch_size
    in_groups = any(reward.capabilities.scope == "group" for reward in judges.values())
    group = trainer.args.num_generations if in_groups else 1
    inputs = collate([row for row in dataset for _ in range(group)])
    prompts = inputs["prompts"]
    with trainer.seeded(trainer.args.seed), trainer.exported_weights():
        latents = [trainer.sample_latents(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        batch = RewardBatch(torch.cat(latents), prompts, group, trainer.adapter.decode, inputs["columns"])
        outputs = evaluate_rewards(judges, batch, chunk_size=size, gradients_of=(), **trainer.judging).outputs
    if not outputs:
        raise RDMError("every reward was skipped in evaluate(), so there is nothing to report")
    metrics = {f"{prefix}_rewards/{name}/mean": output.scores.nanmean().item() for name, output in outputs.items()}
    metrics[f"{prefix}_loss"] = -next(iter(metrics.values()))
    return metrics
