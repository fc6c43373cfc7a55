"""Several roles on one set of base weights.

The teacher is the base with every adapter off; "student", "fake" and any other role are LoRA adapters. The base is held
once, whatever the number of roles. For full fine-tuning a role is a copy of the base instead. A reward may also bring a
role that is neither but a module, such as a discriminator's head.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftType, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdm_sdk.errors import ConfigError, ModelError
from rdm_sdk.families.targets import last_names
from rdm_sdk.types import Condition

TEACHER = "teacher"
STUDENT = "student"
"""The role that is distilled and exported."""
AVERAGE = "ema"
"""What the names of the moving average's tensors begin with in a checkpoint, among those of the roles."""
TOLD = "step_embedding."
"""What the names of a step embedding's parameters begin with, among its role's."""

# LoRA options that would change the base (then "adapters off" is no longer the teacher), make a role's forward random
# (then a replay differs from its rollout), or cannot be exported to diffusers. Option -> (allowed values, why).
_RESTRICTED: dict[str, tuple[tuple[object, ...], str]] = {
    "bias": (("none",), "it trains biases of the base, which the teacher shares"),
    "modules_to_save": ((None, []), "it copies and trains modules of the base, which the teacher shares"),
    "init_lora_weights": (
        (True, "gaussian", "orthogonal"),
        "other initializations rewrite the base weights or start away from the teacher",
    ),
    "lora_dropout": ((0, 0.0), "a rollout must be replayed exactly"),
    "use_dora": ((False,), "its export has not been verified"),
    "lora_bias": ((False,), "its export has not been verified"),
    "layer_replication": ((None,), "it changes the base's layers"),
    "trainable_token_indices": ((None,), "it trains embeddings of the base"),
    "target_parameters": ((None, []), "adapters on bare parameters cannot be switched off safely"),
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        ((None, {}), "it is for an initialization that starts away from the teacher"),
    ),
    **dict.fromkeys(
        ("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "alora_invocation_tokens"),
        ((None,), "it makes adapters of another kind, whose export has not been verified"),
    ),
    **dict.fromkeys(
        ("use_qalora", "ensure_weight_tying", "fan_in_fan_out"),
        ((False,), "it is for layers that these networks do not have, or its export has not been verified"),
    ),
    "megatron_config": ((None,), "the base is no model of Megatron's"),
}


def check_lora_config(config: LoraConfig, argument: str = "peft_config") -> None:
    """Raise `ConfigError` for adapters that are no LoRA, and for options that would change the base or a replay."""
    kind = getattr(config, "peft_type", None)
    if not isinstance(config, LoraConfig) or kind != PeftType.LORA:
        raise ConfigError(
            f"{argument} must be a peft.LoraConfig; got {type(config).__name__}, whose adapters could not be exported"
        )
    for option, (allowed, reason) in _RESTRICTED.items():
        value = getattr(config, option, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ConfigError(f"{argument}.{option}={value!r} cannot be used: {reason}. Use {choices}.")


def describe_lora(config: LoraConfig) -> str:
    """Return the settings that decide what LoRA weights mean, for people and for comparison."""
    parts: dict[str, object] = {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}
    parts |= {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    return ", ".join(f"{name} {value}" for name, value in parts.items() if value or name in ("rank", "alpha"))


class StepEmbedding(nn.Module):
    """Tells a critic which of the student's steps made a sample: a learned vector per step, added to the condition.

    Without it, one critic learns the mixture of all steps' samples, and matching that mixture lets late steps make up
    for early ones instead of matching the teacher themselves. The vectors start at zero, where nothing is told yet.

    Args:
        num_steps: K, the student's steps.
        condition: an encoding as the family makes it, of any number of prompts; every part with a vector per prompt or
            token (`[N, ..., C]`) gets a vector per step, `[K, C]`; masks and a guidance scale get none.
    """

    def __init__(self, num_steps: int, condition: Condition) -> None:
        super().__init__()
        self.vectors = nn.ParameterDict(
            {
                name: nn.Parameter(torch.zeros(num_steps, part.shape[-1]))
                for name, part in condition.items()
                if part.is_floating_point() and part.ndim > 1
            }
        )

    def forward(self, condition: Condition, steps: Tensor) -> Condition:
        """Return the condition `[N, ...]` with the vectors of steps (int64 `[N]`) added."""
        told = dict(condition)
        for name, vectors in self.vectors.items():
            part = condition[name]
            # In float32 before the sum is rounded: a half-precision vector could not take small updates.
            added = vectors[steps].reshape(len(steps), *[1] * (part.ndim - 2), -1)
            told[name] = (part + added).to(part.dtype)
        return told


class Roles(nn.Module):
    """A frozen backbone with switchable LoRA roles; `roles(role, **inputs)` runs it as that role.

    Switching sets the adapter layers' own flags and never touches `requires_grad`. (PEFT's `set_adapter` and
    `disable_adapters` do, and a toggle between a forward and its backward then silently loses the gradient.)
    """

    def __init__(self, backbone: nn.Module, no_checkpointing: str = "") -> None:
        super().__init__()
        self.no_checkpointing = no_checkpointing
        """Why blocks must not be run again in the backward pass; empty where they may."""
        self.backbone = backbone.requires_grad_(False).eval()
        self.forwards: Counter[str] = Counter()
        """Network evaluations so far, in samples, per role."""
        self.sharded = False
        """Whether the backbone is shared out between processes, which then have to run it together."""
        self._role = TEACHER
        self._names: list[str] = []
        """Names of the roles that can denoise, in the order in which they were added."""
        self.copies = nn.ModuleDict()
        """Roles that are full copies of the backbone."""
        self.heads = nn.ModuleDict()
        """Roles that are separate modules."""
        self.step_embeddings = nn.ModuleDict()
        """What tells a critic the student's step, by the critic's role; trained and saved with it."""
        self._layers: list[BaseTunerLayer] = []
        self._places: dict[str, list[tuple[str, nn.Module, str]]] = {}
        """Where an adapter's parameters are: name, module, name in the module. Finding them is a walk through all."""
        placed = getattr(backbone, "hf_device_map", None)
        if placed is not None:  # the base is spread over devices, and Trainer must leave it there
            self.hf_device_map: dict[str, Any] = placed

    def train(self, mode: bool = True) -> Roles:
        """Set the flag for Trainer's sake; the backbone itself stays in evaluation mode."""
        self.training = mode
        return self

    def add_role(self, name: str, config: LoraConfig) -> None:
        """Add a LoRA adapter as a role; its parameters are float32 and trainable."""
        self._check_new(name)
        try:
            with warnings.catch_warnings():  # PEFT warns of a second adapter, which is the point here
                warnings.filterwarnings("ignore", "Already found a `peft_config`")
                inject_adapter_in_model(config, self.backbone, adapter_name=name)
        except ValueError as error:
            linear = ", ".join(last_names(self.backbone))
            raise ConfigError(f"cannot add LoRA adapters: {error} Linear layers of this model: {linear}") from error
        self._names.append(name)
        self._layers = [module for module in self.backbone.modules() if isinstance(module, BaseTunerLayer)]
        self._places[name] = [
            (f"{path}.{leaf}", module, leaf)
            for path, module in self.backbone.named_modules()
            for leaf, _ in module.named_parameters(recurse=False)
            if re.search(rf"\.lora_\w+\.{name}\.", f".{path}.{leaf}.")
        ]
        for role in self._names:  # adding an adapter freezes the ones before it
            for parameter in self.parameters_of(role).values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self._switch(TEACHER)

    def add_copy(self, name: str, module: nn.Module) -> None:
        """Add a copy of the backbone, made before it got any adapters, as a role; it is trained whole, in float32."""
        self._check_new(name)
        self.copies[name] = module.float().requires_grad_(True)
        self._names.append(name)

    def add_head(self, name: str, module: nn.Module) -> None:
        """Add a module as a role: it is trained and saved as the others are, and `forward` does not run it."""
        self._check_new(name)
        self.heads[name] = module.float().requires_grad_(True)

    def add_step_embedding(self, name: str, embedding: StepEmbedding) -> None:
        """Let a role be told the student's step; the embedding counts among its parameters."""
        self.step_embeddings[name] = embedding.float().requires_grad_(True)

    def tell(self, role: str, condition: Condition, steps: Tensor | None) -> Condition:
        """Return what a role is told: the condition, with the student's steps (int64 `[N]`) if the role is told them.

        None for `steps` is for roles that are told none.
        """
        if role not in self.step_embeddings:
            return condition
        if steps is None:
            raise ConfigError(f"the role {role!r} is told the student's step, and none is given for these samples")
        told: Condition = self.step_embeddings[role](condition, steps)
        return told

    def _check_new(self, name: str) -> None:
        if name == TEACHER or name in self.trainable_roles:
            raise ConfigError(f"there is already a role {name!r}")
        parts = {part for path, _ in self.backbone.named_modules() for part in path.split(".")}
        if not name.isidentifier() or name in parts or name == AVERAGE:
            raise ConfigError(
                f"a role cannot be called {name!r}: it must be one word, other than {AVERAGE!r}, and not the name of a "
                "module in the base's backbone, because weights are found by it; choose another for Capabilities.trains"
            )

    @property
    def denoising_roles(self) -> tuple[str, ...]:
        """The trained roles that are networks: LoRA adapters and copies."""
        return tuple(self._names)

    @property
    def trainable_roles(self) -> tuple[str, ...]:
        return (*self._names, *self.heads)

    def parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """Return a role's parameters by name, those of its step embedding included."""
        told = {f"{TOLD}{name}": parameter for name, parameter in self.embedding_parameters_of(role).items()}
        network = self._own_module(role)
        if network is not None:
            return dict(network.named_parameters()) | told
        if role not in self._names:
            raise ConfigError(f"no role {role!r}; there are {', '.join([TEACHER, *self.trainable_roles])}")
        return {name: getattr(module, leaf) for name, module, leaf in self._places[role]} | told

    def embedding_parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """Return the parameters of a role's step embedding by name; none where it is told no step."""
        return dict(self.step_embeddings[role].named_parameters()) if role in self.step_embeddings else {}

    def role_state_dict(self, role: str) -> dict[str, Tensor]:
        """Return a role's weights (an adapter's with PEFT's names), detached and on CPU."""
        network = self._own_module(role)
        if network is not None:
            state: dict[str, Tensor] = network.state_dict()
        else:
            state = get_peft_model_state_dict(self.backbone, adapter_name=role)
        state = state | {f"{TOLD}{name}": tensor for name, tensor in self.embedding_parameters_of(role).items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def load_role_state_dict(self, role: str, state: dict[str, Tensor]) -> None:
        """Load what `role_state_dict` returned; raises `ModelError` unless names and shapes agree exactly."""
        present = self.role_state_dict(role)
        if present.keys() != state.keys():
            odd = sorted(present.keys() ^ state.keys())
            raise ModelError(
                f"weights for role {role!r} do not fit: {len(odd)} names differ, first {odd[0]!r}; "
                "was the run started with other LoRA targets or another base model?"
            )
        for name, tensor in state.items():
            if present[name].shape != tensor.shape:
                raise ModelError(
                    f"weights for role {role!r} do not fit: {name} has shape {list(tensor.shape)}, this run's has "
                    f"{list(present[name].shape)}; was the run started with another LoRA rank?"
                )
        told = {name.removeprefix(TOLD): tensor for name, tensor in state.items() if name.startswith(TOLD)}
        if told:
            self.step_embeddings[role].load_state_dict(told)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(TOLD)}
        module = self._own_module(role)
        if module is not None:
            module.load_state_dict(state)
        else:
            set_peft_model_state_dict(self.backbone, state, adapter_name=role)

    def describe(self, role: str) -> str:
        """Return what a role's weights only mean something with, for people and for comparison."""
        if role in self.heads:
            return str(self.heads[role])
        vectors = next(iter(self.embedding_parameters_of(role).values()), None)
        told = "" if vectors is None else f", told which of {len(vectors)} steps made a sample"
        return ("a full copy of the base" if role in self.copies else describe_lora(self.lora_config(role))) + told

    def _own_module(self, role: str) -> nn.Module | None:
        """Return the module that a role is, None for an adapter."""
        return dict([*self.copies.items(), *self.heads.items()]).get(role)

    def lora_config(self, role: str) -> LoraConfig:
        """Return the role's LoRA configuration, with its targets as found in this model."""
        configs: Any = self.backbone.peft_config
        config: LoraConfig = configs[role]
        return config

    def use(self, role: str) -> AbstractContextManager[None]:
        """Return a context that activates a role for the duration of a block; it may be entered again."""
        return _Use(self, role)

    def _switch(self, role: str) -> None:
        if role not in (TEACHER, *self._names):
            raise ConfigError(f"no role {role!r}; there are {', '.join([TEACHER, *self._names])}")
        active = [] if role == TEACHER else [role]  # a copy has no adapter in any layer
        for layer in self._layers:
            # Past nn.Module's __setattr__: SDXL has 560 of these layers, and switches twice per recomputed block.
            object.__setattr__(layer, "_disable_adapters", not active)
            object.__setattr__(layer, "_active_adapter", active)
        self._role = role

    def forward(self, role: str, **inputs: Any) -> Tensor:
        """Run the backbone as `role`; returns its first output."""
        self.forwards[role] += next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor))
        # A copy's weights are float32, while its inputs have the base's dtype. Elsewhere there is no context at all: a
        # disabled autocast would switch off the one of a bf16 run.
        base = next(self.backbone.parameters())
        mixed = role in self.copies and base.dtype != torch.float32
        network = dict(self.copies.items()).get(role, self.backbone)
        with self.use(role), torch.autocast(base.device.type, base.dtype) if mixed else nullcontext():
            output: Tensor = network(**inputs, return_dict=False)[0]
        return output

    def check_recomputing(self) -> None:
        """Raise `ModelError` if activations cannot be recomputed in the backward pass."""
        name = type(self.backbone).__name__
        why = self.no_checkpointing and f"the blocks of {name} must not be run again: {self.no_checkpointing}"
        if not why and not getattr(self.backbone, "_supports_gradient_checkpointing", False):
            why = f"{name} does not support gradient checkpointing"
        if why:
            raise ModelError(f"activation_checkpointing=True: {why}; leave it off")

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Recompute activations in the backward pass, each block under the role its forward ran as.

        Without that, the replay would run as whatever role happens to be active then: wrong gradients, silently.

        Raises:
            ModelError: the backbone cannot, or its family says that it must not.
        """
        self.check_recomputing()
        networks: list[Any] = [self.backbone, *self.copies.values()]
        for network in networks:
            network.enable_gradient_checkpointing(self._recomputed)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def _recomputed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block, and once more in the backward pass; in a compiled network the role is part of the graph."""
        if torch.compiler.is_compiling():
            return checkpoint(block, *inputs, use_reentrant=False)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=self._checkpoint_contexts)

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.use(self._role)  # a block's forward runs within its role's


class _Use(AbstractContextManager[None]):
    """A role in use. A graph that is walked twice, for two rewards that tilt, recomputes its blocks under it twice."""

    def __init__(self, roles: Roles, role: str) -> None:
        self.roles, self.role = roles, role
        self.before: list[str] = []

    def __enter__(self) -> None:
        self.before.append(self.roles._role)
        self.roles._switch(self.role)

    def __exit__(self, *error: object) -> None:
        self.roles._switch(self.before.pop())


def check_finite(module: nn.Module, name: str) -> None:
    """Raise `ModelError` if any parameter of a module is NaN or infinite."""
    for parameter_name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"the {name} holds NaN or infinite weights, first in {parameter_name!r}: the file is damaged, or the "
                "weights overflowed when they were cast (try another dtype)"
            )
