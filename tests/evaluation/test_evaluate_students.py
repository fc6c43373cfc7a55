"""`evaluate` and `rdm-sdk eval`: rows of students and teachers, sampled once, with everything they are kept with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rdm_sdk import ConfigError, DataError, ModelError, RDMTrainer, RewardError, digits, evaluate, frechet_distance
from rdm_sdk.cli.main import main
from rdm_sdk.digits.metrics import digit_features
from rdm_sdk.evaluation.candidates import student_candidates, teacher_candidate
from rdm_sdk.evaluation.sampling import Sampler
from rdm_sdk.training.export import load_student

SMALL: dict[str, Any] = {
    "features": digit_features,
    "samples": 40,
    "reference_steps": 2,
    "batch_size": 20,
    "call": {"max_sequence_length": 4},
    "progress": False,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def make_trainer(make_digits_trainer: Callable[..., RDMTrainer]) -> Callable[..., RDMTrainer]:
    """Return the maker of runs on the embedded teacher, whose pictures are looked at here."""
    return make_digits_trainer


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory, make_trainer: Callable[..., Any]) -> dict[str, Path]:
    """Return untrained students by their sampler, each moved a little, so that they are not their teacher."""
    folder = tmp_path_factory.mktemp("students")
    for sampler, steps in (("renoise", 2), ("ode", 4)):
        trainer = make_trainer(folder / "run", sampler=sampler, num_inference_steps=steps)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in trainer.parameters_of("student"):
                parameter.add_(0.02 * torch.randn_like(parameter))
        trainer.save_model(str(folder / sampler))
    return {name: folder / name for name in ("renoise", "ode")}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """Return the loaded teacher, which every evaluation leaves as it was."""
    return DiffusionPipeline.from_pretrained(digits.teacher_path())


def test_rows_have_every_figure(pipeline: Any, students: dict[str, Path], tmp_path: Path) -> None:
    """Two students and two teachers beside each other, against the teacher's samples and real ones."""
    result = evaluate(
        pipeline,
        digits.prompts(),
        list(students.values()),
        teacher_steps=[1, 2],
        rewards="legibility + jpeg",
        real=digits.heldout_images(),
        output=tmp_path,
        **SMALL,
    )
    assert [row.name for row in result.rows] == [
        "teacher, 1 step",
        "teacher, 2 steps",
        "renoise, 2 steps",
        "ode, 4 steps",
    ]
    for row in result.rows:
        assert row.against.keys() == {"teacher", "real"}
        for figures in row.against.values():
            assert figures["low"] < figures["frechet"] < figures["high"]
            assert all(torch.tensor(value).isfinite() for value in figures.values())
        assert row.rewards.keys() == {"legibility", "jpeg"}
        assert row.rewards["jpeg"]["low"] <= row.rewards["jpeg"]["mean"] <= row.rewards["jpeg"]["high"]
        assert row.rewards["legibility"]["worst"][0]["mean"] <= row.rewards["legibility"]["best"][0]["mean"]
        assert row.diversity is not None
        assert bool(row.worth) == (row.student is not None)
    one, two = result.rows[:2]
    assert (one.diversity or 0) < 0.5 * (two.diversity or 0)
    assert two.against["teacher"]["frechet"] > 1, "the reference's noise is not that of the row at as many steps"
    assert any("no more than the 64 features" in note for note in result.notes)
    assert result.table().splitlines()[0].split()[1:3] == ["|", "FID-SD"]
    kept = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert kept["rows"][3]["student"] == str(students["ode"])
    assert {"torch", "rdm-sdk"} <= kept["provenance"]["versions"].keys()
    assert kept["provenance"]["reference"] == {"steps": 2, "samples": 40}
    assert kept["provenance"]["base"]["dtype"] == "float32"
    assert kept["provenance"]["rewards"]["jpeg"]["reward"] == "jpeg"
    assert (tmp_path / "grid.png").is_file()
    assert len(list((tmp_path / "images").iterdir())) == 10


def test_figures_are_those_of_the_images(pipeline: Any, students: dict[str, Path], tmp_path: Path) -> None:
    """The Frechet distance is `frechet_distance` of what is in the cache."""
    settings = SMALL | {"samples": 80}
    row = evaluate(
        pipeline,
        digits.prompts(),
        [students["renoise"]],
        real=digits.heldout_images(),
        output=tmp_path,
        **settings,
    ).rows[0]
    sampler = Sampler(pipeline, guidance_scale=1.0, seed=0, batch_size=20, device="cpu", cache=tmp_path / "images")
    (candidate,) = student_candidates(students["renoise"], [], SMALL["call"])
    prompts = [prompt for prompt in digits.prompts() for _ in range(8)]
    images, sampled, _ = sampler.images(candidate, prompts, "rows", lambda count: None)
    assert sampled == 0
    expected = frechet_distance(images.float() / 255, digits.heldout_images())
    assert row.against["real"]["frechet"] == pytest.approx(expected, rel=1e-4)


def test_nothing_is_sampled_twice(
    pipeline: Any, students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was interrupted goes on; the same call samples nothing; other steps, seeds or students do."""
    calls: list[str] = []
    sample = Sampler._sample

    def counted(self: Sampler, name: str, call: Any, prompts: list[str], seed: int) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(prompts[0])
        return sample(self, name, call, prompts, seed)

    monkeypatch.setattr(Sampler, "_sample", counted)

    def again(**changes: Any) -> int:
        calls.clear()
        evaluate(
            pipeline,
            digits.prompts(),
            changes.pop("students", [students["renoise"]]),
            output=tmp_path,
            **SMALL | changes,
        )
        return len(calls)

    stop = 3
    with pytest.raises(KeyboardInterrupt):
        again()
    stop = -1
    assert again() == 1
    assert again() == 0
    assert again(teacher_steps=[1]) == 2
    assert again(seed=1) == 4
    assert again(students=[students["ode"]]) == 2
    weights = students["ode"] / "pytorch_lora_weights.safetensors"
    copied = tmp_path / "other"
    copied.mkdir()
    for path in students["ode"].rglob("*"):
        if path.is_file() and path != weights:
            (copied / path.relative_to(students["ode"])).parent.mkdir(exist_ok=True)
            (copied / path.relative_to(students["ode"])).write_bytes(path.read_bytes())
    (copied / weights.name).write_bytes(weights.read_bytes())
    assert again(students=[copied]) == 0, "another folder with the same content is the same student"
    tensors = load_file(copied / weights.name)
    save_file({name: tensor + 1e-6 for name, tensor in tensors.items()}, copied / weights.name)
    assert again(students=[copied]) == 2, "other weights are another student"
    next((tmp_path / "images").iterdir()).write_bytes(b"damaged")
    assert (
        again()
        + again(students=[students["ode"]])
        + again(students=[copied])
        + again(seed=1)
        + again(teacher_steps=[1])
        == 1
    )


@pytest.mark.parametrize("part", ["vae", "text_encoder", "scheduler", "scaling"])
def test_another_base_with_the_same_backbone_is_sampled_anew(tmp_path: Path, part: str) -> None:
    """Its VAE, text encoders and schedule decide its pictures too; the same base, loaded again, is the same."""
    base = tmp_path / "base"
    base.mkdir()

    def sampled() -> int:
        sampler = Sampler(str(base), guidance_scale=1.0, seed=0, batch_size=1, device="cpu", cache=tmp_path / "images")
        return sampler.images(teacher_candidate(1, SMALL["call"]), ["seven"], "rows", lambda count: None)[1]

    other = DiffusionPipeline.from_pretrained(digits.teacher_path())
    other.save_pretrained(base)
    assert [sampled(), sampled()] == [1, 0]
    if part == "scheduler":
        other.scheduler.register_to_config(shift=3.0)
    elif part == "scaling":
        other.vae.register_to_config(scaling_factor=2.0)
    else:
        with torch.no_grad():
            next(getattr(other, part).parameters()).mul_(1.5)
    other.save_pretrained(base)
    assert sampled() == 1


def test_a_student_is_sampled_as_plain_diffusers_does(pipeline: Any, students: dict[str, Path]) -> None:
    """The images are those of `load_student` in a fresh pipeline; and a pipeline that is passed stays as it was."""
    before = {name: tensor.clone() for name, tensor in pipeline.transformer.state_dict().items()}
    scheduler, transformer = pipeline.scheduler, pipeline.transformer
    sampler = Sampler(pipeline, guidance_scale=1.0, seed=0, batch_size=10, device="cpu")
    (candidate,) = student_candidates(students["renoise"], [], {})
    images, sampled, _ = sampler.images(candidate, digits.prompts(), "rows", lambda count: None)
    assert sampled == 10
    assert pipeline.scheduler is scheduler
    assert pipeline.transformer is transformer
    assert pipeline.transformer.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.transformer.state_dict().items())

    fresh = DiffusionPipeline.from_pretrained(digits.teacher_path())
    call = load_student(fresh, students["renoise"])
    torch.manual_seed(int.from_bytes(hashlib.sha256(b"0/rows/0").digest()[:4]))
    with torch.no_grad():
        expected = fresh(prompt=digits.prompts(), output_type="pt", **call).images
    assert (images.float() / 255 - expected).abs().max() < 0.51 / 255


def test_a_merged_student_draws_the_same(students: dict[str, Path]) -> None:
    """`fuse_lora` and `unload_lora_weights`, as docs/export.md has them for speed, leave its pictures as they are."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    call = load_student(pipeline, students["renoise"]) | {"max_sequence_length": 4}

    def pictures() -> torch.Tensor:
        torch.manual_seed(0)
        images: torch.Tensor = pipeline(prompt=digits.prompts(), output_type="pt", **call).images
        return images

    before = pictures()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert not any("lora" in name for name in pipeline.transformer.state_dict())
    assert torch.allclose(pictures(), before, atol=1e-4)


def test_the_teacher_is_sampled_in_steps_of_equal_size(pipeline: Any) -> None:
    """On the student's grid, as the demo's table: 1, 3/4, 1/2, 1/4 for four steps."""
    sampler = Sampler(pipeline, guidance_scale=1.0, seed=0, batch_size=10, device="cpu")
    with sampler._loaded(teacher_candidate(4, {})) as call:
        pipeline.scheduler.set_timesteps(4)
        assert pipeline.scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
        assert call["guidance_scale"] == 1.0


def test_steps_that_a_student_cannot_take_are_refused(pipeline: Any, students: dict[str, Path]) -> None:
    """A re-noising student has one number of steps; a deterministic one gets the grid of another number."""
    with pytest.raises(ConfigError, match=r"re-noises after each of its 2 steps.*got 1, 4"):
        student_candidates(students["renoise"], [1, 2, 4], {})
    one, four = student_candidates(students["ode"], [1, 4], {})
    sampler = Sampler(pipeline, guidance_scale=1.0, seed=0, batch_size=10, device="cpu")
    for candidate, grid in ((one, [1.0, 0.0]), (four, [1, 0.75, 0.5, 0.25, 0])):
        with sampler._loaded(candidate) as call:
            pipeline.scheduler.set_timesteps(call["num_inference_steps"])
            assert pipeline.scheduler.sigmas.tolist() == pytest.approx(grid)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 41}, ConfigError, "samples=41 must be a multiple of the 10 different prompts.*give 40 or 50"),
        ({"reference_samples": 15}, ConfigError, "reference_samples=15 must be a multiple"),
        ({"reference_samples": 10}, ConfigError, "reference_samples=10 must be at least 16"),
        ({"real": digits.heldout_images()[:15]}, DataError, "real must be at least 16 images.*got 15"),
        ({"teacher_steps": []}, ConfigError, "nothing to evaluate"),
        ({"teacher_steps": [2, 2]}, ConfigError, "given twice"),
        ({"teacher_steps": [0]}, ConfigError, "0 steps"),
        ({"students": ["nowhere"]}, ModelError, "there is no folder 'nowhere'"),
        ({"rewards": "klip"}, RewardError, "klip"),
        ({"rewards": "dm"}, RewardError, "needs the models of a training run"),
        ({"rewards": "odd_rewards:Captioned[column=caption]"}, RewardError, "Captioned' needs a column 'caption'"),
        (
            {"rewards": "odd_rewards:Compared", "samples": 10},
            RewardError,
            "with one of each .*two samples of each prompt",
        ),
        ({"rewards": "odd_rewards:Unkeepable"}, RewardError, "must return what JSON can hold"),
        ({"real": digits.heldout_images() * 255}, DataError, "real must lie in"),
        ({"prompts": []}, DataError, "prompts holds no prompts"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
        ({"guidance_scale": -1.0}, ConfigError, "guidance_scale=-1.0 cannot be used"),
    ],
)
def test_mistakes_are_found_before_the_base_is_loaded(
    changes: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is one error that says what to do."""
    monkeypatch.setattr("rdm_sdk.evaluation.run.Sampler", None)
    settings = {"prompts": digits.prompts(), "teacher_steps": [1]} | SMALL | changes
    with pytest.raises(error, match=message):
        evaluate(digits.teacher_path(), **settings)


def test_what_rewards_are_kept_with_is_text(students: dict[str, Path], tmp_path: Path) -> None:
    """A path in a reward's provenance is written as one, with figures that are there already."""
    settings = SMALL | {"samples": 10, "reference_steps": 1, "reference_samples": 10}
    found = evaluate(
        digits.teacher_path(),
        digits.prompts(),
        teacher_steps=[1],
        rewards="odd_rewards:Located",
        output=tmp_path,
        **settings,
    )
    content = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert content["provenance"]["rewards"] == found.provenance["rewards"]
    assert content["provenance"]["rewards"]["Located"]["weights"] == str(Path("some/weights.pt"))


def test_a_reward_that_compares_has_no_interval(tmp_path: Path) -> None:
    """Its scores in a group hang together, so drawing them again one by one would show too little spread."""
    settings = SMALL | {"samples": 20, "reference_steps": 1, "reference_samples": 20, "output": tmp_path}
    found = evaluate(
        digits.teacher_path(), digits.prompts(), teacher_steps=[1], rewards="odd_rewards:Compared + jpeg", **settings
    )
    figures = found.rows[0].rewards
    assert (figures["Compared"]["low"], figures["Compared"]["high"]) == (None, None)
    assert figures["jpeg"]["low"] < figures["jpeg"]["high"]
    cells = [cell.strip() for cell in found.table().splitlines()[-1].split("|")]
    assert f"{figures['Compared']['mean']:.4g}" in cells


def test_images_that_cannot_be_kept_are_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a full disk makes it, which is no OSError to safetensors: one line with the path."""

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("rdm_sdk.evaluation.sampling.save_file", full)
    words = ["--model", "digits", "--teacher_steps", "1", "--reference_steps", "1", "--samples", "20"]
    assert main(["eval", *words, "--max_sequence_length", "4", "--output", str(tmp_path), "--device", "cpu"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"rdm-sdk: images cannot be kept at '{tmp_path / 'images'}")
    assert told.endswith("No space left on device (os error 28); is the disk full?")


def test_students_of_one_name_must_agree_on_size(students: dict[str, Path], tmp_path: Path) -> None:
    """Each is asked, though their folders are called the same."""
    for seed, height in enumerate((16, 32)):
        place = shutil.copytree(students["renoise"], tmp_path / f"seed{seed}" / "student")
        call = json.loads((place / "inference.json").read_text(encoding="utf-8")) | {"height": height}
        (place / "inference.json").write_text(json.dumps(call), encoding="utf-8")
    folders = [tmp_path / "seed0" / "student", tmp_path / "seed1" / "student"]
    with pytest.raises(ConfigError, match=r"height differ \(seed0/student, 2 steps: 16, seed1/student, 2 steps: 32\)"):
        evaluate(digits.teacher_path(), digits.prompts(), folders, **SMALL)


def test_a_dtype_is_of_a_base_that_is_named(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the base is loaded in; a loaded pipeline has one, and it is not accepted to be ignored."""
    settings = SMALL | {"prompts": digits.prompts(), "teacher_steps": [1], "dtype": torch.bfloat16}
    with pytest.raises(ConfigError, match=r"dtype=torch\.bfloat16 is for a base that is named"):
        evaluate(pipeline, **settings)
    asked: dict[str, Any] = {}

    def stop(*_: object, **options: Any) -> None:
        asked.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("rdm_sdk.evaluation.run.Sampler", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(digits.teacher_path(), **settings)
    assert asked["dtype"] is torch.bfloat16


def test_real_images_that_do_not_fit_are_found_before_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their features are taken first: the digits' classifier takes no images of another size."""

    def never(*_: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(Sampler, "_sample", never)
    with pytest.raises(DataError, match="images must be digits of shape"):
        evaluate(digits.teacher_path(), digits.prompts(), teacher_steps=[1], real=torch.rand(20, 3, 48, 48), **SMALL)


def test_the_command_prints_the_table(
    students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command, from the digits to a table and `eval.json`."""
    words = ["--student", str(students["renoise"]), "--teacher_steps", "1", "--samples", "20", "--reference_steps", "1"]
    output = ["--output", str(tmp_path / "eval"), "--rewards", "jpeg"]
    assert main(["eval", "--model", "digits", "--batch_size", "20", *words, *output]) == 0
    printed = capsys.readouterr().out
    assert "| renoise, 2 steps |" in printed
    assert "note: 20 images are no more than the 64 features" in printed
    assert json.loads((tmp_path / "eval" / "eval.json").read_text(encoding="utf-8"))["provenance"]["real"] == 500
