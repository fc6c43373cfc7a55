"""What a reward that waits adds to a training step: little, because it waits while the run's models compute.

    OMP_NUM_THREADS=1 python benchmarks/performance/reward_overlap.py                # a reward of 1 second
    OMP_NUM_THREADS=1 python benchmarks/performance/reward_overlap.py --batch 64 --seconds 0.5

The embedded digits teacher, `dm` with its critic, beside a reward that sleeps as one behind an API does. Three kinds of
steps are timed: with the reward as a plain function that answers at once, with it as an asynchronous function that
answers at once, and with it asleep. The second is the cost of decoding and copying for an asynchronous reward; what the
third adds is waiting. `waited_s`, counted inside the step, is that without the noise of the machine. A reward hides
behind a step that is longer than it: `hides` says whether this one is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rdm_sdk import RDMConfig, RDMTrainer, digits
from rdm_sdk.rewards.awaiting import Call


def seconds_of_steps(options: argparse.Namespace, rewards: list[Any], folder: str) -> list[tuple[float, float]]:
    """Return how long each step of a run takes and how long of it is waited for rewards, without the first."""
    settings: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    config = RDMConfig(
        output_dir=folder,
        max_steps=options.steps + 1,
        per_device_train_batch_size=options.batch,
        num_generations=4,
        max_sequence_length=4,
        guidance_scale=1.0,
        critic_steps=options.critic_steps,
        **settings,
    )
    trainer = RDMTrainer(digits.teacher_path(), rewards, config, digits.prompts())
    begin, end = trainer.step.begin, trainer.step.end
    started, waited, taken = [0.0], [0.0], []
    answer = Call.answer

    def timed_begin(window: Any, step: int) -> None:
        started[0], waited[0] = time.perf_counter(), 0.0
        begin(window, step)

    def timed_end(next_step: int) -> None:
        end(next_step)
        taken.append((time.perf_counter() - started[0], waited[0]))

    def timed_answer(call: Call) -> Any:
        asked = time.perf_counter()
        try:
            return answer(call)
        finally:
            waited[0] += time.perf_counter() - asked

    trainer.step.begin, trainer.step.end = timed_begin, timed_end  # type: ignore[method-assign]
    Call.answer = timed_answer  # type: ignore[method-assign, assignment]
    try:
        trainer.train()
    finally:
        Call.answer = answer  # type: ignore[method-assign]
    return taken[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--critic-steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long the reward takes")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)

    async def asked(images: Tensor, prompts: list[str]) -> list[float]:
        await asyncio.sleep(options.seconds)
        return images.mean(dim=(1, 2, 3)).tolist()

    async def at_once(images: Tensor, prompts: list[str]) -> list[float]:
        return images.mean(dim=(1, 2, 3)).tolist()

    def instant(images: Tensor, prompts: list[str]) -> list[float]:
        return images.mean(dim=(1, 2, 3)).tolist()

    def fastest(reward: Callable[..., Any]) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            return min(seconds_of_steps(options, ["dm", (reward, 0.1)], folder))

    (without, _), (no_wait, _), (with_it, waited) = fastest(instant), fastest(at_once), fastest(asked)
    row = {
        "batch": options.batch,
        "reward_s": options.seconds,
        "step_without_s": round(without, 3),
        "step_at_once_s": round(no_wait, 3),
        "step_with_s": round(with_it, 3),
        "waited_s": round(waited, 3),
        "share": round(waited / options.seconds, 3),
        "hides": without > options.seconds,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
