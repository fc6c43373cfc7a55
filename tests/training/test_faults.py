"""The first value that is not finite is named, with its network, noise level and prompt; the step is not taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from digit_runs import weights_of
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rdm_sdk import RDMError, RDMTrainer, digits
from rdm_sdk.training import faults, rollouts
from rdm_sdk.training.faults import FiniteWatch, marks
from rdm_sdk.training.processes import Processes

Make = Callable[..., Any]
ROW, STEP = 5, 2
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "guidance_scale": 1.0}


def spoil(trainer: RDMTrainer, role: str, value: float) -> None:
    """Put a value into a role's prediction for one sample, from the third optimizer step on."""
    original = trainer.family.denoiser

    def denoiser(roles: Any, which: str, condition: Any) -> Any:
        made = original(roles, which, condition)

        def spoiled(x_t: Tensor, sigma: Tensor) -> Tensor:
            x_0 = made(x_t, sigma)
            if which == role and trainer.state.global_step >= STEP:
                x_0 = torch.where(torch.arange(len(x_0)).reshape(-1, 1, 1, 1) == ROW, value * x_0, x_0)
            return x_0

        return spoiled

    trainer.family.denoiser = denoiser  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("role", ["student", "teacher", "fake"])
def test_the_network_is_named(make_trainer: Make, tmp_path: Path, role: str, value: float) -> None:
    """Not what fell over it later: a critic that learned from such a student, or the loss."""
    trainer = make_trainer(tmp_path, **RUN)
    spoil(trainer, role, value)
    with pytest.raises(RDMError, match=f"the {role}'s prediction is not finite for 1 of 8 samples") as caught:
        trainer.train()
    prompt = trainer.step.rollouts.window[0]["prompts"][ROW]
    assert f"for the prompt {prompt!r}, in optimizer step {STEP + 1}, which was not taken" in str(caught.value)
    facts = json.loads((tmp_path / "fault" / "fault.json").read_text())
    assert facts["step"] == STEP + 1
    assert facts["fault"]["role"] == role
    assert facts["fault"]["prompt"] == prompt
    assert facts["prompts"][ROW] == prompt
    assert 0 < facts["fault"]["sigma"] <= 1
    assert load_file(tmp_path / "fault" / "batch.safetensors")["0.x_0"].shape[:2] == (4, 8)
    assert all(bool(weight.isfinite().all()) for weight in weights_of(trainer).values())


def test_the_same_run_repeats_it(make_trainer: Make, tmp_path: Path) -> None:
    """From the newest checkpoint, which is of the step before, bit for bit."""
    messages, batches = [], []
    for resume in (None, "latest"):
        trainer = make_trainer(tmp_path, **RUN)
        spoil(trainer, "student", torch.nan)
        with pytest.raises(RDMError) as caught:
            trainer.train(resume_from_checkpoint=resume)
        messages.append(str(caught.value))
        batches.append(load_file(tmp_path / "fault" / "batch.safetensors"))
    assert messages[0] == messages[1]
    for name, tensor in batches[0].items():
        torch.testing.assert_close(batches[1][name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), SafetensorError("I/O error"), RuntimeError("out of memory")]
)
def test_a_full_disk_does_not_hide_it(
    failure: Exception, make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the network all the same, and says why there are no samples."""

    def full(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(faults, "save_file", full)
    trainer = make_trainer(tmp_path, **RUN)
    spoil(trainer, "student", torch.nan)
    with pytest.raises(RDMError, match="the student's prediction is not finite for 1 of 8 samples") as caught:
        trainer.train()
    assert "The step's samples could not be written to" in str(caught.value)
    assert str(failure) in str(caught.value)
    assert not (tmp_path / "fault" / "fault.json").exists()


def test_processes_do_not_write_over_each_other(tmp_path: Path) -> None:
    """Each that has such a value has a folder, whose facts and samples are of one process."""
    for index in (0, 1):
        watch = FiniteWatch()
        watch.begin()
        condition = {"prompt": torch.tensor([[1.0 + index]])}
        denoise = watch.watched("student", condition, lambda x_t, _: x_t * torch.nan)
        denoise(torch.zeros(1, 3), torch.tensor([0.5]))
        models = SimpleNamespace(watch=watch, encode=lambda names, told=condition: told)
        processes = Processes(count=2, index=index)
        rollouts = SimpleNamespace(window=[{"prompts": [f"prompt {index}"]}], experiences=[], processes=processes)
        error: Any = faults.explained(RDMError("NaN"), models, rollouts, 1, str(tmp_path))  # type: ignore[arg-type]
        folder = tmp_path / "fault" / f"process-{index}"
        assert f"The step's samples are in {folder}" in str(error)
    for index in (0, 1):
        facts = json.loads((tmp_path / "fault" / f"process-{index}" / "fault.json").read_text(encoding="utf-8"))
        assert facts["prompts"] == [f"prompt {index}"]


def test_noise_is_not_blamed_on_the_network(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a network is given is looked at as well."""
    original = rollouts.rollout

    def spoiled(student: Any, noise: Tensor, *rest: Any) -> Any:
        noise[ROW] = torch.nan
        return original(student, noise, *rest)

    monkeypatch.setattr(rollouts, "rollout", spoiled)
    trainer = make_trainer(tmp_path)
    with pytest.raises(RDMError, match="what the student is given is not finite for 1 of 8 samples"):
        trainer.train()


def test_guidance_is_watched_too(make_trainer: Make, tmp_path: Path) -> None:
    """A guided teacher is two predictions in one pass."""
    trainer = make_trainer(tmp_path, "dm + 0.5*guidance", **(RUN | {"guidance_scale": 2.0}))
    original = trainer.family.denoiser_pair
    trainer.family.denoiser_pair = lambda *given: lambda x, s: tuple(torch.nan * out for out in original(*given)(x, s))
    with pytest.raises(RDMError, match="the teacher's prediction is not finite for 8 of 8 samples"):
        trainer.train()


def test_an_error_of_another_kind_stays_as_it_is(make_trainer: Make, tmp_path: Path) -> None:
    """A reward that returns an infinite score is named by itself, and nothing is written."""
    trainer = make_trainer(tmp_path, ["dm", lambda images, **_: [float("inf")] * len(images)])
    with pytest.raises(RDMError, match="returned an infinite score"):
        trainer.train()
    assert not (tmp_path / "fault").exists()


def test_nothing_is_taken_down_outside_a_step(make_trainer: Make, tmp_path: Path) -> None:
    """Samples and evaluations between steps leave nothing behind."""
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.sample(digits.prompts()[:2])
    assert trainer.models.watch._calls is None


def test_marks_tell_prompts_apart(make_trainer: Make, tmp_path: Path) -> None:
    """Every prompt of the digits has a number of its own, the same in any batch."""
    encode = make_trainer(tmp_path).models.encode
    prompts = digits.prompts()
    numbers = marks(encode(prompts))
    assert len(set(numbers.tolist())) == len(prompts)
    torch.testing.assert_close(marks(encode(prompts[3:5])), numbers[3:5], rtol=1e-6, atol=0)


def test_marks_take_conditions_of_any_shape() -> None:
    """A guidance scale is one number per sample, a mask is truth values."""
    condition = {
        "text": torch.ones(2, 3, 4),
        "guidance": torch.tensor([1.0, 2.0]),
        "mask": torch.ones(2, 3, dtype=bool),
    }
    assert marks(condition).tolist() == [16.0, 17.0]


def test_the_first_of_several_is_found() -> None:
    """In the order of the evaluations, inputs before outputs."""
    watch = FiniteWatch()
    watch.begin()
    condition = {"prompt": torch.tensor([[1.0], [2.0]])}
    fine, bad = torch.zeros(2, 3), torch.tensor([[0.0] * 3, [0.0, torch.inf, 0.0]])
    for role, x_t, x_0 in (("a", fine, fine), ("b", fine, bad), ("c", bad, bad)):
        watch.watched(role, condition, lambda *_, made=x_0: made)(x_t, torch.tensor([0.25, 0.5]))
    fault = watch.first(["one", "two"], lambda names: {"prompt": torch.tensor([[float(len(n))] for n in names]) - 2})
    assert fault is not None
    assert (fault.role, fault.what, fault.sigma, fault.samples, fault.count) == ("b", "prediction", 0.5, 1, 2)
