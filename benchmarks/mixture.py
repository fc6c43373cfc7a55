"""Distribution matching on a teacher in closed form, where the student's true KL divergence can be measured.

    OMP_NUM_THREADS=1 python benchmarks/mixture.py --out benchmarks/results    # every cell, five seeds; resumable
    python benchmarks/mixture.py --only dmd2 gndm                              # some cells
    python benchmarks/mixture.py --smoke                                       # one short run each, to see that it runs

The teacher is a Gaussian mixture per prompt, with its exact posterior mean as the denoiser; student and critic are
small networks that start as its approximation. The step is the package's (`DistillationStep`): only the networks and
their optimizers are this file's. Cells compare at equal teacher forwards. Each run is one line of
`<out>/mixture.jsonl`, written as it ends; a run that is there with the same settings is not repeated. The recipe
(critic steps, critic rate, decay of both rates, budget) was chosen on `dmd2` alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gaussian_mixture import DIMENSIONS, PROMPTS, SCHEDULE, floor, make_teacher, quality
from mixture_cells import BATCH, COMMON, Cell, all_cells
from torch import Tensor, nn
from tqdm import tqdm

from rdm_sdk import RDMConfig, RDMError, RewardError
from rdm_sdk.method.draws import draw_uniform
from rdm_sdk.method.matching import denoising_loss
from rdm_sdk.method.noise import add_noise, to_x_0
from rdm_sdk.method.sampling import FewStepPolicy, sample
from rdm_sdk.rewards.context import TEACHER, DiffusionContext
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.step import DistillationStep
from rdm_sdk.types import Condition, Denoiser

WIDTH, PRETRAINING_RATE, MAX_GRAD_NORM = 64, 3e-3, 1.0
CURVE_POINTS = 6
CPU = torch.device("cpu")
POLICY = FewStepPolicy(SCHEDULE, (1.0, 0.75, 0.5, 0.25))


@dataclass(frozen=True)
class Size:
    """How long runs are."""

    teacher_forwards: int = 10_240
    """160 student steps of one draw."""
    samples_per_prompt: int = 1000
    pretraining: int = 1500


SMOKE = Size(BATCH * 2 * CURVE_POINTS, 100, 100)


class Network(nn.Module):
    """A conditional denoiser of `WIDTH` units that predicts the flow, as SD3 does."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [DIMENSIONS + PROMPTS + 3, WIDTH, WIDTH, WIDTH]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTH, DIMENSIONS))

    def forward(self, x_t: Tensor, prompts: Tensor, sigma: Tensor) -> Tensor:
        """Return x_0 `[N, D]` for `x_t` `[N, D]`, `prompts` int64 `[N]` and `sigma` `[N]`."""
        level = torch.stack([sigma, (4 * sigma).sin(), (4 * sigma).cos()], 1)
        flow = self.layers(torch.cat([x_t, nn.functional.one_hot(prompts, PROMPTS), level], 1))
        return to_x_0(SCHEDULE, "flow", flow, x_t, sigma)


@cache
def pretrained(seed: int, steps: int) -> Network:
    """Return a network trained to denoise teacher samples; student and critic start as copies of it."""
    torch.manual_seed(seed)
    network, teacher, batch, lowest = Network(), make_teacher(), 512, RDMConfig.min_time
    optimizer = torch.optim.Adam(network.parameters(), lr=PRETRAINING_RATE, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        prompts = torch.randint(PROMPTS, (batch,))
        x_0, sigma = teacher.sample(prompts), lowest + (1 - lowest) * draw_uniform("stratified", batch, 1, CPU)
        denoised = network(add_noise(SCHEDULE, x_0, torch.randn_like(x_0), sigma), prompts, sigma)
        denoising_loss(SCHEDULE, x_0, denoised, sigma).mean().backward()
        update(optimizer)
        scheduler.step()
    return network


def update(optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradients, step, and forget them."""
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


class MixtureModels:
    """Student and critic as small networks, beside the teacher in closed form: `rdm_sdk.training.models.Models`.

    Prompts are "0", "1", ...
    """

    policy, device = POLICY, CPU

    def __init__(self, start: Network) -> None:
        self.networks = {role: copy.deepcopy(start) for role in ("student", "fake")}
        self.forwards: Counter[str] = Counter()
        """Evaluations by role, in samples."""

    def encode(self, prompts: Sequence[str | None]) -> Condition:
        return {"prompt": torch.tensor([int(str(prompt)) for prompt in prompts])}

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return list(self.networks[role].parameters())

    def denoiser(self, role: str, condition: Condition, steps: Tensor | None = None) -> Denoiser:
        evaluate = make_teacher().denoise if role == TEACHER else self.networks[role]

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            self.forwards[role] += len(x_t)
            return torch.as_tensor(evaluate(x_t, condition["prompt"], sigma))

        return denoise

    def step_shape(self, step: int) -> tuple[int, ...]:
        return (DIMENSIONS,)

    def to_images(self, latents: Tensor) -> Tensor:
        raise RewardError("points of a mixture are no images; use rewards of latents")

    def vae_at_hand(self) -> nullcontext[None]:
        return nullcontext()

    def complete(self, context: DiffusionContext, condition: Condition) -> DiffusionContext:
        return context

    def quality(self, per_prompt: int) -> dict[str, float]:
        """Judge the student's samples from the same noise every time, without a trace in the random state."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(12345)
            prompts = torch.arange(PROMPTS).repeat_interleave(per_prompt)
            student = self.networks["student"]
            noise = torch.randn(len(prompts), DIMENSIONS)
            return quality(sample(lambda x_t, sigma: student(x_t, prompts, sigma), noise, POLICY), prompts)


class Run:
    """One student in training; every batch holds the prompts in equal shares, whatever the group size."""

    def __init__(self, cell: Cell, models: MixtureModels, num_steps: int) -> None:
        quiet: dict[str, Any] = {"use_cpu": True, "report_to": "none"}
        settings, self.num_steps = RDMConfig(**quiet, **(COMMON | cell.settings)), num_steps
        steps = copy.copy(settings)
        steps.spread = cell.step_spread or settings.spread
        # Noise levels are the judge's matter, trained steps the rollouts'.
        self.step = DistillationStep(Judge(models, resolve_rewards("dm"), settings), steps)
        self.rates = {"student": cell.content["learning_rate"], "fake": cell.content["critic_learning_rate"]}
        self.critic_steps = settings.critic_steps
        self.optimizers = {role: torch.optim.Adam(models.parameters_of(role), fused=True) for role in self.rates}
        groups = BATCH // settings.num_generations
        self.prompts = [str(group % PROMPTS) for group in range(groups) for _ in range(settings.num_generations)]

    def train_step(self, number: int) -> None:
        """Take one step of `num_steps`; both learning rates fall linearly to 0."""
        step = self.step
        for role, optimizer in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = (1 - number / self.num_steps) * self.rates[role]
        step.begin([{"prompts": self.prompts, "columns": {}}], number)
        for turn in range(self.critic_steps):
            for loss in step.critic_losses(turn):
                loss.backward()
            step.end_critics()
            update(self.optimizers["fake"])
        step.student_loss(0).loss.backward()
        step.end(number + 1)
        update(self.optimizers["student"])


def run_cell(cell: Cell, seed: int, size: Size) -> dict[str, object]:
    """Train one cell on a budget of teacher forwards and return its costs and quality.

    `curve` holds up to `CURVE_POINTS` records over the run, the first from before training; `kl` and `mode_tv` are the
    last one's, `best_kl` the curve's lowest after the start. A run that breaks off says why in `stopped`, and has no
    `kl`.
    """
    models = MixtureModels(pretrained(seed, size.pretraining))
    num_steps = size.teacher_forwards // BATCH
    torch.manual_seed(1000 + seed)
    run, started, stopped = Run(cell, models, num_steps), time.perf_counter(), ""
    marks = {round(num_steps * i / (CURVE_POINTS - 1)) for i in range(1, CURVE_POINTS)}
    curve = [{"student_steps": 0, **models.quality(size.samples_per_prompt)}]
    for number in range(num_steps):
        try:
            run.train_step(number)
        except RDMError as error:  # weights or losses that are no longer finite
            stopped = str(error)
            break
        if number + 1 in marks:
            curve.append({"student_steps": number + 1, **models.quality(size.samples_per_prompt)})
    known = [point["kl"] for point in curve[1:] if math.isfinite(point["kl"])]
    last: dict[str, Any] = {} if stopped or not math.isfinite(curve[-1]["kl"]) else curve[-1]
    spent = run.step.monitor.spent
    return {
        "name": cell.name,
        "seed": seed,
        "budget": size.teacher_forwards,
        "settings": cell.content,
        "floor_kl": floor(seed, size.samples_per_prompt)["kl"],
        "start_kl": curve[0]["kl"],
        **{figure: last.get(figure) for figure in ("kl", "mode_tv")},
        "best_kl": min(known, default=None),
        **{f"{role}_forwards": models.forwards[role] for role in ("teacher", "student", "fake")},
        "rollouts": spent["rollouts"],
        "critic_steps": spent["critic_steps"],
        "effective_share": run.step.monitor.averages().get("ratio/ess"),
        "curve": curve,
        "stopped": stopped,
        "seconds": round(time.perf_counter() - started, 2),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the raw results, none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/study"), help="folder of mixture.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    cells = {cell.name: cell for cell in all_cells()}
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(cells), choices=cells, help="cells")
    parser.add_argument("--smoke", action="store_true", help="one seed, a few steps, few samples")
    options = parser.parse_args()
    seeds, size = (options.seeds[:1], SMOKE) if options.smoke else (options.seeds, Size())
    torch.set_num_threads(1)  # small tensors: more threads only cost
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "mixture.jsonl"
    done = [(row["seed"], row["budget"], row["name"], row.get("settings")) for row in read_rows(path)]
    # Seeds outside, so that a pretrained network serves all cells and a part of the study compares all of them.
    todo = [(cells[name], seed) for seed in seeds for name in options.only]
    todo = [(own, seed) for own, seed in todo if (seed, size.teacher_forwards, own.name, own.content) not in done]
    for cell, seed in (progress := tqdm(todo)):
        row = run_cell(cell, seed, size)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        progress.set_postfix_str(f"{cell.name}: {row['kl']}")


if __name__ == "__main__":
    main()
