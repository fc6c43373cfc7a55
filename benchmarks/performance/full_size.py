"""Memory and time of a training step at the shapes of published models, with random weights, on one GPU.

    python benchmarks/performance/full_size.py --out build/full_size.jsonl              # all runs; resumable
    python benchmarks/performance/full_size.py --out build/full_size.jsonl --only "sd3*"
    python benchmarks/performance/full_size.py --without_cudnn_attention --out build/without.jsonl
    python benchmarks/performance/full_size.py --table benchmarks/results/full_size.jsonl      # as Markdown
    python benchmarks/performance/full_size.py --smoke --out build/smoke.jsonl   # seconds, to see that it runs

Every run takes three optimizer steps (the first warms up and is not timed), and says beside what it took: what
`rdm-sdk plan` had said of its memory, and how long the bare passes of such a step take. The bare passes are timed on
the backbone alone, with the inputs that it got in the run: forwards without gradients, as the teacher, and forwards
with backwards, as the student; as many as the run counts. What a step takes above that is VAE and rewards, the
adapters of student and critic where these are evaluated, optimizer, and small work that Python starts.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback
from true_shapes import random_family, write_configs

from rdm_sdk import Capabilities, RDMConfig, RDMTrainer, Reward, RewardBatch, markdown_table
from rdm_sdk.planning.plan import GB, PlannedRun
from rdm_sdk.planning.rehearsal import Rehearsal

STEPS = 3
PROMPTS = [f"prompt {i}" for i in range(8)]
COMMON: dict[str, Any] = {
    "bf16": True,
    "activation_checkpointing": True,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "critic_steps": 1,
    "guidance_scale": 5.0,
    "max_steps": STEPS,
    "ema_decay": 0.0,  # no default when the first rows were measured
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
LARGE: dict[str, Any] = {"height": 1024, "width": 1024}
FAMILIES: dict[str, tuple[str, dict[str, None]]] = {
    "sd3": ("StableDiffusion3Pipeline", {"text_encoder_3": None}),  # without its T5, as many run it
    "sdxl": ("StableDiffusionXLPipeline", {}),
    "flux": ("FluxPipeline", {}),
}


class Brightness(Reward):
    """Mean brightness: a pixel reward that costs nothing itself, so that the VAE's part is seen alone."""

    capabilities = Capabilities(gradient="autograd")

    def score(self, batch: RewardBatch) -> Tensor:
        return batch.images.mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Run:
    """One set of settings on one model."""

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    brightness: float = 0.0
    """Weight of the pixel reward beside `dm`."""

    def config(self, folder: str, device: str) -> RDMConfig:
        """Return the settings of the run on a device."""
        settings: dict[str, Any] = {"use_cpu": device == "cpu"} | COMMON | LARGE | self.settings
        return RDMConfig(output_dir=folder, **settings)

    def rewards(self) -> Any:
        """Return what is maximized."""
        return ["dm", (Brightness(), self.brightness)] if self.brightness else "dm"


whole, half = {"activation_checkpointing": False}, {"per_device_train_batch_size": 4}
RUNS = [
    Run("sd3, batch 8", "sd3"),
    Run("sd3, batch 4, whole graph", "sd3", whole | half),
    Run("sdxl, batch 8", "sdxl"),
    Run("sdxl, batch 4, whole graph", "sdxl", whole | half),
    Run("flux, batch 4", "flux", half),
    Run("sd3, batch 8, 5 critic steps", "sd3", {"critic_steps": 5}),
    Run("sd3, batch 4, pixel reward", "sd3", half | {"reward_batch_size": 1}, 0.1),
    Run("sd3, batch 4, pixel reward tilts", "sd3", half | {"reward_batch_size": 1, "reward_route": "tilt"}, 0.1),
    Run("sd3, batch 4, full copies", "sd3", half | {"student_weights": "full", "critic_weights": "full"}),
    Run("sd3, batch 8, 4 uses", "sd3", {"num_iterations": 4}),
    Run("sd3, batch 8, fresh critic rollouts", "sd3", {"critic_rollouts": "fresh"}),
    Run("sd3, batch 8, whole graph", "sd3", whole),
    Run("sdxl, batch 8, 5 critic steps", "sdxl", {"critic_steps": 5}),
]
"""The most telling ones first."""
SMOKE = Run("sd3, tiny", "sd3", {"height": 64, "width": 64, "reward_batch_size": 1, "critic_steps": 2}, 0.1)


class Times(TrainerCallback):
    """Seconds of every optimizer step, with all work on the device done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self.begin)


def shapes_of(folder: Path, family: str, tiny: bool = False) -> str:
    """Write the configs of a family that runs name; return their folder."""
    kind, without = FAMILIES[family]
    return write_configs(folder / family, kind, tiny, **without)


@cache
def measured_of(configs: str) -> dict[str, Rehearsal]:
    """Return what is kept of a model's plans, so that each kind of pass is measured once."""
    return {}


def measure(run: Run, configs: str, device: str = "cuda") -> dict[str, Any]:
    """Plan a run of the model in the folder `configs`, do it, and time the bare passes of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        args = run.config(folder, device)
        plan = PlannedRun(configs, args, run.rewards(), rehearsals=measured_of(configs)).plan()
        base = random_family(configs, device)
        _start_counting()
        trainer = RDMTrainer(base, run.rewards(), args, PROMPTS)
        times = Times()
        trainer.add_callback(times)
        inputs = _inputs_of_a_pass(trainer, args.per_device_train_batch_size)
        trainer.train()
    allocated, reserved = _counted()
    costs = trainer.costs()
    del trainer.optimizer
    bare = _bare_passes(trainer, inputs, costs)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    rest = plan.total - (plan.bytes_of("activations") or 0)
    return {
        "run": run.name,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "peak": plan.peak,
        "planned_gb": plan.total / GB,
        "allocated_gb": allocated / GB,
        "reserved_gb": reserved / GB,
        "planned_activations_gb": (plan.bytes_of("activations") or 0) / GB,
        "allocated_activations_gb": (allocated - rest) / GB,
        "step_s": sum(times.seconds[1:]) / (STEPS - 1),
        **bare,
        "costs": costs,
        "losses": losses,
    }


def _inputs_of_a_pass(trainer: RDMTrainer, batch: int) -> dict[str, Any]:
    """Return a dict that the first pass of a whole batch fills with what the backbone was told."""
    seen: dict[str, Any] = {}

    def keep(module: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if not seen and len(next(value for value in inputs.values() if isinstance(value, Tensor))) == batch:
            seen.update(inputs)

    trainer.roles.register_forward_pre_hook(keep, with_kwargs=True)
    return seen


def _bare_passes(trainer: RDMTrainer, inputs: dict[str, Any], costs: dict[str, int]) -> dict[str, float]:
    """Time forwards, and forwards with backwards, of a whole batch; and say what a step's would take."""
    args, roles = trainer.args, trainer.roles

    @torch.no_grad()
    def evaluate() -> None:
        roles("teacher", **inputs)

    def learn() -> None:
        roles("student", **inputs).float().mean().backward()

    evaluation, learning = _time(evaluate), _time(learn)
    with FlopCounterMode(display=False) as counter:
        evaluate()
    passes = sum(n for name, n in costs.items() if name.endswith("_forwards")) / args.per_device_train_batch_size
    learned = STEPS + costs["cost/critic_steps"]  # each pass of the student's and the critic's updates
    return {
        "evaluation_s": evaluation,
        "learning_s": learning,
        "tflops": counter.get_total_flops() / evaluation / 1e12,
        "bare_s": ((passes - learned) * evaluation + learned * learning) / STEPS,
    }


def _time(work: Callable[[], None], repeats: int = 2) -> float:
    work()
    _wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait()
    return (time.perf_counter() - begin) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _start_counting() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _counted() -> tuple[int, int]:
    """Return the peaks of what tensors take, and of what the allocator holds for them."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def table(rows: list[dict[str, Any]]) -> str:
    """Return results as Markdown."""
    header = ("run", "cuDNN's attention", "planned GB", "allocated GB", "reserved GB", "s / step", "bare passes, s")
    lines = [
        (
            row["run"],
            "on" if row["cudnn_attention"] else "off",
            *(f"{row[name]:.1f}" for name in ("planned_gb", "allocated_gb", "reserved_gb")),
            f"{row['step_s']:.2f}",
            f"{row['bare_s']:.2f}",
            f"{row['tflops']:.0f}",
        )
        for row in rows
    ]
    return markdown_table((*header, "TFLOP/s of a forward"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/full_size.jsonl"))
    parser.add_argument("--only", nargs="+", default=["*"], help="names of runs, with wildcards")
    parser.add_argument("--without_cudnn_attention", action="store_true", help="let PyTorch take another kernel")
    parser.add_argument("--smoke", action="store_true", help="one run at tiny shapes, with or without a GPU")
    parser.add_argument("--table", type=Path, help="print the results in this file, and run nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        parser.error("these runs need a CUDA device; --smoke does not")
    if options.without_cudnn_attention:
        torch.backends.cuda.enable_cudnn_sdp(False)
    runs = [run for run in RUNS if any(fnmatchcase(run.name, pattern) for pattern in options.only)]
    run_all([SMOKE] if options.smoke else runs, options.out, device)


def run_all(runs: Sequence[Run], out: Path, device: str) -> None:
    """Do the runs that are not in the file of results yet, and add each to it as it ends."""
    out.parent.mkdir(parents=True, exist_ok=True)
    there = out.read_text().splitlines() if out.exists() else []
    done = {json.loads(line)["run"] for line in there}
    with tempfile.TemporaryDirectory() as folder:
        for run in runs:
            if run.name not in done:
                begin = time.perf_counter()
                result = measure(run, shapes_of(Path(folder), run.family, tiny=run is SMOKE), device)
                with out.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{table([result]).splitlines()[-1]} in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
