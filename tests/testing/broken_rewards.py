"""One broken reward per check of the contract kit: each keeps the whole contract but for one promise."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardOutput
from rdm_sdk.testing import example_images

DIFFERENTIABLE = Capabilities(gradient="autograd")


def brightness(batch: RewardBatch) -> Tensor:
    """A sound score: the mean brightness, `[N]`."""
    return batch.images.mean(dim=(1, 2, 3))


class Sound(Reward):
    """Breaks nothing."""

    capabilities = DIFFERENTIABLE

    def score(self, batch: RewardBatch) -> Tensor:
        return brightness(batch)


class WrongShape(Sound):
    """Reduces over too little."""

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mean(dim=(2, 3))


class Infinite(Reward):
    """Takes a logarithm of 0."""

    capabilities = Capabilities()

    def score(self, batch: RewardBatch) -> Tensor:
        return (batch.images - batch.images).amax(dim=(1, 2, 3)).log()


class OutOfRange(Sound):
    """Declares [0, 1] and scores in percent."""

    capabilities = Capabilities(gradient="autograd", range=(0.0, 1.0))

    def score(self, batch: RewardBatch) -> Tensor:
        return 100 * brightness(batch)


class Mutating(Reward):
    """Normalizes the shared images in place."""

    capabilities = Capabilities()

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mul_(2).mean(dim=(1, 2, 3))


class Hoarding(Sound):
    """Keeps its last scores, and with them the graph."""

    def score(self, batch: RewardBatch) -> Tensor:
        self.last = brightness(batch)
        self.images = batch.images
        return self.last


class Random(Reward):
    """Noisy, from a generator of its own, and does not say so."""

    capabilities = Capabilities()

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def score(self, batch: RewardBatch) -> Tensor:
        return brightness(batch) + torch.rand(len(batch), generator=self.generator)


class Reseeding(Sound):
    """Sets the seed of the whole training run."""

    def score(self, batch: RewardBatch) -> Tensor:
        torch.manual_seed(1234)
        return brightness(batch)


class BatchMean(Reward):
    """Compares with the batch that happens to be there."""

    capabilities = Capabilities()

    def score(self, batch: RewardBatch) -> Tensor:
        return brightness(batch) - brightness(batch).mean()


class LogsOfTheBatch(Sound):
    """Logs the largest score of whatever batch there is, as one number."""

    def score(self, batch: RewardBatch) -> Tensor:
        scores = brightness(batch)
        batch.log("best", scores.max())
        return scores


class FirstOfGroup(Sound):
    """Favors the first sample of each group."""

    capabilities = Capabilities(gradient="autograd", scope="group")

    def score(self, batch: RewardBatch) -> Tensor:
        first = torch.arange(len(batch)) % batch.group_size == 0
        return brightness(batch) + first.float().to(batch.images.device)


class DeafToPrompts(Sound):
    """Declares that prompts matter, and does not read them."""

    capabilities = Capabilities(gradient="autograd", prompts=True)


class SecretReader(Sound):
    """Reads the prompts, and does not say so."""

    def score(self, batch: RewardBatch) -> Tensor:
        return brightness(batch) + torch.tensor([0.01 * len(prompt) for prompt in batch.prompts])


class SecretColumn(Sound):
    """Reads a column where there is one, and does not say so."""

    def example(self) -> RewardBatch:
        moods: list[object] = [1.0, 2.0, 3.0, 4.0]
        return RewardBatch.from_images(example_images(4), ["a cat", "a cat", "a dog", "a dog"], 2, {"mood": moods})

    def score(self, batch: RewardBatch) -> Tensor:
        return brightness(batch) + torch.tensor(batch.columns.get("mood", [0.0] * len(batch)))


class FixedSize(Sound):
    """Works only where 8 divides the size."""

    def score(self, batch: RewardBatch) -> Tensor:
        count, _, height, width = batch.images.shape
        return batch.images.reshape(count, 3, 8, height // 8, 8, width // 8).mean(dim=(1, 2, 3, 4, 5))


class OwnDecoding(Reward):
    """Decodes on its own, so that it meets the decoder's dtype, which NumPy does not have."""

    capabilities = Capabilities()

    def score(self, batch: RewardBatch) -> Tensor:
        return torch.tensor([image.numpy().mean() for image in batch.decode(batch.latents)])


class DeviceByName(Sound):
    """Knows devices as objects only, not by their names."""

    def to(self, device: Any) -> None:
        if device.type == "cuda":
            raise NotImplementedError


class Rounded(Sound):
    """Goes through whole numbers, where gradients end."""

    def score(self, batch: RewardBatch) -> Tensor:
        return (batch.images * 255).detach().round().mean(dim=(1, 2, 3))


class NeighborlyGradient(Sound):
    """Its score is a sample's own; its gradient is that of the whole batch."""

    def score(self, batch: RewardBatch) -> Tensor:
        own = brightness(batch)
        return own + own.sum() - own.sum().detach()


class OtherUnits(Reward):
    """Sums in its field what it averages in its score."""

    capabilities = Capabilities(space="latent", gradient="field")
    sign = 1

    def score(self, batch: RewardBatch) -> Tensor:
        return -batch.latents.square().mean(dim=(1, 2, 3))

    def field(self, batch: RewardBatch) -> RewardOutput:
        scores = -batch.latents.square().sum(dim=(1, 2, 3))
        return RewardOutput(scores, -2 * self.sign * batch.latents)


class OtherUnitsDownhill(OtherUnits):
    """The same, with a gradient that points downhill."""

    sign = -1


class WrongSign(Sound):
    """Its gradient points downhill."""

    def score(self, batch: RewardBatch) -> Tensor:
        up = brightness(batch)
        return 2 * up.detach() - up


class DriftingConfig(Sound):
    """A validator that changes the value each time it is read."""

    class Config(RewardConfig):
        radius: int = 1

        @field_validator("radius")
        @classmethod
        def one_more(cls, value: int) -> int:
            return value + 1

    def __init__(self, config: RewardConfig | None = None, **options: Any) -> None:
        super().__init__(config, **({"radius": 3} | options))


BROKEN: dict[str, type[Reward]] = {
    "returns_scores": WrongShape,
    "finite_or_nan": Infinite,
    "declared_range": OutOfRange,
    "leaves_inputs_alone": Mutating,
    "retains_no_graph": Hoarding,
    "deterministic": Random,
    "rng_untouched": Reseeding,
    "chunk_invariant": BatchMean,
    "logs_the_same_in_chunks": LogsOfTheBatch,
    "permutation_equivariant": FirstOfGroup,
    "follows_the_prompt": SecretReader,
    "declares_its_columns": SecretColumn,
    "odd_sizes": FixedSize,
    "bfloat16_input": OwnDecoding,
    "device_round_trip": DeviceByName,
    "gradient_not_zero": Rounded,
    "gradient_chunk_invariant": NeighborlyGradient,
    "gradient_keeps_scores": OtherUnits,
    "ascent_raises_score": WrongSign,
    "config_round_trip": DriftingConfig,
}
"""Check to a reward that fails it and no other. `imports_without_cuda` needs a module of its own (see the test)."""
