"""Two rewards of your own beside distribution matching: a function, and a class with a gradient and an option.

python examples/custom_reward.py --output outputs/custom_reward --steps 150
"""

import torch
from pydantic import Field
from shared import digits_settings, flags
from torch import Tensor

from rdm_sdk import Capabilities, RDMTrainer, Reward, RewardBatch, RewardConfig, digits, score_images


def ink(images: Tensor, prompts: list[str], **columns: object) -> list[float]:
    """How much of a picture is white, in [0, 1]: any function will do. It acts by comparing a prompt's samples."""
    return images.mean(dim=(1, 2, 3)).tolist()


class Sharpness(Reward):
    """Mean difference of pixels that are `radius` apart, in [0, 1]: made of torch operations, so it has a gradient."""

    capabilities = Capabilities(gradient="autograd", range=(0.0, 1.0))

    class Config(RewardConfig):
        radius: int = Field(default=1, ge=1)
        """Distance of the compared pixels."""

    def score(self, batch: RewardBatch) -> Tensor:
        """Return one number per image `[N]`; higher is better."""
        step = self.config.radius
        return (batch.images[..., step:] - batch.images[..., :-step]).abs().mean(dim=(1, 2, 3))


def main() -> None:
    options = flags(__doc__, steps=150).parse_args()
    sharpness = Sharpness(radius=2)
    # Rewards need no training to be tried out.
    (tried,) = score_images(sharpness, torch.rand(4, 3, 32, 32)).outputs.values()
    print("on noise:", tried.scores)
    trainer = RDMTrainer(
        digits.teacher_path(),
        ["dm", (ink, 0.1), (sharpness, 0.2)],
        digits_settings(options, "run"),
        digits.prompts(),
    )
    trainer.train()
    trainer.save_model(str(options.output / "student"))


if __name__ == "__main__":
    main()
