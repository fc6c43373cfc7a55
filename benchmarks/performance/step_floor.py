"""Time a full training cycle against the bare forwards and backwards that it has to do, in one run.

    OMP_NUM_THREADS=1 python benchmarks/performance/step_floor.py --batch 64 --cycles 10
    OMP_NUM_THREADS=1 python benchmarks/performance/step_floor.py --model sdxl --batch 16   # tiny, with random weights
    OMP_NUM_THREADS=1 python benchmarks/performance/step_floor.py --model flux --batch 16

The floor calls the network directly, with the same adapters, inputs, batch sizes and number of passes as one cycle: the
rollout to its end, `critic_steps` critic forwards and backwards, teacher and critic forwards, and the student's forward
and backward. No sampling, no noise, no losses beyond a mean, no optimizer, no Trainer. Cycles
and floors alternate, so that a busy machine slows both; times are of the processor (on a GPU, of the clock), and the
median of the pairs' ratios is reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from alternation import WARM_UP, Alternate
from true_shapes import random_family, write_configs

from rdm_sdk import RDMConfig, RDMTrainer, digits

KINDS = {"sd3": "StableDiffusion3Pipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}
"""Models with random weights that there are beside the digits teacher, a layer or two of everything."""


class Floor:
    """The bare passes of one cycle on a trainer's model, with the inputs that its first whole batch has."""

    def __init__(self, trainer: RDMTrainer) -> None:
        self.trainer, self.guided = trainer, trainer.models.guided
        self.critic_steps, self.steps = trainer.args.critic_steps, trainer.models.policy.num_steps
        self.inputs: dict[str, Any] = {}
        trainer.roles.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if not self.inputs and args == ("student",):
            self.inputs = {k: v.detach().clone() if torch.is_tensor(v) else v for k, v in inputs.items()}

    def run(self) -> None:
        """Do the passes; none before the first cycle has shown what their inputs are."""
        if not self.inputs:
            return
        for _ in range(self.steps):
            self._forward("student")
        for _ in range(self.critic_steps):
            self._backward("fake")
        for _ in range(2 if self.guided else 1):
            self._forward("teacher")
        self._forward("fake")
        self._backward("student")

    @torch.no_grad()
    def _forward(self, role: str) -> None:
        with self.trainer.roles.use(role):
            self.trainer.roles.backbone(**self.inputs, return_dict=False)

    def _backward(self, role: str) -> None:
        with self.trainer.roles.use(role):
            self.trainer.roles.backbone(**self.inputs, return_dict=False)[0].mean().backward()
        self.trainer.roles.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["digits", *KINDS], default="digits")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=1.5)
    options = parser.parse_args()
    tiny: dict[str, Any] = {} if options.model == "digits" else {"height": 64, "width": 64}
    lengths: dict[str, Any] = (
        {} if options.model == "sdxl" else {"max_sequence_length": 4 if options.model == "digits" else 32}
    )
    with tempfile.TemporaryDirectory() as folder:
        args = RDMConfig(
            output_dir=folder,
            max_steps=options.cycles + WARM_UP,
            per_device_train_batch_size=options.batch,
            guidance_scale=options.guidance_scale,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            **tiny,
            **lengths,
        )
        model: object = digits.teacher_path()
        if options.model != "digits":
            configs = write_configs(Path(folder) / options.model, KINDS[options.model], tiny=True)
            model = random_family(configs, str(args.device), torch.float32)
        trainer = RDMTrainer(model, "dm", args, digits.prompts())
        timer = Alternate(Floor(trainer).run)
        trainer.add_callback(timer)
        trainer.train()
    cycle, floor, ratio = timer.result()
    result = {"model": options.model, "batch": options.batch, "cycle_s": round(cycle, 4), "floor_s": round(floor, 4)}
    print(json.dumps(result | {"ratio": round(ratio, 4)}))


if __name__ == "__main__":
    main()
