"""Importance sampling: each rollout serves four updates, weighted by how likely it still is.

python examples/reuse_rollouts.py --output outputs/reuse --steps 300

It prints what the run cost beside one that rolls out for every update. See "Using rollouts again" in docs/trainer.md.
"""

from shared import digits_settings, flags

from rdm_sdk import RDMTrainer, digits, markdown_table


def main() -> None:
    options = flags(__doc__, steps=300).parse_args()
    rows = []
    for uses in (1, 4):
        settings = digits_settings(
            options,
            f"uses_{uses}",
            num_iterations=uses,
            min_effective_sample_size=0.5,  # below this share of samples that count, rollouts are made afresh
            logging_steps=1,
        )
        trainer = RDMTrainer(digits.teacher_path(), "dm", settings, digits.prompts())
        trainer.train()
        trainer.save_model(str(options.output / f"student_{uses}"))
        effective = [row["ratio/ess"] for row in trainer.state.log_history if "ratio/ess" in row]
        spent = trainer.costs()
        row = f"{uses} use(s)", spent["cost/rollouts"], spent["cost/student_forwards"], min(effective, default=1.0)
        rows.append(row)
    print(markdown_table(["of a rollout", "rollouts", "student's evaluations", "lowest share that counts"], rows))


if __name__ == "__main__":
    main()
