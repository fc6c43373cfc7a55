"""Full weights in the place of adapters, for the student and for the critic.

python examples/full_fine_tuning.py --output outputs/full --steps 150

Each copy of P parameters takes 16 P bytes beside the base (`rdm-sdk plan` counts them); rates are lower than those of
adapters. The student is a whole transformer: `<output>/student/transformer`.
"""

from shared import digits_settings, flags

from rdm_sdk import RDMTrainer, digits, plan_memory


def main() -> None:
    options = flags(__doc__, steps=150).parse_args()
    settings = digits_settings(
        options,
        "run",
        student_weights="full",
        critic_weights="full",
        learning_rate=3e-4,
        critic_learning_rate=1.2e-3,
    )
    print(plan_memory(digits.teacher_path(), settings))
    trainer = RDMTrainer(digits.teacher_path(), "dm", settings, digits.prompts())
    trainer.train()
    trainer.save_model(str(options.output / "student"))


if __name__ == "__main__":
    main()
