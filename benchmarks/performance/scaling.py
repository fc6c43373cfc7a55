"""How a training cycle's cost grows with batch, group, resolution, steps, critic updates and number of rewards.

    OMP_NUM_THREADS=1 python benchmarks/performance/scaling.py --cycles 3                 # the digits teacher
    OMP_NUM_THREADS=1 python benchmarks/performance/scaling.py --axes batch rewards

One setting is doubled at a time, from the others as they stand in `BASE`; times are of the processor (on a GPU, of the
clock), medians of the cycles after the first two. Each row has the fitted exponent b of seconds = a * n^b: 1 is
proportional, below 1 a share of the cost does not depend on n. Where a cost has a large part that does not, as with
rewards, seconds per further one (a line's slope, beside its value at 0) say more; they are there as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from typing import Any

import numpy as np
from alternation import WARM_UP, now
from torch import Tensor
from transformers import TrainerCallback

from rdm_sdk import Capabilities, RDMConfig, RDMTrainer, Reward, RewardBatch, digits

BASE: dict[str, Any] = {"per_device_train_batch_size": 32, "num_generations": 4, "critic_steps": 2}
AXES: dict[str, list[int]] = {
    "batch": [8, 16, 32, 64],
    "group": [2, 4, 8, 16],
    "pixels": [16, 32, 64],
    "steps": [1, 2, 4, 8],
    "critic_steps": [1, 2, 4, 8],
    "rewards": [1, 2, 4, 8],
}
"""Values of each; `pixels` is the height and width of the images, whose area the cost depends on."""


class Level(Reward):
    """How near the mean brightness is to a level: a pixel reward that costs little itself."""

    capabilities = Capabilities(gradient="autograd")

    def __init__(self, level: float) -> None:
        super().__init__()
        self.name, self.level = f"level_{round(1000 * level)}", level

    def score(self, batch: RewardBatch) -> Tensor:
        return -(batch.images.mean(dim=(1, 2, 3)) - self.level).square()


class Times(TrainerCallback):
    """Seconds of each cycle."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.begin)


def settings_of(axis: str, value: int) -> tuple[dict[str, Any], list[Any]]:
    """Return the settings and rewards of a value on an axis."""
    rewards: list[Any] = ["dm"]
    if axis == "rewards":
        rewards += [(Level(i / value), 0.1) for i in range(value)]
    changed: dict[str, dict[str, Any]] = {
        "batch": {"per_device_train_batch_size": value},
        "group": {"num_generations": value},
        "pixels": {"height": value, "width": value},
        "steps": {"num_inference_steps": value},
        "critic_steps": {"critic_steps": value},
        "rewards": {},
    }
    return BASE | changed[axis], rewards


def seconds_of(axis: str, value: int, cycles: int) -> float:
    """Return the seconds of a cycle."""
    settings, rewards = settings_of(axis, value)
    with tempfile.TemporaryDirectory() as folder:
        args = RDMConfig(
            output_dir=folder,
            max_steps=cycles + WARM_UP,
            guidance_scale=1.0,
            max_sequence_length=4,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            **settings,
        )
        trainer = RDMTrainer(digits.teacher_path(), rewards, args, digits.prompts())
        times = Times()
        trainer.add_callback(times)
        trainer.train()
    return statistics.median(times.seconds[WARM_UP:])


def fitted(values: list[int], seconds: list[float]) -> tuple[float, float, float]:
    """Return the exponent of a power of the values, and slope and value at 0 of a line."""
    exponent = float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
    slope, start = (float(part) for part in np.polyfit(values, seconds, 1))
    return exponent, slope, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--values", type=int, help="how many values of each axis, the smallest first; all by default")
    options = parser.parse_args()
    for axis in options.axes:
        values = AXES[axis][: options.values]
        seconds = [seconds_of(axis, value, options.cycles) for value in values]
        exponent, slope, start = fitted([v * v for v in values] if axis == "pixels" else values, seconds)
        row = {
            "axis": axis,
            "values": values,
            "seconds": [round(s, 4) for s in seconds],
            "exponent": round(exponent, 2),
        }
        print(json.dumps(row | {"slope": round(slope, 5), "at_0": round(start, 4)}), flush=True)


if __name__ == "__main__":
    main()
