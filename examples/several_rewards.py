"""Three rewards, as much of them as a fidelity budget allows, and a fourth that is watched and trains nothing.

python examples/several_rewards.py --output outputs/several_rewards --steps 300
"""

from shared import digits_settings, flags
from torch import Tensor

from rdm_sdk import RDMTrainer, digits


def ink(images: Tensor, prompts: list[str]) -> list[float]:
    """How much of a picture is white, in [0, 1]."""
    return images.mean(dim=(1, 2, 3)).tolist()


def main() -> None:
    options = flags(__doc__, steps=300).parse_args()
    trainer = RDMTrainer(
        digits.teacher_path(),
        ["dm", "0.5*legibility", "0.2*jpeg", (ink, 0)],  # weight 0 watches
        digits_settings(
            options,
            "run",
            # All rewards share a multiplier that falls while dm's pull is over 1.1 times its lowest so far.
            weighting="constraint[slack=0.1,cold_start=20]",
            logging_steps=1,
        ),
        digits.prompts(),
    )
    trainer.train()
    trainer.save_model(str(options.output / "student"))
    last = next(row for row in reversed(trainer.state.log_history) if "loss" in row)
    for name in ("legibility", "jpeg", "ink"):
        print(f"{name}: mean score {last[f'rewards/{name}/mean']:.4f}, weight {last[f'weights/{name}']:.3g}")


if __name__ == "__main__":
    main()
