"""How often a step waits for the device: counted on the CPU, by the operations that would wait on a GPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rdm_sdk import RDMTrainer, digits

Make = Callable[..., RDMTrainer]
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
"""Operations whose result the CPU must know before it can go on."""
ON_THE_CPU = ("method/draws.py", "training/randomness.py")
"""Files whose operations are on tensors that were brought to the CPU before, and counted there."""


def place() -> str:
    """Return the file of the package that is at work, and the line."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "/rdm_sdk/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename.rpartition('/rdm_sdk/')[2]}:{frame.f_lineno}"


class Operations(TorchDispatchMode):
    """Takes down operations that wait, indices by truth values among them."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        indices = args[1] if name in ("aten::index", "aten::index_put_") else ()
        if name in WAITING or any(index is not None and index.dtype == torch.bool for index in indices):
            self.found[f"{name} {place()}"] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Takes down calls that wait without an operation on the CPU: lists, copies to the CPU, constants to the device."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        constant = func is torch.tensor and kwargs.get("device") is not None
        if name in ("tolist", "cpu", "numpy") or constant:
            self.found[f"{name} {place()}"] += 1
        return func(*args, **kwargs)


def waits(trainer: RDMTrainer) -> list[Counter[str]]:
    """Train, and return the waits of every optimizer step by their places."""
    steps: list[Counter[str]] = []
    original = trainer._take_step

    def counted() -> torch.Tensor:
        found: Counter[str] = Counter()
        with Operations(found), Methods(found):
            loss = original()
        steps.append(Counter({name: n for name, n in found.items() if not any(file in name for file in ON_THE_CPU)}))
        return loss

    trainer._take_step = counted  # type: ignore[method-assign]
    trainer.train()
    return steps


@pytest.mark.parametrize(
    ("rewards", "settings", "bound"),
    [
        # 61 when every figure was read where it was taken down. What is left: the depths of the rollout (2 by this
        # count, which takes the CPU's copy for the device's), the three of the replay's check, scores that are
        # infinite, one per critic update before its weights change, and five reads of many figures at once.
        ("dm", {}, 14),
        # In addition: what the other rewards decode, score and ask of prompts, no prompt for the teacher, advantages.
        (
            ["dm", "0.1*legibility", (lambda images, **_: images.mean(dim=(1, 2, 3)), 0.1)],
            {"weighting": "balance", "guidance_scale": 1.5},
            28,
        ),
    ],
    ids=["dm", "three rewards"],
)
def test_a_step_waits_for_the_device_no_oftener_than_it_must(
    make_trainer: Make, tmp_path: Path, rewards: Any, settings: dict[str, Any], bound: int
) -> None:
    """However many figures it logs; and logging every step adds nothing to a step."""
    run = {"max_steps": 3, "logging_steps": 2, **settings}
    _, logged, unlogged = waits(make_trainer(tmp_path, rewards, digits.prompts()[:2], **run))
    assert unlogged.total() <= bound, "\n".join(f"{n} {name}" for name, n in sorted(unlogged.items()))
    assert logged == unlogged
