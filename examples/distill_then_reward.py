"""Distill first, add rewards later: a second run starts from the first one's student.

python examples/distill_then_reward.py --output outputs/distill_then_reward --steps 150

The teacher stays the base, so the student goes on being matched to it. Critics start anew, as the teacher: at first
there is nothing between the two, and `dm` pulls at nothing. So the rewards wait for them (`cold_start`).
"""

from shared import digits_settings, flags

from rdm_sdk import RDMTrainer, digits


def main() -> None:
    options = flags(__doc__, steps=150).parse_args()
    first = RDMTrainer(digits.teacher_path(), "dm", digits_settings(options, "first"), digits.prompts())
    first.train()
    distilled = options.output / "distilled"
    first.save_model(str(distilled))

    second = RDMTrainer(
        digits.teacher_path(),
        "dm + 0.1*legibility",
        digits_settings(
            options,
            "second",
            start_from=str(distilled),
            learning_rate=3e-4,  # lower: what is there shall be kept
            critic_learning_rate=2e-3,
            weighting="fixed[cold_start=20,ramp=20]",
        ),
        digits.prompts(),
    )
    second.train()
    second.save_model(str(options.output / "rewarded"))
    print(f"wrote {distilled} and {options.output / 'rewarded'}")


if __name__ == "__main__":
    main()
