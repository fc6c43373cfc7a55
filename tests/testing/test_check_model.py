"""The contract kit for model families: the SDK's nine families pass it, and every check catches what it is for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY_PIPELINES
from torch import Tensor, nn

from rdm_sdk import ModelError, ModelFamily
from rdm_sdk.families.roles import TEACHER
from rdm_sdk.families.sd3 import SD3Family
from rdm_sdk.families.z_image import ZImageFamily
from rdm_sdk.testing import MODEL_CHECKS, ModelCheckError, check_model, parametrize_model_checks
from rdm_sdk.testing.family_subject import ModelSubject, compare_with_the_pipeline
from rdm_sdk.testing.kit import CheckResult, Kit, run_checks
from rdm_sdk.types import Condition

# Diffusers' Euler scheduler under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
tiny_sd3 = partial(TINY_PIPELINES["StableDiffusion3Pipeline"], num_layers=2)  # the last has no text to update


@pytest.mark.parametrize("kind", sorted(TINY_PIPELINES))
def test_every_family_keeps_the_contract(kind: str) -> None:
    """No check fails, and none is left out but guidance where a family has none of two passes."""
    results = check_model(TINY_PIPELINES[kind])
    left_out = ["guides_as_the_pipeline"] if kind == "FluxPipeline" else []
    assert [result.name for result in results if result.status != "passed"] == left_out
    assert len(results) == len(MODEL_CHECKS) == 21


# ---- Planted faults ---------------------------------------------------------------------------------------------


class UnknownTarget(SD3Family):
    lora_targets = ("attn.to_q", "attn.to_x")


class AttentionAlone(SD3Family):
    """What style LoRAs adapt."""

    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj")


class UnknownExclusion(SD3Family):
    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        self.lora_excluded = (*self.lora_excluded, "attn.to_x")


class UnpaddedPrompts(SD3Family):
    def encode_prompts(self, prompts: list[str]) -> Condition:
        encoded = super().encode_prompts(prompts)
        longest = max(len(prompt) for prompt in prompts)
        return encoded | {"encoder_hidden_states": encoded["encoder_hidden_states"][:, :longest]}


class OddNoPrompt(SD3Family):
    def encode_no_prompt(self) -> Condition:
        return {name: tensor.double() for name, tensor in super().encode_no_prompt().items()}


class AnySize(SD3Family):
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        height, width = height or self.default_size[0], width or self.default_size[1]
        return (self.latent_channels, height // 4, width // 4)


class DoubledChannels(SD3Family):
    def predict(self, *args: Any) -> Tensor:
        return super().predict(*args).repeat(1, 2, 1, 1)


class FirstLevelForAll(SD3Family):
    def timesteps(self, sigma: Tensor) -> Tensor:
        return super().timesteps(sigma[:1].expand_as(sigma))


class DeafToPrompts(SD3Family):
    def predict(self, network: Any, role: str, x_t: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        silent = {name: torch.zeros_like(tensor) for name, tensor in condition.items()}
        return super().predict(network, role, x_t, sigma, silent)


class TwoGrids(SD3Family):
    def student_scheduler(self, num_steps: int, shift: float | None, stochastic: bool = True) -> Any:
        return super().student_scheduler(num_steps, 1.0 if stochastic else shift, stochastic)


class WrongKind(SD3Family):
    prediction = "v"


class DetachedDecoder(SD3Family):
    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.detach()) + 0 * latents.sum()


class ForgottenShift(SD3Family):
    def from_vae(self, latents: Tensor) -> Tensor:
        factor: float = self.pipeline.vae.config.scaling_factor
        return latents * factor


class WrongSign(SD3Family):
    def predict(self, *args: Any) -> Tensor:
        return -super().predict(*args)


class WrongTime(SD3Family):
    def timesteps(self, sigma: Tensor) -> Tensor:
        return super().timesteps(sigma) / 1000


class ForgottenScale(SD3Family):
    """The VAE's constants are consistent, and wrong."""

    def to_vae(self, latents: Tensor) -> Tensor:
        return latents

    def from_vae(self, latents: Tensor) -> Tensor:
        return latents


class WrongGuidance(SD3Family):
    def guide(self, x_t: Tensor, sigma: Tensor, with_prompt: Tensor, without: Tensor, scale: float) -> Tensor:
        return super().guide(x_t, sigma, with_prompt, without, scale + 1)


class WrongNoPrompt(SD3Family):
    def encode_no_prompt(self) -> Condition:
        return self.encode_prompts(["ugly"])


class AlwaysTeacher(SD3Family):
    def predict(self, network: Any, role: str, *args: Any) -> Tensor:
        return super().predict(network, TEACHER, *args)


class SmallUnit(SD3Family):
    @property
    def size_unit(self) -> int:
        return int(self.pipeline.vae_scale_factor)


class UnusedTarget(SD3Family):
    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        self.backbone.spare = nn.Linear(4, 4).requires_grad_(False)


class PlainCheckpointing(SD3Family):
    def __init__(self, pipeline: Any, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        self.roles.gradient_checkpointing_enable = self.backbone.enable_gradient_checkpointing  # type: ignore[method-assign]


class ForgottenAlpha(SD3Family):
    def save_lora(self, directory: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        type(self.pipeline).save_lora_weights(directory, transformer_lora_layers=state)


class WrongWidth(SD3Family):
    @property
    def feature_width(self) -> int:
        return super().feature_width + 1


class WrongExample(SD3Family):
    def example_encoding(self, count: int) -> Condition:
        return {name: tensor[:, :-1] for name, tensor in super().example_encoding(count).items()}


class IgnoredMask(SD3Family):
    """It declares a mask, and its backbone is not told of it."""

    masks = (("encoder_hidden_states", "mask"),)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        encoded = super().encode_prompts(prompts)
        tokens = torch.arange(encoded["encoder_hidden_states"].shape[1])
        return encoded | {"mask": (tokens < 9).expand(len(prompts), -1)}


FAULTS: dict[str, type[SD3Family]] = {
    "declarations": UnknownTarget,
    "encodes_prompts": UnpaddedPrompts,
    "encodes_no_prompt": OddNoPrompt,
    "sizes": AnySize,
    "denoises": DoubledChannels,
    "samples_stand_alone": FirstLevelForAll,
    "follows_prompt_and_level": DeafToPrompts,
    "masks_hide_padding": IgnoredMask,
    "grid": TwoGrids,
    "steps_as_the_scheduler": WrongKind,
    "decodes": DetachedDecoder,
    "encodes_images": ForgottenShift,
    "agrees_with_the_pipeline": WrongTime,
    "guides_as_the_pipeline": WrongGuidance,
    "roles_share_the_base": AlwaysTeacher,
    "student_learns": UnusedTarget,
    "targets_know_the_level": AttentionAlone,
    "checkpointing_changes_nothing": PlainCheckpointing,
    "exports": ForgottenAlpha,
    "features": WrongWidth,
    "example_encoding": WrongExample,
}


def with_needs(name: str) -> list[str]:
    """Return a check and all that it rests on, in order."""
    wanted = {name}
    for check in reversed(MODEL_CHECKS):
        if check.name in wanted:
            wanted |= set(check.needs)
    return [check.name for check in MODEL_CHECKS if check.name in wanted]


def run(family: type[SD3Family], names: list[str]) -> dict[str, CheckResult]:
    chosen = [check for check in MODEL_CHECKS if check.name in names]
    results = run_checks(chosen, ModelSubject(lambda: family(tiny_sd3())), "family")
    return {result.name: result for result in results}


def test_there_is_a_fault_for_every_check() -> None:
    assert FAULTS.keys() == {check.name for check in MODEL_CHECKS}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *FAULTS.items(),
        ("declarations", UnknownExclusion),
        ("guides_as_the_pipeline", WrongNoPrompt),
        ("denoises", SmallUnit),
    ],
    ids=lambda value: str(value),
)
def test_a_fault_is_caught_by_its_check(name: str, fault: type[SD3Family]) -> None:
    """What the check rests on passes, it fails itself, and says what to do."""
    results = run(fault, with_needs(name))
    failed = [result.name for result in results.values() if result.status == "failed"]
    assert failed == [name], results
    assert len(results[name].message) > 20


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (WrongTime, "in step 0, 'timestep' was [2] [1, 1] in ours and [2] [1000, 1000] there"),
        (DeafToPrompts, "in step 0, 'encoder_hidden_states' was"),
        (WrongSign, "in step 1, 'hidden_states' was"),
        (WrongSign, "(only the state: the sign or form of what predict() returned, or the grid)"),
        (ForgottenScale, "told the same in every step, so it is what follows it: to_vae(), or decode()"),
    ],
)
def test_the_place_where_two_programs_part_is_named(fault: type[SD3Family], words: str) -> None:
    """The first argument of the backbone that differs, or what follows the backbone."""
    with pytest.raises(AssertionError) as caught:
        compare_with_the_pipeline(ModelSubject(lambda: fault(tiny_sd3())), 1.0)
    assert words in str(caught.value)


def test_features_of_text_are_no_features_of_the_image() -> None:
    """A block that returns the text's tokens and padding too makes a sample's features depend on the others."""

    class Mixed(ZImageFamily):
        features = ModelFamily.features

    chosen = [check for check in MODEL_CHECKS if check.name in with_needs("features")]
    results = run_checks(chosen, ModelSubject(lambda: Mixed(TINY_PIPELINES["ZImagePipeline"]())), "family")
    (failed,) = [result for result in results if result.status == "failed"]
    assert failed.name == "features"
    assert "override features() to take the image's tokens only" in failed.message


def test_the_page_names_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs" / "write-a-model.md").read_text(encoding="utf-8")
    assert [check.name for check in MODEL_CHECKS if f"| `{check.name}` | {check.promise} |" not in page] == []


def test_a_shift_that_the_call_decides_must_be_told() -> None:
    """A flow whose scheduler is shifted dynamically is refused unless the family says by how much."""
    pipeline = tiny_sd3()
    pipeline.register_modules(
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=True)
    )
    with pytest.raises(ModelError, match="SD3Family does not say how; override base_shift"):
        SD3Family(pipeline).student_sigmas(4, None)


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what leaves the kit only the checks behind three others: enough to see what it does with results."""
    names = {name for check in ("declarations", "grid", "example_encoding") for name in with_needs(check)}
    few = [check for check in MODEL_CHECKS if check.name in names]
    return lambda: monkeypatch.setattr(Kit, "run", lambda kit, subject: run_checks(few, subject, kit.noun))


def test_failures_are_raised_together_and_may_be_expected(few_checks: Callable[[], None]) -> None:
    """One error lists what failed; what rests on it is skipped, and an expected failure must fail."""
    few_checks()
    with pytest.raises(ModelCheckError, match=r"WrongExample does not keep .*\n- example_encoding: ") as caught:
        check_model(lambda: WrongExample(tiny_sd3()))
    assert str(caught.value).count("\n- ") == 1
    check_model(lambda: WrongExample(tiny_sd3()), expected_failures={"example_encoding": "known"})
    with pytest.raises(ModelCheckError, match="was expected to fail"):
        check_model(tiny_sd3, expected_failures={"grid": "not so"})
    with pytest.raises(ValueError, match="no check"):
        check_model(tiny_sd3, expected_failures={"grids": "misspelt"})


def test_an_unknown_pipeline_is_no_family() -> None:
    """The kit says what is missing as the trainer does."""
    with pytest.raises(ModelError, match="SimpleNamespace is not supported"):
        check_model(lambda: SimpleNamespace(set_progress_bar_config=lambda **_: None))


@parametrize_model_checks(TINY_PIPELINES["PixArtSigmaPipeline"])
def test_the_decorator_runs_every_check(check: Any) -> None:
    """As an author writes it: a check that fails raises."""
    assert check() is None


def test_the_decorator_has_a_case_for_every_check(few_checks: Callable[[], None]) -> None:
    """And the case of a check that fails says so."""
    mark = parametrize_model_checks(lambda: WrongExample(tiny_sd3()))
    cases = {case.id: case.values[0] for case in mark.args[1]}
    assert list(cases) == [check.name for check in MODEL_CHECKS]
    few_checks()
    assert cases["declarations"]() is None
    with pytest.raises(ModelCheckError, match="example_encoding: "):
        cases["example_encoding"]()
