"""`evaluate`: students and their teacher beside each other, in every figure there is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rdm_sdk.errors import ConfigError, DataError
from rdm_sdk.evaluation.candidates import (
    Candidate,
    counted,
    distinct,
    shared_call,
    student_candidates,
    teacher_candidate,
)
from rdm_sdk.evaluation.distances import frechet_interval, kernel_distance
from rdm_sdk.evaluation.features import Extractor, Features, feature_extractor
from rdm_sdk.evaluation.images import check_images
from rdm_sdk.evaluation.neighbors import density_coverage, precision_recall
from rdm_sdk.evaluation.provenance import digest, rewards_provenance
from rdm_sdk.evaluation.result import EvaluationResult, Row
from rdm_sdk.evaluation.sampling import Sampler, check_guidance
from rdm_sdk.evaluation.scoring import judges_of, pieces_of, scores_of, summary
from rdm_sdk.evaluation.variety import diversity, group_labels, teacher_steps_worth
from rdm_sdk.files import replacing
from rdm_sdk.rewards.resolve import PlannedReward, RewardFuncs, WeightedReward, plan_rewards
from rdm_sdk.rewards.scoring import check_scorable
from rdm_sdk.training.data import load_prompts
from rdm_sdk.training.pictures import image_grid
from rdm_sdk.training.run_record import versions
from rdm_sdk.training.validation import check_writable

PICTURES = "grid.png"
FEWEST = 16
"""Images from which distances and neighbors begin to mean anything."""


def evaluate(
    model: object,
    prompts: object,
    students: Sequence[str | Path] = (),
    *,
    features: str | Features,
    teacher_steps: Sequence[int] = (),
    steps: Sequence[int] = (),
    rewards: RewardFuncs = None,
    samples: int = 1000,
    reference_steps: int = 40,
    reference_samples: int | None = None,
    real: Tensor | None = None,
    guidance_scale: float = 1.0,
    call: Mapping[str, Any] | None = None,
    batch_size: int = 50,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Evaluate exported students, and their teacher at some numbers of steps, from images of the same prompts.

    Every row has all distances to the teacher's samples at `reference_steps`, and to `real` images if there are any.

    Args:
        model: the base: a hub id, a path or a loaded pipeline, which is left as it was.
        prompts: a list, a file or a dataset with a `prompt` column.
        students: folders that training saved.
        features: as `rdm-sdk eval --features` takes them, such as "dinov2" or "inception"; or a function of images
            `[N, 3, H, W]` in [0, 1] that returns features `[N, D]`: `rdm_sdk.digits.metrics.digit_features`.
        teacher_steps: numbers of steps at which the teacher gets a row too; from two on, students are worth steps.
        steps: numbers of steps of the students, for those that can be sampled with others than their trained one.
        rewards: as `RDMTrainer`'s `reward_funcs`; weights mean nothing here.
        samples: images per row, a multiple of the number of prompts.
        reference_steps: of the teacher's samples.
        reference_samples: how many of them; None is as many as `samples`.
        real: real images `[N, 3, H, W]`, float in [0, 1], for FID as published figures mean it.
        guidance_scale: the teacher's; the one that students were trained with.
        call: arguments of the pipeline calls, such as `height`; by default those of the students' `inference.json`.
        batch_size: images sampled at a time.
        seed: of the noise, the same for every row.
        device: where the models work; by default a GPU, if there is one, for a base that is named.
        dtype: of a base that is named, float32 by default; a loaded pipeline has one.
        output: a folder for images, so that none is sampled twice, and for tables and grid; None keeps nothing.
        progress: show bars.

    Raises:
        ConfigError, DataError, ModelError, RewardError: what cannot work; before anything is loaded, where possible.
    """
    texts, compared = _prompts_of_images(prompts, samples, reference_samples)
    rows, reference = _candidates(students, teacher_steps, steps, reference_steps, call or {})
    size = len(texts) // len(set(texts))
    planned, here = _checked(real, rewards, size, batch_size, guidance_scale, output), _place(model, device, dtype)
    extractor, judges = feature_extractor(features, here), judges_of(planned, True, (), size)
    kept_with, cache = rewards_provenance(judges), None if output is None else Path(output) / "images"
    source = Sampler(model, guidance_scale, seed, batch_size, [reference, *rows], dtype=dtype, device=here, cache=cache)
    run = _Run(source, texts, compared, extractor, judges, kept_with, reference, real, progress, here)
    return run.result(rows, output)


def _prompts_of_images(prompts: object, samples: int, reference_samples: int | None) -> tuple[list[str], list[str]]:
    """Return the prompt of every image of a row, and of every image of the reference."""
    given = list(load_prompts(prompts, "prompts")["prompt"])
    compared = samples if reference_samples is None else reference_samples
    spread = _spread(given, samples, "samples"), _spread(given, compared, "reference_samples")
    if compared < FEWEST <= samples:
        raise ConfigError(f"reference_samples={compared} must be at least {FEWEST}, for distances to mean anything")
    return spread


def _candidates(
    students: Sequence[str | Path],
    teacher_steps: Sequence[int],
    steps: Sequence[int],
    reference_steps: int,
    call: Mapping[str, Any],
) -> tuple[list[Candidate], Candidate]:
    """Return what gets a row, and the reference."""
    mine = distinct([one for folder in students for one in student_candidates(folder, steps, call)])
    shared = shared_call(mine, call)
    rows = distinct([*(teacher_candidate(count, shared) for count in teacher_steps), *mine])
    if not rows:
        raise ConfigError("there is nothing to evaluate: give students, or teacher_steps, or both")
    return rows, teacher_candidate(reference_steps, shared)


def _checked(
    real: Tensor | None,
    rewards: RewardFuncs,
    group_size: int,
    batch_size: int,
    guidance_scale: float,
    output: str | Path | None,
) -> list[PlannedReward]:
    """Return the rewards, nothing of them loaded, after checking what can be checked so."""
    if output is not None:
        check_writable(str(output), "output")
    check_guidance(guidance_scale)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} cannot be used; it must be at least 1")
    if real is not None and len(check_images(real, "real")) < FEWEST:
        raise DataError(f"real must be at least {FEWEST} images, for distances to mean anything; got {len(real)}")
    planned = [] if rewards is None else plan_rewards(rewards)
    check_scorable(planned, True, (), group_size)
    return planned


def _place(model: object, device: torch.device | str | None, dtype: torch.dtype | None) -> str:
    """Return where the models work: as asked, else where a loaded pipeline is, else on a GPU if there is one."""
    if not isinstance(model, (str, Path)):
        if dtype is not None:
            raise ConfigError(f"dtype={dtype} is for a base that is named; the pipeline that is passed has one")
        device = getattr(model, "device", None) if device is None else device
    return str(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _spread(prompts: list[str], samples: int, argument: str) -> list[str]:
    """Return the prompt of each image: the same number of images in a row for every prompt."""
    different = list(dict.fromkeys(prompts))
    if samples < 2 or samples % len(different):
        fewer, more = samples // len(different) * len(different), -(-samples // len(different)) * len(different)
        nearest = " or ".join(str(count) for count in dict.fromkeys((fewer, more)) if count >= 2) or str(2 * more)
        raise ConfigError(
            f"{argument}={samples} must be a multiple of the {len(different)} different prompts, at least 2; give "
            f"{nearest}"
        )
    return [prompt for prompt in different for _ in range(samples // len(different))]


@dataclass(frozen=True)
class FeatureSet:
    """A set of images, by its features."""

    features: Tensor
    """`[N, D]`."""
    groups: list[int] | None
    """The number of each image's prompt; None where all were drawn from one distribution."""


@dataclass
class _Run:
    """One evaluation on its way."""

    sampler: Sampler
    prompts: list[str]
    """One per image, those of a prompt in a row."""
    compared: list[str]
    """The prompts of the reference's images."""
    extractor: Extractor
    judges: Sequence[WeightedReward]
    kept_with: Mapping[str, Any]
    """The provenance of each, by its label."""
    reference: Candidate
    real: Tensor | None
    progress: bool
    device: str

    def __post_init__(self) -> None:
        self.group = len(self.prompts) // len(set(self.prompts))
        self.notes: list[str] = []
        self.pictures: list[tuple[str, Tensor]] = []
        """Rows of pictures with labels, one per prompt."""

    def rows(self, candidates: Sequence[Candidate]) -> list[Row]:
        """Return every candidate's row."""
        references = {}
        if self.real is not None:  # before anything is sampled: the extractor may not take their size
            references["real"] = FeatureSet(self._features(self.real, "real images"), None)
        images, _ = self._sampled(self.reference, "reference", self.compared)
        references["teacher"] = FeatureSet(self._features(images, "the reference"), group_labels(self.compared))
        self._picture(f"teacher, {counted(self.reference.steps)}\n(reference)", images)
        found = [self._row(candidate, references) for candidate in candidates]
        curve = {row.steps: row.against["teacher"]["frechet"] for row in found if not row.student and row.against}
        if len(curve) < 2:
            return found
        return [
            Row(**vars(row) | {"worth": teacher_steps_worth(row.against["teacher"]["frechet"], curve)})
            if row.student
            else row
            for row in found
        ]

    def _row(self, candidate: Candidate, references: Mapping[str, FeatureSet]) -> Row:
        images, milliseconds = self._sampled(candidate, "rows", self.prompts)
        self._picture(candidate.name.replace(", ", "\n"), images)
        against = self._compared(self._features(images, candidate.name), references)
        in_groups = [judge.label for judge in self.judges if judge.capabilities.scope == "group"]
        scores = {}
        if self.judges:
            with self._bar(len(images), f"scoring {candidate.name}") as bar:
                scores = scores_of(
                    self.judges,
                    pieces_of(images, self.prompts, self.group),
                    group_size=self.group,
                    device=self.device,
                    done=bar.update,
                )
        return Row(
            candidate.name,
            candidate.steps,
            None if candidate.student is None else str(candidate.student),
            against,
            self._diversity(images),
            {label: summary(values, self.prompts, label in in_groups) for label, values in scores.items()},
            "",
            milliseconds,
        )

    def _sampled(self, candidate: Candidate, stream: str, prompts: Sequence[str]) -> tuple[Tensor, float | None]:
        """Return a candidate's images, uint8, and milliseconds per image where all were sampled just now."""
        begin = time.perf_counter()
        title = f"sampling {candidate.name}{' (reference)' if stream == 'reference' else ''}"
        with self._bar(len(prompts), title) as bar:
            sampled = self.sampler.images(candidate, prompts, stream, bar.update)
        seconds = time.perf_counter() - begin
        if (warning := sampled.warning(candidate.name)) is not None:
            self._note(warning)
        count = len(sampled.images)
        return sampled.images, 1000 * seconds / count if sampled.fresh == count else None

    def _features(self, images: Tensor, name: str) -> Tensor:
        with self._bar(len(images), f"features of {name}") as bar:
            return self.extractor(images, bar.update)

    def _compared(self, features: Tensor, references: Mapping[str, FeatureSet]) -> dict[str, dict[str, Any]]:
        if len(features) < FEWEST:
            self._note(f"distances need {FEWEST} images or more, and there are {len(features)}")
            return {}
        fewest = min(len(features), *(len(reference.features) for reference in references.values()))
        if fewest <= features.shape[1]:
            self._note(
                f"{fewest} images are no more than the {features.shape[1]} features, so Frechet distances are "
                "mostly their bias; look at the kernel distances"
            )
        labels = group_labels(self.prompts)
        return {name: compare(FeatureSet(features, labels), reference) for name, reference in references.items()}

    def _diversity(self, images: Tensor) -> float | None:
        if self.group < 2:
            self._note("diversity needs two images or more of a prompt, and each has one")
            return None
        groups = [
            diversity(rows.float() / 255, prompts)
            for rows, prompts in zip(images.split(self.group), _split(self.prompts, self.group), strict=True)
        ]
        return sum(groups) / len(groups)

    def _picture(self, label: str, images: Tensor) -> None:
        every = len(images) // len(set(self.prompts))
        self.pictures.append((label, images[::every][:10].float() / 255))

    def result(self, candidates: Sequence[Candidate], output: str | Path | None) -> EvaluationResult:
        """Return all figures; write them, and the first images of every row as one picture, if there is a folder."""
        result = EvaluationResult(self.rows(candidates), self.provenance(candidates), self.notes)
        if output is not None:
            result.save(output)
            with replacing(Path(output) / PICTURES) as staged:
                image_grid(self.pictures, staged)
        return result

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _bar(self, total: int, title: str) -> Any:
        return tqdm(total=total, desc=title, unit="image", disable=not self.progress)

    def provenance(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Return what the figures must be kept with."""
        return {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "base": {
                "name": self.sampler.family.base_name,
                "fingerprint": self.sampler.fingerprint,
                "parts": self.sampler.parts,
                "dtype": str(self.sampler.family.dtype).removeprefix("torch."),
            },
            "students": {str(one.student): one.fingerprint for one in candidates if one.student is not None},
            "samples": len(self.prompts),
            "prompts": {"different": len(set(self.prompts)), "sha256": digest(self.prompts)},
            "seed": self.sampler.seed,
            "batch_size": self.sampler.batch_size,
            "device": self.device,
            "guidance_scale": self.sampler.guidance_scale,
            "calls": {one.name: self.sampler.call_of(one) for one in candidates},
            "features": self.extractor.name,
            "reference": {"steps": self.reference.steps, "samples": len(self.compared)},
            "real": None if self.real is None else len(self.real),
            "rewards": dict(self.kept_with),
        }


def compare(images: FeatureSet, reference: FeatureSet) -> dict[str, Any]:
    """Return all figures of images against a reference.

    Raises:
        DataError: they cannot be compared.
    """
    ours, theirs = images.features, reference.features
    distance = frechet_interval(ours, theirs, images.groups, reference.groups)
    kernel = kernel_distance(ours, theirs, subset_size=min(500, len(ours) // 2, len(theirs) // 2))
    precision, recall = precision_recall(ours, theirs)
    density, coverage = density_coverage(ours, theirs)
    return {
        "frechet": distance.value,
        "low": distance.low,
        "high": distance.high,
        "kernel": kernel.mean,
        "kernel_deviation": kernel.deviation,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def _split(prompts: Sequence[str], size: int) -> list[Sequence[str]]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
