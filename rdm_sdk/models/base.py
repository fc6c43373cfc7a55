"""The protocol behind which every diffusers family looks alike."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rdm_sdk.core.noise import NoiseSchedule, Prediction, to_x_0
from rdm_sdk.errors import ConfigError
from rdm_sdk.models.roles import Roles
from rdm_sdk.types import Condition, Denoiser

Network = Callable[..., Tensor]
"""`(role, **backbone inputs) -> prediction`, as `Roles` does it."""


class ModelAdapter(ABC):
    """One family of diffusers pipelines: the only place that knows its timesteps, conditions and latents.

    Everything outside speaks of `sigma` and of denoisers `(x_t, sigma) -> x_0`.
    """

    component: str
    """The pipeline's component that is trained, such as "transformer"."""
    lora_targets: tuple[str, ...]
    schedule: NoiseSchedule
    prediction: Prediction

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.backbone: Any = getattr(pipeline, self.component)
        self.roles = Roles(self.backbone)
        for part in self.frozen_parts():
            part.requires_grad_(False).eval()

    @property
    def base_name(self) -> str:
        """The hub id or path that the pipeline was loaded from."""
        return str(self.pipeline.config.get("_name_or_path") or type(self.pipeline).__name__)

    def frozen_parts(self) -> list[nn.Module]:
        """Return the pipeline's other modules: VAE and text encoders."""
        parts = self.pipeline.components.values()
        return [part for part in parts if isinstance(part, nn.Module) and part is not self.backbone]

    def to(self, device: torch.device) -> None:
        """Move backbone, VAE and text encoders."""
        self.pipeline.to(device)

    def fingerprint(self) -> str:
        """Return a hash of the base's shapes and of samples of its weights, to recognize it on resume."""
        digest = hashlib.sha256()
        for name, parameter in self.backbone.named_parameters():
            if "lora_" not in name:
                sample = parameter.detach().flatten()[:16].float().cpu()
                digest.update(f"{name.replace('.base_layer', '')}{list(parameter.shape)}".encode())
                digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts as the family's pipeline would; each tensor `[N, ...]`."""

    @abstractmethod
    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Return the shape of one latent for an image size in pixels, None meaning the model's default.

        Raises:
            ConfigError: the size does not divide as the family needs.
        """

    @abstractmethod
    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Run the backbone as `role` and return its raw prediction `[N, *x]`."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[N, *x]` to RGB images `[N, 3, H, W]` in [0, 1], differentiable."""

    @abstractmethod
    def student_scheduler(self, num_steps: int, shift: float | None) -> Any:
        """Return the diffusers scheduler that samples the student: re-noising, on the grid it is trained on."""

    @abstractmethod
    def inference_call(self, num_steps: int) -> str:
        """Return the arguments, as Python source, with which a plain pipeline call samples the student."""

    @abstractmethod
    def save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write LoRA weights with their metadata in the format that the pipeline's `load_lora_weights` reads."""

    def student_sigmas(self, num_steps: int, shift: float | None) -> list[float]:
        """Return the student's grid of noise levels, largest first, without the final zero."""
        scheduler = self.student_scheduler(num_steps, shift)
        scheduler.set_timesteps(num_steps)
        sigmas: list[float] = scheduler.sigmas[:-1].tolist()
        if len(sigmas) != num_steps or not all(a > b > 0 for a, b in pairwise(sigmas)):
            raise ConfigError(
                f"num_inference_steps={num_steps} with shift={shift} gives no falling grid of noise levels: {sigmas}"
            )
        return sigmas

    def denoiser(
        self,
        network: Network,
        role: str,
        condition: Condition,
        unconditional: Condition | None = None,
        guidance_scale: float = 1.0,
    ) -> Denoiser:
        """Return `(x_t, sigma) -> x_0` (float32) for a role, its condition closed over.

        With `guidance_scale` s other than 1, x_0 is `uncond + s (cond - uncond)`, both from one forward pass.
        """

        def conditional(x_t: Tensor, sigma: Tensor) -> Tensor:
            prediction = self.predict(network, role, x_t, sigma, condition)
            return to_x_0(self.schedule, self.prediction, prediction.float(), x_t.float(), sigma.float())

        if guidance_scale == 1.0:
            return conditional
        if unconditional is None:
            raise ConfigError(f"guidance_scale={guidance_scale} needs the condition of the empty prompt")
        both = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}

        def guided(x_t: Tensor, sigma: Tensor) -> Tensor:
            twice, sigmas = torch.cat([x_t, x_t]), torch.cat([sigma, sigma])
            prediction = self.predict(network, role, twice, sigmas, both)
            x_0 = to_x_0(self.schedule, self.prediction, prediction.float(), twice.float(), sigmas.float())
            without, with_prompt = x_0.chunk(2)
            return without + guidance_scale * (with_prompt - without)

        return guided
