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
from rdm_sdk.errors import ConfigError, ModelError
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
    def student_scheduler(self, num_steps: int, shift: float | None, stochastic: bool = True) -> Any:
        """Return the diffusers scheduler that samples the student on the grid it is trained on.

        Args:
            num_steps: K.
            shift: timestep shift of the grid, None for the base scheduler's.
            stochastic: re-noise after each step; otherwise take the deterministic step.
        """

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

    def denoiser(self, network: Network, role: str, condition: Condition) -> Denoiser:
        """Return `(x_t, sigma) -> x_0` (float32) for a role, its condition closed over."""

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            prediction = self.predict(network, role, x_t, sigma, condition)
            return to_x_0(self.schedule, self.prediction, prediction.float(), x_t.float(), sigma.float())

        return denoise

    def denoiser_pair(
        self, network: Network, role: str, condition: Condition, unconditional: Condition
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return `(x_t, sigma) -> (x_0 with the prompt, x_0 without)`, both from one forward pass."""
        both = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}
        denoise = self.denoiser(network, role, both)

        def denoise_pair(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            without, with_prompt = denoise(torch.cat([x_t, x_t]), torch.cat([sigma, sigma])).chunk(2)
            return with_prompt, without

        return denoise_pair

    def features(self, network: Network, role: str, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """Return `(x_t, sigma) -> features [N, tokens, feature_width]` (float32), differentiable in `x_t`.

        They are what the backbone's middle block says of the image, for heads such as a discriminator's.
        """

        def extract(x_t: Tensor, sigma: Tensor) -> Tensor:
            seen: list[Tensor] = []

            def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
                found = output if isinstance(output, Tensor) else output[-1]
                seen.append(found.flatten(2).transpose(1, 2) if found.ndim == 4 else found)

            handle = self.feature_block().register_forward_hook(keep)
            try:
                self.predict(network, role, x_t, sigma, condition)
            finally:
                handle.remove()
            return seen[0].float()

        return extract

    def feature_block(self) -> nn.Module:
        """Return the block whose output, or the last of its outputs, is the image's features.

        They are `[N, tokens, feature_width]` or a map `[N, feature_width, h, w]`.

        Raises:
            ModelError: the family names none; then rewards with a head of their own cannot be used with it.
        """
        raise ModelError(f"{type(self).__name__} names no feature_block()")

    @property
    def feature_width(self) -> int:
        """How many channels the features have."""
        raise ModelError(
            f"{type(self).__name__} names no feature_block() and feature_width, which a reward with a head on the "
            "teacher's features needs; write both to use one"
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode RGB images `[N, 3, H, W]` in [0, 1] to latents `[N, *x]`: the inverse of `decode`.

        Raises:
            ModelError: the family's adapter cannot; then rewards that learn from real images cannot be used with it.
        """
        raise ModelError(f"{type(self).__name__} has no encode_images, which a reward that learns from images needs")
