"""The protocol behind which every diffusers family looks alike."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.compiled import compiled_in_place
from rdm_sdk.families.encodings import encoded
from rdm_sdk.families.features import block_output
from rdm_sdk.families.fingerprint import fingerprint
from rdm_sdk.families.finite import check_decoded
from rdm_sdk.families.lora_files import fold_scale
from rdm_sdk.families.roles import STUDENT, Roles, StepEmbedding
from rdm_sdk.families.targets import check_bare, target_names, with_targets
from rdm_sdk.method.matching import classifier_free_guidance
from rdm_sdk.method.noise import NoiseSchedule, Prediction, to_x_0
from rdm_sdk.types import Condition, Denoiser

Network = Callable[..., Tensor]
"""`(role, **backbone inputs) -> prediction`, as `Roles` does it."""

Guidance = Literal["classifier-free", "embedded", "none"]
"""How a family follows its prompts harder: by two passes, by a scale that the backbone is told, or not at all."""


class ModelFamily(ABC):
    """One family of diffusers pipelines: the only place that knows its timesteps, conditions and latents.

    Everything outside speaks of `sigma` and of denoisers `(x_t, sigma) -> x_0`.

    Args:
        pipeline: the loaded pipeline.

    Raises:
        ModelError: the pipeline lacks one of the components in `required`, or has adapters already.
    """

    component: str
    """The pipeline's component that is trained, such as "transformer"."""
    required: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    """What the pipeline must have besides; loaders leave parts out when they are told to."""
    lora_excluded: tuple[str, ...] = ()
    """Endings of the names of layers that are no `lora_targets`: those whose adapters would never learn, or would not
    survive the export."""
    schedule: NoiseSchedule
    prediction: Prediction
    guidance: Guidance = "classifier-free"
    call_length: int = 0
    """Tokens per prompt in a pipeline call that does not say `max_sequence_length`; 0 where it has no such argument."""
    max_sequence_length: int = 0
    """Tokens per prompt in this run."""
    masks: tuple[tuple[str, str], ...] = ()
    """Tensors of the condition `[N, tokens, ...]`, each with the mask `[N, tokens]` that hides its padding."""
    no_checkpointing: str = ""
    """Why the backbone's blocks must not be run again in the backward pass, as for people; empty where they may."""

    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        missing = [name for name in (self.component, *self.required) if getattr(pipeline, name, None) is None]
        if missing:
            raise ModelError(
                f"this {type(pipeline).__name__} has no {' and no '.join(missing)}, which training needs; load the "
                f"pipeline without {', '.join(f'{name}=None' for name in missing)}"
            )
        check_bare(pipeline.components)
        self.max_sequence_length = self.call_length if max_sequence_length is None else max_sequence_length
        self.pipeline = pipeline
        self.backbone: Any = compiled_in_place(pipeline, self.component)
        dtype = self.backbone.dtype
        self._typical = next((p for p in self.backbone.parameters() if p.dtype == dtype), torch.empty(0, dtype=dtype))
        self.device = torch.device("cpu")
        """Where encoders, backbone and VAE work."""
        self.roles = Roles(self.backbone, self.no_checkpointing)
        for part in self.frozen_parts().values():
            part.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone takes its inputs in. (To ask the backbone is to walk through its modules every time.)"""
        return self._typical.dtype

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names, or endings of names, of the layers that get adapters unless a LoRA config names its own.

        Every linear and convolution layer of the backbone: a few-step student meets noise levels and predictions that
        the base never had to make, so what tells the network its noise level (time embedders, modulation), and what
        leads into and out of its blocks, must move as well as attention. The names are the same whether the backbone
        has adapters already or not.
        """
        return target_names(self.backbone, self.lora_excluded)

    @property
    def base_name(self) -> str:
        """The hub id or path that the pipeline was loaded from."""
        return str(self.pipeline.config.get("_name_or_path") or type(self.pipeline).__name__)

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Return the pipeline's other modules by name: VAE and text encoders."""
        parts = self.pipeline.components.items()
        return {name: part for name, part in parts if isinstance(part, nn.Module) and part is not self.backbone}

    def text_encoders(self) -> dict[str, nn.Module]:
        """Return the modules that only `encode_prompts` needs, by the names of their components."""
        return {name: part for name, part in self.frozen_parts().items() if name.startswith("text_encoder")}

    def to(self, device: torch.device) -> None:
        """Let backbone, VAE and text encoders work on a device.

        What was quantized or spread over devices when it was loaded stays where it is, and what is offloaded waits for
        its use.
        """
        self.device = device
        for part in (self.roles, *self.frozen_parts().values()):
            network = self.backbone if part is self.roles else part
            marks = ("hf_device_map", "hf_quantizer", "_hf_hook")
            if all(getattr(network, mark, None) is None for mark in marks):
                part.to(device)

    def add_roles(
        self,
        configs: Mapping[str, LoraConfig | None],
        heads: Mapping[str, nn.Module] | None = None,
        steps_told: int = 0,
    ) -> None:
        """Add trained roles to the base: LoRA adapters, full copies of it and heads.

        Args:
            configs: role to its LoRA, on `lora_targets` unless it names other layers; None is a full copy.
            heads: role to a module that is neither adapter nor copy.
            steps_told: K, if the critics among `configs` are told the student's step; 0 if not.

        Raises:
            ConfigError: the base has roles already, or a config's targets match nothing.
            ModelError: another trainer has added its own to this pipeline.
        """
        if self.roles.trainable_roles:
            raise ConfigError("this model already has trainable roles from another trainer; load it afresh")
        check_bare(self.pipeline.components)  # again: another family may have been made of the same pipeline
        # Before adapters are put into the base.
        copies = {role: copy.deepcopy(self.roles.backbone) for role, config in configs.items() if config is None}
        for role, config in configs.items():
            if config is None:
                self.roles.add_copy(role, copies[role])
            else:
                self.roles.add_role(role, with_targets(config, self.lora_targets, self.backbone))
            if steps_told and role != STUDENT:
                self.roles.add_step_embedding(role, StepEmbedding(steps_told, self.example_encoding(1)))
        for role, head in (heads or {}).items():
            self.roles.add_head(role, head)

    def fingerprint(self) -> str:
        """Return a hash of the base's shapes and of samples of its weights, to recognize it on resume."""
        return fingerprint(self.backbone)

    # ---- Prompts ------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode prompts as the family's pipeline would; each tensor `[N, ...]`, on `self.device`.

        Shapes must not depend on the prompts, so that rows of different calls can be stacked: texts of several lengths
        are padded to one length and come with a mask.
        """

    def encode_no_prompt(self) -> Condition:
        """Return what the family's pipeline takes where there is no (negative) prompt, one row `[1, ...]`."""
        return self.encode_prompts([""])

    def example_encoding(self, count: int) -> Condition:
        """Return what `encode_prompts` returns for `count` prompts that are as long as they can be, encoding nothing.

        Shapes and dtypes count, values do not, except those of masks: ones, on the CPU. `rdm-sdk plan` runs the
        backbone with it when there are configs and no weights, and what tells critics the step is made for its shapes.

        Raises:
            ModelError: the family names none; then it cannot be planned, nor its critics told the step.
        """
        raise ModelError(
            f"{type(self).__name__} names no example_encoding(count), which rdm-sdk plan and matching='step' need; "
            "write it"
        )

    def condition(self, prompts: Sequence[str | None], guidance_scale: float = 1.0) -> Condition:
        """Return everything that the backbone is told beside x_t and its noise level, `[N, ...]`; one batch of prompts.

        Args:
            prompts: N prompts; None is no prompt.
            guidance_scale: where the backbone is told it (`guidance` is "embedded"), it becomes a part: "guidance".
        """
        condition = encoded(prompts, self.encode_prompts, self.encode_no_prompt)
        if self.guidance == "embedded":
            condition["guidance"] = torch.full((len(prompts),), guidance_scale, device=self.device)
        return condition

    # ---- Sizes --------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the base was made for."""

    @property
    @abstractmethod
    def size_unit(self) -> int:
        """Height and width in pixels must be multiples of this."""

    @property
    def latent_channels(self) -> int:
        return int(self.backbone.config.in_channels)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Return the shape of one latent, `[C, h, w]`, for an image size in pixels, None meaning the model's default.

        Raises:
            ConfigError: the size does not divide as the family needs.
        """
        height = self.default_size[0] if height is None else height
        width = self.default_size[1] if width is None else width
        if height <= 0 or width <= 0 or height % self.size_unit or width % self.size_unit:
            raise ConfigError(
                f"height and width must be positive multiples of {self.size_unit} for {self.base_name!r}; got "
                f"{height} x {width}"
            )
        factor = self.pipeline.vae_scale_factor
        return (self.latent_channels, height // factor, width // factor)

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents `[N, C, h, w]` as the pipeline's own `latents=` argument takes them."""
        return latents

    # ---- The backbone -------------------------------------------------------------------------------------------

    @abstractmethod
    def predict(self, network: Network, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Run the backbone as `role` and return its raw prediction `[N, *x]`."""

    def guide(self, x_t: Tensor, sigma: Tensor, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        """Return the guided x_0 `[N, *x]` of the two predictions of x_0, in the family's own form.

        Args:
            x_t: `[N, *x]`, what the predictions were made at.
            sigma: `[N]`, its noise level.
            with_prompt: x_0 `[N, *x]`.
            without: x_0 `[N, *x]`.
            scale: 1 is none.
        """
        return classifier_free_guidance(with_prompt, without, scale)

    # ---- The VAE ------------------------------------------------------------------------------------------------

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `[N, *x]` to RGB images `[N, 3, H, W]` in [0, 1], differentiable."""
        vae = self.pipeline.vae
        images: Tensor = vae.decode(self.to_vae(latents).to(vae.dtype), return_dict=False)[0]
        check_decoded(images, latents, vae)  # before infinity becomes 1
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """Encode RGB images `[N, 3, H, W]` in [0, 1] to latents `[N, *x]`: the inverse of `decode`."""
        vae = self.pipeline.vae
        with torch.no_grad():
            latents: Tensor = vae.encode((images * 2 - 1).to(self.device, vae.dtype)).latent_dist.mode()
        return self.from_vae(latents.float())

    def to_vae(self, latents: Tensor) -> Tensor:
        """Return latents as the VAE decodes them: not normalized."""
        config = self.pipeline.vae.config
        unscaled: Tensor = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return unscaled

    def from_vae(self, latents: Tensor) -> Tensor:
        """Return the VAE's own latents as the backbone knows them: the inverse of `to_vae`."""
        config = self.pipeline.vae.config
        scaled: Tensor = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
        return scaled

    # ---- The student in plain diffusers -------------------------------------------------------------------------

    @abstractmethod
    def student_scheduler(self, num_steps: int, shift: float | None, stochastic: bool = True) -> Any:
        """Return the diffusers scheduler that samples the student on the grid it is trained on.

        Args:
            num_steps: K.
            shift: timestep shift of the grid, None for the base scheduler's.
            stochastic: re-noise after each step; otherwise take the deterministic step.
        """

    def base_shift(self, shape: Sequence[int]) -> float | None:
        """Return the shift of the base's own grid for latents of a shape `[C, h, w]`, None if the family has none."""
        return None

    def set_grid(self, scheduler: Any, num_steps: int) -> None:
        """Set the scheduler's timesteps as the family's pipeline call does."""
        scheduler.set_timesteps(num_steps)

    def guidance_call(self, scale: float) -> dict[str, Any]:
        """Return the arguments by which a plain pipeline call is guided by `scale`, 1 being none."""
        return {"guidance_scale": scale}

    def inference_call(self, num_steps: int, guidance_scale: float = 1.0) -> dict[str, Any]:
        """Return the arguments with which a plain pipeline call samples the student, beside prompt and size.

        Args:
            num_steps: K.
            guidance_scale: that of the training run; only a backbone that is told the scale is still told it.
        """
        told = guidance_scale if self.guidance == "embedded" else 1.0
        length = self.max_sequence_length
        lengths = {} if length == self.call_length else {"max_sequence_length": length}
        return {"num_inference_steps": num_steps, **self.guidance_call(told), **lengths}

    def save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write LoRA weights with their metadata in the format that the pipeline's `load_lora_weights` reads.

        The scale is in the weights, so that programs which read no metadata get the same student.
        """
        state, metadata = fold_scale(state, metadata)
        layers = {f"{self.component}_lora_layers": state, f"{self.component}_lora_adapter_metadata": metadata}
        type(self.pipeline).save_lora_weights(directory, **layers)

    @property
    def loading_code(self) -> str:
        """The model card's lines that load what was exported to `folder` into a plain pipeline `pipe`."""
        return "pipe.load_lora_weights(folder)"

    def student_sigmas(self, num_steps: int, shift: float | None) -> list[float]:
        """Return the student's grid of noise levels, largest first, without the final zero."""
        scheduler = self.student_scheduler(num_steps, shift)
        self.set_grid(scheduler, num_steps)
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

        They are what the backbone's middle block makes of the image, for heads such as a discriminator's.
        """

        def extract(x_t: Tensor, sigma: Tensor) -> Tensor:
            return block_output(self.backbone, self.feature_block(), self.predict, network, role, x_t, sigma, condition)

        return extract

    def feature_block(self) -> nn.Module:
        """Return the block whose output, or the last of its outputs, is the image's features.

        They are `[N, tokens, feature_width]` or a map `[N, feature_width, h, w]`.

        Raises:
            ModelError: the family names none; then rewards with a head cannot be used with it.
        """
        raise ModelError(f"{type(self).__name__} names no feature_block()")

    @property
    def feature_width(self) -> int:
        """How many channels the features have."""
        raise ModelError(
            f"{type(self).__name__} names no feature_block() and feature_width, which a reward with a head on the "
            "teacher's features needs; write both to use one"
        )
