"""Z-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rdm_sdk.families.base import Network
from rdm_sdk.families.features import middle
from rdm_sdk.families.flow import PackedFlowFamily
from rdm_sdk.types import Condition


class ZImageFamily(PackedFlowFamily):
    """`ZImagePipeline`: a transformer that packs latents itself, takes lists of samples, and predicts minus the flow.

    Its time runs from noise, 0, to data, 1. The pipeline's guidance_scale is ours less 1: it takes 0 for none.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: tokens per prompt, its template's included, as in the pipeline's call; None means the
            call's default, 512. Longer prompts are cut, shorter ones cost the transformer no more.

    Raises:
        ConfigError: `max_sequence_length` is out of range.
    """

    call_length = 512
    masks = (("encoder_hidden_states", "encoder_hidden_states_mask"),)

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        # Texts are padded to multiples of 32, take the places from 1 on, and the image stands at the next.
        self.check_length(1, (self.backbone.axes_lens[0] - 2) // 32 * 32)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        with torch.no_grad():
            # A new list: the pipeline writes the template into it.
            texts, _ = self.pipeline.encode_prompt(
                list(prompts),
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        missing = [self.max_sequence_length - len(text) for text in texts]
        padded = [nn.functional.pad(text, (0, 0, 0, count)) for text, count in zip(texts, missing, strict=True)]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        mask = torch.arange(self.max_sequence_length, device=self.device) < lengths[:, None]
        return {"encoder_hidden_states": torch.stack(padded), "encoder_hidden_states_mask": mask}

    def example_encoding(self, count: int) -> Condition:
        encoder, length = self.pipeline.text_encoder, self.max_sequence_length
        embeds = torch.zeros(count, length, encoder.config.hidden_size, dtype=encoder.dtype, device=self.device)
        return {
            "encoder_hidden_states": embeds,
            "encoder_hidden_states_mask": torch.ones(count, length, dtype=torch.bool),
        }

    @property
    def default_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def latent_channels(self) -> int:
        return int(self.backbone.in_channels)

    def pack(self, latents: Tensor) -> Tensor:
        return latents

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        dtype = self.dtype
        texts = condition["encoder_hidden_states"].to(dtype)
        lengths = condition["encoder_hidden_states_mask"].sum(1).tolist()
        flows: Any = network(
            role,
            x=list(x_t.to(dtype)[:, :, None]),
            t=(1000 - self.timesteps(sigma)) / 1000,
            cap_feats=[text[:length] for text, length in zip(texts, lengths, strict=True)],
        )
        return -torch.stack(flows).squeeze(2)

    def features(self, network: Network, role: str, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        extract = super().features(network, role, condition)

        def extract_image(x_t: Tensor, sigma: Tensor) -> Tensor:
            tokens = x_t.shape[-2] * x_t.shape[-1] // 4
            return extract(x_t, sigma)[:, :tokens]  # behind them come padding and the text

        return extract_image

    def feature_block(self) -> nn.Module:
        return middle(self.backbone.layers)

    @property
    def feature_width(self) -> int:
        return int(self.backbone.dim)

    def guidance_call(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}
