"""The curves of a report: which there are, in what units, what each means, and what is normal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rdm_sdk.evaluation.report.reading import RunLog


@dataclass(frozen=True)
class Kind:
    """What is known of the curves whose names match a pattern."""

    pattern: str
    group: str
    unit: str
    meaning: str
    """A sentence or two: what it is, and what is normal. `{0}` is what the pattern's group matched."""


KINDS = (
    Kind(
        "loss",
        "Losses",
        "no unit",
        "The student's loss: its gradient counts, not its level. Going up and down is normal; a steady rise by orders "
        "of magnitude, or NaN, is divergence.",
    ),
    Kind("loss/pathwise", "Losses", "no unit", "The part of the student's loss that acts by gradients of rewards."),
    Kind("loss/policy", "Losses", "no unit", "The part that acts by advantages of scores. About 0 is normal."),
    Kind(
        "(.+)/critic_loss",
        "Losses",
        "squared error",
        "How well {0}'s critic denoises the student's samples. It falls fast at first; then it follows the samples, "
        "and rises while they become sharper and more different. The lag tells whether the critic keeps up.",
    ),
    Kind(
        "rewards/(.+)/mean",
        "Rewards",
        "score, native units",
        "What {0} thinks of the student's samples: higher is better. For dm it is an estimate of the matching, noisy "
        "and rising towards 0.",
    ),
    Kind(
        "rewards/(.+)/std",
        "Rewards",
        "score, native units",
        "How much scores of {0} differ within a batch. Falling to 0 means that nothing is left to learn from, or that "
        "the student has narrowed.",
    ),
    Kind(
        "rewards/(.+)/zero_std",
        "Rewards",
        "share of groups, 0 to 1",
        "Groups in which {0} scores all samples alike. Near 1, advantages are empty.",
    ),
    Kind("rewards/(.+)/nan", "Rewards", "samples", "Samples to which {0} does not apply. 0 is normal."),
    Kind(
        "rewards/(.+)/applies",
        "Rewards",
        "share of samples, 0 to 1",
        "Samples that {0} is for; its mean is over them. 1 is normal for a reward of all prompts.",
    ),
    Kind("rewards/(.+)/skipped", "Rewards", "share of batches, 0 to 1", "How often {0} failed and was skipped."),
    Kind("rewards/(.+)/seconds", "Costs", "seconds per batch", "What evaluating {0} takes."),
    Kind(
        "rewards/(.+)/(.+)",
        "Rewards",
        "as the reward says",
        "What {0} logs itself (`batch.log`): the mean over the samples that it has a value for.",
    ),
    Kind("weights/(.+)", "Weights", "weight", "What {0} weighs beside the others; constant unless weighting adapts."),
    Kind("weighting/(.+)", "Weights", "", "What the weighting goes by: {0}."),
    Kind(
        "(.+)/pull",
        "Weights",
        "mean |normalized gradient|",
        "How hard {0} pulls before its weight. Rewards of like strength have weight times pull of like size.",
    ),
    Kind(
        "(.+)/residual",
        "Matching",
        "mean |x_0 - D(x_t)|",
        "How far the student's samples are from what the teacher makes of them ({0}). Most of it is noise that the "
        "teacher cannot know, more for sharp samples, so it may rise in a healthy run; the gap is the rest.",
    ),
    Kind(
        "(.+)/gap",
        "Matching",
        "mean square of D_real - D_fake, per latent value",
        "How far teacher and critic are apart: what {0} still tells the student. It rises while the critic learns, "
        "then falls, and stays where rewards pull as hard; four times its least, and more than the error, is drift.",
    ),
    Kind(
        "(.+)/error",
        "Matching",
        "mean square of x_0 - D_fake, per latent value",
        "What {0}'s critic cannot know of a re-noised sample. It follows how sharp and how different samples are.",
    ),
    Kind(
        "(.+)/lag",
        "Matching",
        "square per latent value, may be negative",
        "The error that {0}'s critic makes for all samples of a prompt alike. It wavers around 0; on average more than "
        "half of the gap says that the critic lags behind: more critic_steps, or a higher critic_learning_rate.",
    ),
    Kind(
        "(.+)/distance",
        "Matching",
        "mean square, per latent value",
        "How far samples of the student's last step are from where the teacher's flow leads ({0}). It falls and stays "
        "above 0, because early steps go on changing what the last one sees.",
    ),
    Kind(
        "student/diversity",
        "Variety",
        "standard deviation of a latent value",
        "How different the samples of a prompt are. It rises while they become sharper, then stays; half of its best "
        "is a collapse.",
    ),
    Kind(
        "student/deviation",
        "Variety",
        "standard deviation of a latent value",
        "How different all samples of a batch are. It rises while they become sharper, or stays; half of its best is a "
        "collapse.",
    ),
    Kind(
        "frac_reward_zero_std",
        "Rewards",
        "share of groups, 0 to 1",
        "Groups in which a reward that acts by advantages finds no difference. Above 0.5, most samples teach nothing.",
    ),
    Kind(
        "ratio/ess",
        "Importance sampling",
        "share of samples, 0 to 1",
        "Effective sample size of rollouts that are used again: 1 when fresh, below 0.5 they are hardly worth using.",
    ),
    Kind("ratio/mean", "Importance sampling", "ratio", "Mean importance weight. About 1 is normal."),
    Kind("ratio/stopped", "Importance sampling", "share of uses", "Rollouts made afresh because too few counted."),
    Kind(
        "ratio/clip_fraction",
        "Importance sampling",
        "share of ratios, 0 to 1",
        "Ratios beyond the clip range. A few percent are normal; near 1 the update is stopped by the clip alone.",
    ),
    Kind("ratio/(.+)", "Importance sampling", "", "Of the importance weights: {0}."),
    Kind(
        "grad_norm",
        "Gradients",
        "norm before clipping",
        "The student's gradient. Even, or slowly falling; spikes are clipped at max_grad_norm, a rise by orders of "
        "magnitude is divergence.",
    ),
    Kind(
        "(.+)/critic_grad_norm", "Gradients", "norm before clipping", "The gradient of {0}'s critic; as the student's."
    ),
    Kind("learning_rate", "Gradients", "learning rate", "The student's, by its schedule."),
    Kind("cost/(.+)_forwards", "Costs", "samples", "Network evaluations of the {0} so far, on one process."),
    Kind("cost/(.+)", "Costs", "count", "{0} so far, on one process."),
    Kind(
        "eval_loss",
        "Evaluation in training",
        "score, native units",
        "The first reward's mean on the evaluation prompts, negated: what load_best_model_at_end goes by.",
    ),
    Kind(
        "eval_rewards/(.+)/mean",
        "Evaluation in training",
        "score, native units",
        "What {0} thinks of finished samples for the evaluation prompts, always from the same noise. It rises with the "
        "training's; if it falls while that rises, the reward is gamed.",
    ),
    Kind(
        "eval_rewards/(.+)/std",
        "Evaluation in training",
        "score, native units",
        "How much scores of {0} differ among these samples: what a fall of the mean is measured by.",
    ),
    Kind(
        "eval_rewards/(.+)/(.+)",
        "Evaluation in training",
        "as the reward says",
        "What {0} logs itself of these samples.",
    ),
    Kind("eval_(.+)", "Evaluation in training", "", "Of the evaluation prompts: {0}."),
    Kind("(.+)", "Other", "", "{0}, as logged."),
)
ORDER = tuple(dict.fromkeys(kind.group for kind in KINDS))
NOT_CURVES = re.compile(r"step|epoch|total_flos|train_.*|.*_(runtime|per_second)")


@dataclass(frozen=True)
class Curve:
    """One figure over the steps, of every run that logged it."""

    name: str
    group: str
    unit: str
    meaning: str
    points: list[list[tuple[int, float]]]
    """Per run, (step, value) of what is finite; empty for a run that did not log it."""
    broken: int
    """How many values were NaN or infinite."""


def curves_of(runs: Sequence[RunLog]) -> list[Curve]:
    """Return all curves of some runs, in the order of a report."""
    names = dict.fromkeys(
        name
        for run in runs
        for row in run.history
        for name, value in row.items()
        if isinstance(value, (int, float)) and not NOT_CURVES.fullmatch(name)
    )
    return sorted((_curve(name, runs) for name in names), key=_place)


def _curve(name: str, runs: Sequence[RunLog]) -> Curve:
    index, match = next((i, m) for i, kind in enumerate(KINDS) if (m := re.fullmatch(kind.pattern, name)))
    kind, part = KINDS[index], (match.groups() or (name,))[0]
    every = [[(int(row["step"]), float(row[name])) for row in run.history if _is_number(row.get(name))] for run in runs]
    points = [[point for point in run if math.isfinite(point[1])] for run in every]
    broken = sum(map(len, every)) - sum(map(len, points))
    return Curve(name, kind.group, kind.unit, kind.meaning.format(part.replace("_", " ")), points, broken)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _place(curve: Curve) -> tuple[int, int, str]:
    index = next(i for i, kind in enumerate(KINDS) if re.fullmatch(kind.pattern, curve.name))
    return ORDER.index(curve.group), index, curve.name


def thinned(points: Sequence[tuple[int, float]], buckets: int = 150) -> list[tuple[int, float]]:
    """Return at most two points per bucket of steps: the lowest and the highest, so that no spike is lost."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[tuple[int, float]] = []
    for start in range(buckets):
        part = points[start * len(points) // buckets : (start + 1) * len(points) // buckets]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept
