"""A weighting strategy of your own: a reward's weight is halved whenever its score has reached a target.

python examples/custom_weighting.py --output outputs/custom_weighting --steps 150
"""

from collections.abc import Mapping

from shared import digits_settings, flags

from rdm_sdk import RDMTrainer, RewardStatistics, digits


class UntilReached:
    """Keep weights as they were given, and halve one in every step that follows a score of its target or more.

    Args:
        targets: reward name to the mean score that is enough.
    """

    def __init__(self, targets: Mapping[str, float]) -> None:
        self.targets = dict(targets)
        self.factors = dict.fromkeys(targets, 1.0)

    def weigh(
        self, targets: Mapping[str, float], statistics: Mapping[str, RewardStatistics], step: int
    ) -> dict[str, float]:
        """Return every reward's weight; `targets` are the given ones, `statistics` those of the step before."""
        for name, enough in self.targets.items():
            if name in statistics and statistics[name].score >= enough:
                self.factors[name] /= 2
        return {name: weight * self.factors.get(name, 1.0) for name, weight in targets.items()}

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint must keep, or a resumed run would be another one. It is logged, too."""
        return dict(self.factors)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self.factors = dict(state)


def main() -> None:
    options = flags(__doc__, steps=150).parse_args()
    trainer = RDMTrainer(
        digits.teacher_path(),
        "dm + 0.1*legibility",
        digits_settings(options, "run"),
        digits.prompts(),
        weighting=UntilReached({"legibility": 0.99}),
    )
    trainer.train()
    print("weights at the end:", trainer.weights)


if __name__ == "__main__":
    main()
