"""FLUX.2 [klein]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from rdm_sdk.families.base import Network
from rdm_sdk.families.flow import unpack
from rdm_sdk.families.flux import TwoStreamFamily, places
from rdm_sdk.types import Condition


class Flux2Family(TwoStreamFamily):
    """`Flux2KleinPipeline`: text from three layers of a Qwen3, and latents whitened by their VAE's statistics.

    The undistilled bases are guided by two passes; the distilled ones (`is_distilled` in the pipeline's config) take no
    guidance.

    The base's own grid depends on its number of steps: 50 of the undistilled ones, as in the pipeline's call, and 4 of
    the distilled ones.

    Our latents are `[N, C, h, w]`, as in FLUX.1 and as this VAE makes them: both families then share their tokens. Only
    the pipeline's `latents=` has squares of 2 x 2 as channels.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: tokens per prompt and its chat template, as in the pipeline's call; None means the call's
            default, 512. Padding is not masked, so the number matters, and longer texts are cut without a warning.

    Raises:
        ConfigError: `max_sequence_length` is below 1 or above what the text encoder was made for.
    """

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        self.check_length(1, int(pipeline.text_encoder.config.max_position_embeddings))
        self.guidance = "none" if pipeline.config.is_distilled else "classifier-free"

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            embeds, _ = self.pipeline.encode_prompt(
                prompts, device=self.device, max_sequence_length=self.max_sequence_length
            )
        return {"encoder_hidden_states": embeds}

    def example_encoding(self, count: int) -> Condition:
        encoder = self.pipeline.text_encoder
        shape = count, self.max_sequence_length, 3 * encoder.config.hidden_size  # of three layers
        return {"encoder_hidden_states": torch.zeros(shape, dtype=encoder.dtype, device=self.device)}

    def inputs(self, x_t: Tensor, condition: Condition) -> dict[str, Any]:
        text = condition["encoder_hidden_states"].to(self.dtype)
        count, length, _ = text.shape
        text_places = torch.zeros(length, 4, dtype=torch.long, device=text.device)
        text_places[:, 3] = torch.arange(length, device=text.device)
        return {
            "encoder_hidden_states": text,
            "txt_ids": text_places.expand(count, -1, -1),
            "img_ids": places(x_t, axes=4).expand(count, -1, -1),
        }

    def dynamic_mu(self, tokens: int) -> float:
        mu: float = compute_empirical_mu(tokens, num_steps=4 if self.pipeline.config.is_distilled else 50)
        return mu

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents `[N, C, h, w]` as the pipeline's `latents=` takes them, `[N, 4 C, h / 2, w / 2]`."""
        count, channels, height, width = latents.shape
        return self.tokens(latents).transpose(1, 2).reshape(count, 4 * channels, height // 2, width // 2)

    def to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return unpack(self.tokens(latents) * std + mean, *latents.shape[-2:])

    def from_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return unpack((self.tokens(latents) - mean) / std, *latents.shape[-2:])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the tokens' channels, `[4 C]` each."""
        vae = self.pipeline.vae
        mean: Tensor = vae.bn.running_mean
        variance: Tensor = vae.bn.running_var + vae.config.batch_norm_eps
        return mean.to(like), variance.sqrt().to(like)

    def features(self, network: Network, role: str, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        extract = super().features(network, role, condition)

        def extract_image(x_t: Tensor, sigma: Tensor) -> Tensor:
            # Blocks of one stream return the text's tokens too, before the image's.
            return extract(x_t, sigma)[:, -self.tokens(x_t).shape[1] :]

        return extract_image
