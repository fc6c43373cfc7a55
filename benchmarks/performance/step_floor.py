"""Time a full training cycle against the bare forwards and backwards that it has to do, in one run.

    OMP_NUM_THREADS=1 python benchmarks/performance/step_floor.py --batch 64 --cycles 10

The floor calls the transformer directly, with the same adapters, batch sizes and number of passes as one cycle: the
rollout to its end, `critic_steps` critic forwards and backwards, teacher and critic forwards, and the student's forward
and backward. No sampling, no noise, no losses beyond a mean, no optimizer, no Trainer. Cycles
and floors alternate, so that a busy machine slows both; the ratio of the medians is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from rdm_sdk import RDMConfig, RDMTrainer, digits


class Floor:
    """The bare passes of one cycle on a trainer's model."""

    def __init__(self, trainer: RDMTrainer) -> None:
        args = trainer.args
        self.trainer, self.guided = trainer, args.guidance_scale != 1.0
        self.size, self.critic_steps = args.train_batch_size, args.critic_steps
        self.steps = trainer.models.policy.num_steps
        condition = trainer.models.encode((digits.prompts() * self.size)[: self.size])
        self.inputs = {
            "hidden_states": torch.randn(self.size, *trainer.models.latent_shapes[0]),
            "timestep": torch.rand(self.size) * 1000,
            **condition,
        }

    def run(self) -> None:
        for _ in range(self.steps):
            self._forward("student", self.size)
        for _ in range(self.critic_steps):
            self._backward("fake")
        for _ in range(2 if self.guided else 1):
            self._forward("teacher", self.size)
        self._forward("fake", self.size)
        self._backward("student")

    @torch.no_grad()
    def _forward(self, role: str, size: int) -> None:
        with self.trainer.roles.use(role):
            inputs = {name: tensor[:size] for name, tensor in self.inputs.items()}
            self.trainer.roles.backbone(**inputs, return_dict=False)

    def _backward(self, role: str) -> None:
        with self.trainer.roles.use(role):
            self.trainer.roles.backbone(**self.inputs, return_dict=False)[0].mean().backward()
        self.trainer.roles.zero_grad()


class Alternate(TrainerCallback):
    """Times each cycle (one optimizer step) and runs one floor after it."""

    def __init__(self, floor: Callable[[], None]) -> None:
        self.floor = floor
        self.cycles: list[float] = []
        self.floors: list[float] = []
        self.begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.floor()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        middle = time.perf_counter()
        self.cycles.append(middle - self.begin)
        self.floor()
        self.floors.append(time.perf_counter() - middle)
        self.begin = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = RDMTrainer(
            model=digits.teacher_path(),
            args=RDMConfig(
                output_dir=folder,
                max_steps=options.cycles + 2,
                per_device_train_batch_size=options.batch,
                guidance_scale=options.guidance_scale,
                max_sequence_length=4,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=digits.prompts(),
        )
        timer = Alternate(Floor(trainer).run)
        trainer.add_callback(timer)
        trainer.train()
    cycle, floor = statistics.median(timer.cycles[2:]), statistics.median(timer.floors[2:])
    result = {"batch": options.batch, "cycle_s": cycle, "floor_s": floor, "ratio": cycle / floor}
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
