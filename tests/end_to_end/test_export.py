"""What `save_model` writes: plain diffusers and PEFT load it and give the trainer's own images (law 9)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from rdm_sdk import ConfigError, RDMTrainer, digits

PROMPTS = ["a handwritten seven", "a handwritten two", "the digit four", "three"]


@pytest.fixture(scope="session")
def make_trainer(make_digits_trainer: Callable[..., RDMTrainer]) -> Callable[..., RDMTrainer]:
    """Return the maker of runs on the embedded teacher, whose pictures are looked at here."""
    return make_digits_trainer


def darkness(images: Tensor, prompts: list[str]) -> Tensor:
    """Score a picture by how dark it is."""
    return -images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def trained(
    make_trainer: Callable[..., RDMTrainer], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RDMTrainer, Path]:
    """Return a trainer after three bold steps with alpha other than the rank and a moving average, and its export."""
    trainer = make_trainer(
        tmp_path_factory.mktemp("run"),
        ["dm", darkness],
        reward_weights=[1.0, 0.25],
        peft_config=LoraConfig(r=4, lora_alpha=12),
        learning_rate=2e-2,
        ema_decay=0.5,
        max_steps=3,
    )
    trainer.train()
    folder = tmp_path_factory.mktemp("export") / "student"
    trainer.save_model(str(folder))
    return trainer, folder


@pytest.fixture(scope="module")
def noise() -> Tensor:
    """Return fixed initial latents, one per prompt."""
    return torch.randn(len(PROMPTS), 1, 8, 8, generator=torch.Generator().manual_seed(11))


def base() -> Any:
    """Return the embedded teacher as plain diffusers loads it."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline: Any, noise: Tensor) -> Tensor:
    """Sample a plain pipeline as the model card says."""
    torch.manual_seed(5)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 4, "output_type": "pt"}
    return pipeline(PROMPTS, latents=noise, **call).images


def own_images(trainer: RDMTrainer, noise: Tensor) -> Tensor:
    """Sample the trainer's own student with the same noise."""
    torch.manual_seed(5)
    return trainer.sample(PROMPTS, noise=noise)


def test_plain_diffusers_gives_the_trainers_images(trained: tuple[RDMTrainer, Path], noise: Tensor) -> None:
    """Base, LoRA and scheduler in plain diffusers equal the trainer's sampler; without the LoRA they do not."""
    trainer, folder = trained
    pipeline = base()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    without = images_of(pipeline, noise)
    pipeline.load_lora_weights(folder)
    expected = own_images(trainer, noise)
    assert (images_of(pipeline, noise) - expected).abs().max() <= 1e-4
    assert (without - expected).abs().mean() > 1e-2


def test_the_moving_average_is_what_is_exported(trained: tuple[RDMTrainer, Path]) -> None:
    """The files hold the moving average, and saving puts the raw weights back."""
    trainer, folder = trained
    files = load_file(folder / "peft" / "adapter_model.safetensors")
    raw = {name: tensor.clone() for name, tensor in trainer.roles.role_state_dict("student").items()}
    with trainer.models.exported_weights():
        average = {name: tensor.clone() for name, tensor in trainer.roles.role_state_dict("student").items()}
    assert {f"base_model.model.{name}" for name in average} == files.keys()
    assert all(torch.equal(files[f"base_model.model.{name}"], tensor) for name, tensor in average.items())
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    assert all(torch.equal(raw[n], t) for n, t in trainer.roles.role_state_dict("student").items())


def test_peft_files_give_the_same_transformer(trained: tuple[RDMTrainer, Path], noise: Tensor) -> None:
    """The PEFT folder, injected into a fresh transformer through PEFT alone, is the student (alpha included)."""
    trainer, folder = trained
    condition = trainer.models.encode(PROMPTS)
    sigma = torch.full((len(PROMPTS),), 0.75)
    inputs = {
        "hidden_states": noise,
        "timestep": sigma * 1000,
        "encoder_hidden_states": condition["encoder_hidden_states"],
        "pooled_projections": condition["pooled_projections"],
    }
    fresh = base().transformer
    with torch.no_grad():
        without = fresh(**inputs, return_dict=False)[0]
        config = LoraConfig.from_pretrained(folder / "peft")
        inject_adapter_in_model(config, fresh)
        prefix = "base_model.model."
        state = load_file(folder / "peft" / "adapter_model.safetensors")
        result = set_peft_model_state_dict(fresh, {n.removeprefix(prefix): t for n, t in state.items()})
        got = fresh(**inputs, return_dict=False)[0]
        with trainer.models.exported_weights():
            expected = trainer.roles("student", **inputs)
    assert not result.unexpected_keys
    assert config.r == 4
    assert config.lora_alpha == 12
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (without - expected).abs().max() > 1e-2


def test_the_scheduler_carries_the_trainers_grid(trained: tuple[RDMTrainer, Path]) -> None:
    """The saved scheduler steps through exactly the noise levels of training, re-noising at each."""
    trainer, folder = trained
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == [*trainer.models.policy.sigmas, 0.0]
    assert trainer.models.policy.sigmas == pytest.approx([1.0, 0.75, 0.5, 0.25], abs=1e-6)
    assert scheduler.config.stochastic_sampling


@pytest.mark.parametrize(("steps", "shift"), [(1, None), (2, 1.0), (4, 3.0), (8, 3.0)])
def test_other_grids_survive_the_export(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path, noise: Tensor, steps: int, shift: float | None
) -> None:
    """For any number of steps and any shift, the exported scheduler samples as the trainer does."""
    trainer = make_trainer(tmp_path / "run", num_inference_steps=steps, shift=shift)
    trainer.save_model(str(tmp_path / "student"))
    pipeline = base()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "student", subfolder="scheduler")
    torch.manual_seed(5)
    call = {"guidance_scale": 1.0, "max_sequence_length": 4, "output_type": "pt"}
    got = pipeline(PROMPTS, latents=noise, num_inference_steps=steps, **call).images
    assert (got - own_images(trainer, noise)).abs().max() <= 1e-4
    assert len(trainer.models.policy.sigmas) == steps
    assert trainer.models.policy.sigmas[0] == 1.0


def test_the_model_card_names_base_method_rewards_and_settings(trained: tuple[RDMTrainer, Path]) -> None:
    """The card's text and metadata say what a reader needs, and its code names things that exist."""
    _, folder = trained
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    for words in (
        digits.teacher_path(),
        "arXiv 2603.28460",
        "distribution matching",
        "`dm + 0.25*darkness`",
        "rank 4, alpha 12",
        "| `learning_rate` | `0.02` |",
        "| `ema_decay` | `0.5` |",
        "1, 0.75, 0.5, 0.25",
        "num_inference_steps=4, guidance_scale=1.0, max_sequence_length=4",
    ):
        assert words in card.text, words
    assert not re.search(r"\| `(activation_checkpointing|gradient_checkpointing|debug)`", card.text)  # nobody set them
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"


def test_the_model_cards_code_runs(trained: tuple[RDMTrainer, Path]) -> None:
    """The Python block of the card runs as written once the folder is filled in."""
    _, folder = trained
    code = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    assert names["image"].size == (32, 32)


def test_saving_again_replaces_the_export_and_leaves_nothing_else(
    make_trainer: Callable[..., RDMTrainer], tmp_path: Path
) -> None:
    """A second save overwrites every file of the first, and no temporary file stays behind."""
    trainer = make_trainer(tmp_path / "run", learning_rate=1e-2)
    target = tmp_path / "student"
    trainer.save_model(str(target))

    def files() -> dict[str, bytes]:
        return {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}

    first = files()
    names = {"README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"}
    assert first.keys() >= names | {"peft/adapter_model.safetensors", "peft/adapter_config.json"}
    trainer.train()
    trainer.save_model(str(target))
    second = files()
    assert second.keys() == first.keys()
    assert not any(part.startswith(".") or "tmp" in part for name in second for part in Path(name).parts)
    assert not [p for p in target.rglob("*") if p.is_dir() and p.name.startswith(".")]
    weights = "pytorch_lora_weights.safetensors"
    assert second[weights] != first[weights]
    assert second["peft/adapter_model.safetensors"] != first["peft/adapter_model.safetensors"]
    assert json.loads(second["peft/adapter_config.json"])["lora_alpha"] == 16


def test_what_is_someone_elses_is_left_alone(make_trainer: Callable[..., RDMTrainer], tmp_path: Path) -> None:
    """A README that is no model card of this SDK's, and what a link leads to; nothing is written beside them."""
    trainer = make_trainer(tmp_path / "run")
    target, elsewhere = tmp_path / "student", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    (target / "README.md").write_text("my notes")
    with pytest.raises(ConfigError, match=r"README.md is no model card of rdm-sdk and would be overwritten; move it"):
        trainer.save_model(str(target))
    assert [path.name for path in target.iterdir()] == ["README.md"]
    (target / "README.md").unlink()
    (target / "scheduler").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"scheduler.* is a link to a folder, and an export would write through it"):
        trainer.save_model(str(target))
    assert list(elsewhere.iterdir()) == []
    (target / "scheduler").unlink()
    trainer.save_model(str(target))
    trainer.save_model(str(target))  # over its own card
