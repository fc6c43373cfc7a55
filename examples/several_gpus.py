"""The same run on several GPUs of a machine: distributed data parallel, one process each.

accelerate launch --num_processes 4 examples/several_gpus.py --output outputs/several_gpus --steps 150

`--batch` counts the samples of one process. A group stays on one process; gradients, adaptive weights and statistics
of whole batches are shared. Without a GPU: accelerate launch --cpu --num_processes 2 ...; alone, it is an ordinary run.
"""

from shared import digits_settings, flags

from rdm_sdk import RDMTrainer, digits


def main() -> None:
    options = flags(__doc__, steps=150).parse_args()
    trainer = RDMTrainer(
        digits.teacher_path(), "dm + 0.1*legibility", digits_settings(options, "run"), digits.prompts()
    )
    trainer.train()
    trainer.save_model(str(options.output / "student"))  # writes on the first process alone
    if trainer.is_world_process_zero():
        print(f"{trainer.args.world_size} process(es), {options.batch} samples a step on each")


if __name__ == "__main__":
    main()
