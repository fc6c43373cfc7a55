"""What saves memory, and what takes it: offloading, dropping, slicing, quantized bases, several sizes, full copies."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rdm_sdk import ConfigError, RDMTrainer, digits
from rdm_sdk.families import load
from rdm_sdk.families.roles import TEACHER

Make = Callable[..., RDMTrainer]
PROMPTS = digits.prompts()[:3]


def weights_of(trainer: RDMTrainer, *roles: str) -> list[Tensor]:
    """Return the weights of the trained roles."""
    return [p.detach().clone() for role in roles for p in trainer.parameters_of(role)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
    assert same(weights_of(trainer, "student", "fake"), weights_of(plain, "student", "fake"))
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
    assert same(weights_of(trainer, "student", "fake"), weights_of(plain, "student", "fake"))
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
    monkeypatch.setattr("rdm_sdk.training.models.psutil.virtual_memory", lambda: type("", (), {"available": 1000})())
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


# ---- Full copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "critic"), [("full", "lora"), ("lora", "full"), ("full", "full")])
def test_full_copies_train_beside_the_teacher(make_trainer: Make, tmp_path: Path, student: str, critic: str) -> None:
    """The teacher stays bit for bit; what is trained starts at it and moves; resuming is exact."""
    settings: dict[str, Any] = {"student_weights": student, "critic_weights": critic, "max_steps": 2, "save_steps": 1}
    settings |= {"learning_rate": 1e-3, "save_strategy": "steps", "ema_decay": 0.5}
    trainer = make_trainer(tmp_path / "run", **settings)
    roles, count = trainer.roles, sum(p.numel() for p in trainer.roles.backbone.parameters() if not p.requires_grad)
    x_t = torch.randn(2, *trainer.models.latent_shapes[0], generator=torch.Generator().manual_seed(0))
    condition, sigma = trainer.models.encode(PROMPTS[:2]), torch.tensor([0.7, 0.3])

    def says(role: str) -> Tensor:
        with torch.no_grad():
            return trainer.family.denoiser(roles, role, condition)(x_t, sigma)

    before = says(TEACHER)
    for role, kind in (("student", student), ("fake", critic)):
        assert torch.equal(says(role), before)
        told = sum(p.numel() for p in roles.embedding_parameters_of(role).values())
        assert (told > 0) == (role == "fake")
        size = sum(p.numel() for p in trainer.parameters_of(role)) - told
        assert (size == count) == (kind == "full")
        assert roles.describe(role).startswith("a full copy of the base") == (kind == "full")
    trainer.train()
    assert torch.equal(says(TEACHER), before)
    assert not torch.equal(says("student"), before)
    assert not torch.equal(says("fake"), before)
    again = make_trainer(tmp_path / "again", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(weights_of(again, "student", "fake"), weights_of(trainer, "student", "fake"))
    settings["student_weights"] = "lora" if student == "full" else "full"
    other = make_trainer(tmp_path / "other", **settings)
    with pytest.raises(Exception, match="do not fit"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_full_copy_of_a_bf16_base_is_trained_in_float32(
    make_trainer: Make, tmp_path: Path, checkpointing: bool
) -> None:
    """Its weights and gradients are float32, whatever the base is loaded in."""
    settings = {
        "student_weights": "full",
        "bf16": True,
        "activation_checkpointing": checkpointing,
        "learning_rate": 1e-3,
    }
    trainer = make_trainer(tmp_path, **settings)
    assert next(trainer.roles.backbone.parameters()).dtype == torch.bfloat16
    before = weights_of(trainer, "student")
    assert math.isfinite(float(trainer.sample(PROMPTS).mean()))
    trainer.train()
    assert {p.dtype for p in trainer.parameters_of("student")} == {torch.float32}
    assert not same(before, weights_of(trainer, "student"))


def test_a_full_student_runs_in_plain_diffusers(make_trainer: Make, tmp_path: Path) -> None:
    """The export is the component's folder; a plain pipeline that loads it gives our images."""
    from rdm_sdk.training.export import load_student

    trainer = make_trainer(tmp_path / "run", student_weights="full", learning_rate=1e-3, sampler="ode")
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    card = (tmp_path / "student" / "README.md").read_text()
    assert 'SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")' in card
    assert "load_lora_weights" not in card
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *trainer.models.latent_shapes[0], generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 4, "output_type": "pt"}
    pipeline.scheduler = type(pipeline.scheduler).from_pretrained(tmp_path / "student", subfolder="scheduler")
    teacher = pipeline(PROMPTS[:2], latents=noise.clone(), **call).images
    load_student(pipeline, tmp_path / "student")
    theirs = pipeline(PROMPTS[:2], latents=noise.clone(), **call).images
    assert (theirs - trainer.sample(PROMPTS[:2], noise=noise)).abs().max() < 1e-4
    assert (theirs - teacher).abs().max() > 1e-3


def test_what_copies_cost_is_said_before_the_run(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixteen bytes a parameter, for each copy; adapters are not worth a word."""
    make_trainer(tmp_path / "lora")
    assert "full copy" not in caplog.text
    trainer = make_trainer(tmp_path / "full", student_weights="full")
    count = sum(p.numel() for p in trainer.parameters_of("student"))
    assert f"'student' is a full copy of the base: {count:.3g} parameters, {16 * count / 2**30:.2f} GB" in caplog.text
    assert "'fake' is a full copy" not in caplog.text


def test_a_copy_takes_no_lora(make_trainer: Make, tmp_path: Path) -> None:
    """Settings of adapters for a role that has none are a mistake."""
    from peft import LoraConfig

    with pytest.raises(ConfigError, match="peft_config describes adapters, and student_weights='full'"):
        make_trainer(tmp_path, student_weights="full", peft_config=LoraConfig(r=4))
    with pytest.raises(ConfigError, match="fake_peft_config describes adapters, and critic_weights='full'"):
        make_trainer(tmp_path, critic_weights="full", fake_peft_config=LoraConfig(r=4))


# ---- Quantized and spread bases ---------------------------------------------------------------------------------


def quantized_teacher(bits: int) -> Any:
    """Return the embedded teacher with its attention layers in 8 or 4 bits, as a loader on a GPU leaves them."""
    bnb = pytest.importorskip("bitsandbytes")
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    network = pipeline.transformer
    for name, layer in [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear) and ".attn." in n]:
        if bits == 4:
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
            new.support_avx512bf16_for_cpu = False  # that path is for inference alone
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        network.set_submodule(name, new.to("cpu"))
    setattr(network, f"is_loaded_in_{bits}bit", True)
    return pipeline


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_train_on_a_quantized_base(make_trainer: Make, tmp_path: Path, bits: int) -> None:
    """The base stays as it is, in few bits; the student's adapters move, and are exported as any others."""
    trainer = make_trainer(tmp_path, model=quantized_teacher(bits), learning_rate=1e-3)
    layer = trainer.roles.backbone.transformer_blocks[0].attn.to_q.base_layer
    assert layer.weight.dtype in (torch.uint8, torch.int8)
    base, before = layer.weight.detach().clone(), weights_of(trainer, "student")
    trainer.train()
    assert torch.equal(layer.weight, base)
    assert not same(before, weights_of(trainer, "student"))
    trainer.save_model(str(tmp_path / "student"))
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()


def test_quantization_is_asked_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backbone, in the right format, computed in the run's dtype."""
    pytest.importorskip("bitsandbytes")
    asked: dict[str, Any] = {}

    def from_pretrained(place: str, **options: Any) -> Any:
        asked.update(options)
        raise RuntimeError("seen enough")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    for bits, name in (("4bit", "bitsandbytes_4bit"), ("8bit", "bitsandbytes_8bit")):
        with pytest.raises(load.ModelError, match="seen enough"):
            load.load_family(digits.teacher_path(), torch.bfloat16, bits)
        config = asked["quantization_config"]
        assert (config.quant_backend, config.components_to_quantize) == (name, ["transformer"])
        assert config.quant_kwargs[f"load_in_{bits}"] is True
        assert config.quant_kwargs.get("bnb_4bit_compute_dtype", torch.bfloat16) == torch.bfloat16


def test_quantization_that_cannot_work_is_refused(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU or the library, of a base that is loaded already, or with a copy to train in full."""
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="quantization='4bit' needs a CUDA device"):
            make_trainer(tmp_path, quantization="4bit")
    with pytest.raises(ConfigError, match="acts when the base is loaded, and model is a StableDiffusion3Pipeline"):
        make_trainer(tmp_path, model=DiffusionPipeline.from_pretrained(digits.teacher_path()), quantization="8bit")
    with pytest.raises(ConfigError, match="few bits, which cannot be trained in full"):
        make_trainer(tmp_path, quantization="8bit", student_weights="full")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes: pip install"):
        load.load_family(digits.teacher_path(), torch.bfloat16, "4bit")


def test_a_base_spread_by_a_device_map_stays_where_it_is(make_trainer: Make, plain: RDMTrainer, tmp_path: Path) -> None:
    """The trainer moves nothing of it, and trains as ever."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
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
    assert same(weights_of(trainer, "student", "fake"), weights_of(plain, "student", "fake"))


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


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_base_is_loaded_in_few_bits_and_trained_on(make_trainer: Make, tmp_path: Path, quantization: str) -> None:
    """From its path, by the setting alone."""
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(tmp_path, quantization=quantization, bf16=True, use_cpu=False, learning_rate=1e-3)
    assert trainer.roles.backbone.transformer_blocks[0].attn.to_q.base_layer.weight.dtype in (torch.uint8, torch.int8)
    before = weights_of(trainer, "student")
    trainer.train()
    assert not same(before, weights_of(trainer, "student"))
