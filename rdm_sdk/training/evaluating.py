"""`RDMTrainer.evaluate`, between what it is given and what it logs: samples from the same noise, and their figures."""

from __future__ import annotations

from collections.abc import Mapping

from datasets import Dataset

from rdm_sdk.errors import ConfigError
from rdm_sdk.training.config import RDMConfig
from rdm_sdk.training.data import collate
from rdm_sdk.training.finished import figures, score_finished
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.models import RunModels
from rdm_sdk.training.validation import NO_EVALUATION


def evaluated(
    models: RunModels,
    judge: Judge,
    dataset: Dataset | None,
    args: RDMConfig,
    prefix: str,
    targets: Mapping[str, float],
) -> dict[str, float]:
    """Return the `figures` of what the student makes of a dataset's prompts, always with the same noise.

    `targets` maps the names of the run's rewards to their weights.

    Raises:
        ConfigError: no reward judges finished samples, or there is no dataset.
    """
    if not judge.of_images or dataset is None:
        raise ConfigError(NO_EVALUATION)
    inputs, size = collate(list(dataset)), args.per_device_eval_batch_size
    with models.seeded(args.seed), models.exported_weights():
        outputs = score_finished(models, judge, inputs["prompts"], inputs["columns"], size)
    return judge.agreed(figures(outputs, prefix, {name: targets.get(name, 0.0) for name in judge.of_images}))
