"""What saves memory: offloading, dropping, slicing and tiling; several sizes, and a base spread over devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from diffusers import DiffusionPipeline
from digit_runs import same_bits, weights_of_roles

from rdm_sdk import ConfigError, RDMTrainer, digits

Make = Callable[..., RDMTrainer]
PROMPTS = digits.prompts()[:3]


@pytest.fixture(scope="module")
def plain(make_trainer: Make, tmp_path_factory: pytest.TempPathFactory) -> RDMTrainer:
    """Return a finished run that saves no memory, with a reward that differentiates through the VAE."""
    trainer = make_trainer(tmp_path_factory.mktemp("plain"), "dm + 0.1*legibility", guidance_scale=1.5)
    trainer.train()
    return trainer


# ---- Offloading and dropping ------------------------------------------------------------------------------------


class Visits:
    """Notes what comes to the device and what is sent back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: RDMTrainer) -> None:
        self.came: list[str] = []
        self.left: list[str] = []
        for name, part in {"vae": trainer.family.pipeline.vae, **trainer.family.text_encoders()}.items():
            hook: Any = part._hf_hook
            monkeypatch.setattr(hook, "pre_forward", self._noting(self.came, name, hook.pre_forward))
            monkeypatch.setattr(hook, "init_hook", self._noting(self.left, name, hook.init_hook))

    @staticmethod
    def _noting(notes: list[str], name: str, before: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            notes.append(name)
            return before(*args, **kwargs)

        return noted


def test_offloading_changes_nothing_but_places(
    make_trainer: Make, plain: RDMTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders and VAE come when they are needed and are sent back; the run is the same bit for bit."""
    saving = {"text_encoders": "offload", "vae_offload": True}
    trainer = make_trainer(tmp_path, "dm + 0.1*legibility", guidance_scale=1.5, **saving)
    visits = Visits(monkeypatch, trainer)
    trainer.train()
    assert same_bits(weights_of_roles(trainer, "student", "fake"), weights_of_roles(plain, "student", "fake"))
    assert set(visits.came) == {"vae", *trainer.family.text_encoders()}
    assert visits.left.count("vae") == 2  # once per step, when what was judged has been differentiated
    assert visits.left.count("text_encoder") >= 2  # for new prompts, and for no prompt
    came = len(visits.came)
    assert torch.equal(trainer.sample(PROMPTS, seed=0), plain.sample(PROMPTS, seed=0))
    assert visits.came[came:].count("vae") >= 1


def test_nothing_is_moved_unless_it_is_asked_for(plain: RDMTrainer) -> None:
    """By default there are no hooks."""
    assert not any(hasattr(part, "_hf_hook") for part in plain.family.frozen_parts().values())


def test_dropped_encoders_are_gone_and_the_run_is_the_same(
    make_trainer: Make, plain: RDMTrainer, tmp_path: Path
) -> None:
    """Every prompt is encoded at the start; others are refused by name."""
    trainer = make_trainer(tmp_path, "dm + 0.1*legibility", guidance_scale=1.5, text_encoders="drop")
    assert trainer.family.text_encoders() == {}
    assert trainer.family.pipeline.text_encoder is None
    trainer.train()
    assert same_bits(weights_of_roles(trainer, "student", "fake"), weights_of_roles(plain, "student", "fake"))
    assert torch.equal(trainer.sample(PROMPTS, seed=0), plain.sample(PROMPTS, seed=0))
    with pytest.raises(ConfigError, match="'a fox' cannot be encoded: text_encoders='drop' has let go"):
        trainer.sample(["a fox"])
    trainer.save_model(str(tmp_path / "student"))


def test_dropping_keeps_every_prompt(make_trainer: Make, tmp_path: Path) -> None:
    """More than the cache holds otherwise, those for evaluation among them."""
    prompts = [f"{prompt} {i}" for i in range(30) for prompt in digits.prompts()]
    trainer = make_trainer(tmp_path, prompts=prompts, eval_dataset=["a seven"], text_encoders="drop")
    for prompt in (prompts[0], prompts[-1], "a seven", None):
        assert trainer.models.encode([prompt])


def test_prompts_that_do_not_fit_into_memory_are_refused(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before hours of encoding, with what is needed and what there is."""
    monkeypatch.setattr(
        "rdm_sdk.training.prompt_encoding.psutil.virtual_memory", lambda: type("", (), {"available": 1000})()
    )
    with pytest.raises(ConfigError, match=r"encodings of all 10 prompts in memory, 0\.0 GB, and 0\.0 GB are free"):
        make_trainer(tmp_path, text_encoders="drop")


# ---- The VAE ----------------------------------------------------------------------------------------------------


def test_slicing_decodes_one_image_at_a_time(make_trainer: Make, plain: RDMTrainer, tmp_path: Path) -> None:
    """The same pictures, up to the last bits."""
    trainer = make_trainer(tmp_path, vae_slicing=True)
    seen: list[int] = []
    decoder = trainer.family.pipeline.vae.decoder
    decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    images = trainer.sample(PROMPTS, seed=0)
    assert seen == [1, 1, 1]
    other = make_trainer(tmp_path / "whole")
    torch.testing.assert_close(images, other.sample(PROMPTS, seed=0), rtol=0, atol=1e-5)


def test_tiling_is_switched_on_or_refused(make_trainer: Make, tmp_path: Path) -> None:
    """A VAE that has none says so by name."""
    trainer = make_trainer(tmp_path, vae_tiling=True)
    assert trainer.family.pipeline.vae.use_tiling
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    del pipeline.vae.use_tiling
    with pytest.raises(ConfigError, match="vae_tiling=True: AutoencoderKL has no tiling"):
        make_trainer(tmp_path / "none", model=pipeline, vae_tiling=True)


# ---- Several sizes ----------------------------------------------------------------------------------------------


def sizes_seen(trainer: RDMTrainer) -> list[tuple[int, ...]]:
    """Train, and return the shape of the latents in every step."""
    seen: list[tuple[int, ...]] = []
    collect = trainer.step.rollouts.collect

    def keep(inputs: dict[str, Any]) -> Any:
        experience = collect(inputs)
        seen.append(tuple(experience.x_0.shape[1:]))
        return experience

    trainer.step.rollouts.collect = keep  # type: ignore[method-assign]
    trainer.train()
    return seen


def test_every_step_draws_a_size(make_trainer: Make, tmp_path: Path) -> None:
    """Both sizes are trained, all micro-batches of a step alike, the same ones for the same seed."""
    settings = {"resolutions": ["32x32", "16x32"], "max_steps": 8, "critic_steps": 1, "gradient_accumulation_steps": 2}
    seen = sizes_seen(make_trainer(tmp_path / "a", **settings))
    assert set(seen) == {(1, 8, 8), (1, 4, 8)}
    assert seen[::2] == seen[1::2]
    assert sizes_seen(make_trainer(tmp_path / "b", **settings)) == seen
    assert sizes_seen(make_trainer(tmp_path / "c", **settings, seed=1)) != seen


def test_sizes_that_cannot_be_used_are_refused(make_trainer: Make, tmp_path: Path) -> None:
    """What is no size, sizes that do not divide, and two ways to say one thing."""
    with pytest.raises(ConfigError, match="'1024' is no size; write height x width"):
        make_trainer(tmp_path, resolutions=["1024"])
    with pytest.raises(ConfigError, match=r"positive multiples of 8 .*got 32 x 33"):
        make_trainer(tmp_path, resolutions=["32x32", "32x33"])
    with pytest.raises(ConfigError, match="too large for"):
        make_trainer(tmp_path, resolutions=["32x32", "32x64"])
    with pytest.raises(ConfigError, match="resolutions replaces height and width"):
        make_trainer(tmp_path, resolutions=["32x32"], height=32)
    with pytest.raises(ConfigError, match="a list of sizes, or None"):
        make_trainer(tmp_path, resolutions=[])


# ---- A base on several devices ----------------------------------------------------------------------------------


def test_a_base_spread_by_a_device_map_stays_where_it_is(
    make_trainer: Make, small_teacher: str, plain: RDMTrainer, tmp_path: Path
) -> None:
    """The trainer moves nothing of it, and trains as ever."""
    pipeline = DiffusionPipeline.from_pretrained(small_teacher)
    # Accelerate adds no hooks where there is one device, so the layers are named.
    places = {name: "cpu" for name, _ in pipeline.transformer.named_children()}
    pipeline.transformer = dispatch_model(pipeline.transformer, places, main_device="cpu", force_hooks=True)
    trainer = make_trainer(tmp_path, "dm + 0.1*legibility", model=pipeline, guidance_scale=1.5)
    moved: list[object] = []
    trainer.roles._apply = lambda *args, **kwargs: moved.append(args)  # type: ignore[method-assign]
    trainer.family.to(torch.device("cpu"))
    assert moved == []
    del trainer.roles._apply
    trainer.train()
    assert same_bits(weights_of_roles(trainer, "student", "fake"), weights_of_roles(plain, "student", "fake"))


# ---- On a GPU ---------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_offloaded_parts_wait_on_the_cpu(make_trainer: Make, tmp_path: Path) -> None:
    """VAE and encoders are there after every use; the base is on the device, and the samples come from it."""
    settings: dict[str, Any] = {"text_encoders": "offload", "vae_offload": True, "use_cpu": False}
    trainer = make_trainer(tmp_path, "dm + 0.1*legibility", **settings)
    trainer.train()
    images = trainer.sample(PROMPTS, seed=0)
    waiting = {p.device.type for part in trainer.family.frozen_parts().values() for p in part.parameters()}
    assert waiting == {"cpu"}
    assert images.device.type == next(trainer.roles.backbone.parameters()).device.type == "cuda"
