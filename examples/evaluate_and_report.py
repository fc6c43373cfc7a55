"""A run, then two answers: a table of the student beside its teacher, and one HTML page about all of it.

pip install 'rdm-sdk[report]'
python examples/evaluate_and_report.py --output outputs/judged --steps 150 --samples 1000
"""

from shared import digits_settings, flags

from rdm_sdk import RDMTrainer, digits, evaluate, write_report
from rdm_sdk.digits.metrics import digit_features


def main() -> None:
    parser = flags(__doc__, steps=150)
    parser.add_argument("--samples", type=int, default=1000, help="images a row of the table; 10 prompts share them")
    options = parser.parse_args()
    run, student = options.output / "run", options.output / "student"
    trainer = RDMTrainer(
        digits.teacher_path(),
        "dm",
        digits_settings(
            options, "run", log_images=max(1, options.steps // 3), logging_steps=max(1, options.steps // 50)
        ),
        digits.prompts(),
    )
    trainer.train()
    trainer.save_model(str(student))
    result = evaluate(
        digits.teacher_path(),
        digits.prompts(),
        [student],
        features=digit_features,  # for pictures of another kind: "dinov2"
        teacher_steps=[4, 8],
        rewards="legibility",
        samples=options.samples,
        output=run / "eval",  # in the run's folder, where the report finds it
    )
    print(result.table())
    print("wrote", write_report([run], options.output / "report.html"))


if __name__ == "__main__":
    main()
