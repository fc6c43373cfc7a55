"""Sana: linear attention on the latents of a deep-compression autoencoder, texts from Gemma."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rdm_sdk.errors import ModelError
from rdm_sdk.families.base import Network
from rdm_sdk.families.flow import FlowFamily
from rdm_sdk.families.pixart import MaskedTextFamily
from rdm_sdk.types import Condition

SHIFTS = {"DPMSolverMultistepScheduler": "flow_shift", "FlowMatchEulerDiscreteScheduler": "shift"}
"""Schedulers that Sana can follow, and what they call their shift."""


class SanaFamily(MaskedTextFamily, FlowFamily):
    """`SanaPipeline`: rectified flow, and prompts that come behind an instruction to enhance them.

    Gemma reads the instruction, the call's default `complex_human_instruction`, and the transformer sees the prompt's
    tokens behind it. A missing prompt has no instruction.

    Args:
        pipeline: the loaded pipeline.
        max_sequence_length: tokens per prompt, as in the pipeline's call; None means the call's default, 300.

    Raises:
        ModelError: the scheduler is not one of `schedulers`, or not set up for a flow.
        ConfigError: `max_sequence_length` leaves no token to a prompt.
    """

    schedulers = tuple(SHIFTS)
    tokens_besides = 2  # <bos>, and the instruction's last
    pipeline_unit = 32

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        config = pipeline.scheduler.config
        # Only DPM-Solver has other predictions and other noise levels than a flow's.
        if type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler" and not (
            config.prediction_type == "flow_prediction" and config.use_flow_sigmas
        ):
            raise ModelError(
                f"{type(pipeline).__name__} needs a scheduler of a flow (prediction_type 'flow_prediction' and "
                f"use_flow_sigmas); got prediction_type={config.prediction_type!r} and "
                f"use_flow_sigmas={config.use_flow_sigmas}. Load the pipeline with its own scheduler; the student gets "
                "one that suits it."
            )
        self._instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return self.encode(prompts, complex_human_instruction=self._instruction)

    def encode_no_prompt(self) -> Condition:
        return self.encode([""])

    def base_shift(self, shape: Sequence[int]) -> float | None:
        scheduler = self.pipeline.scheduler
        shift: float = scheduler.config[SHIFTS[type(scheduler).__name__]]
        return shift

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Return the noise levels `[N]` on the transformer's own scale."""
        scale: float = self.backbone.config.timestep_scale
        return super().timesteps(sigma) * scale

    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return self.predict_at(network, role, x_t, self.timesteps(sigma), condition)

    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(self.device, vae.dtype)).latent  # nothing to sample
        return self.from_vae(latents.float())
