"""Other ways to estimate the gradient of distribution matching, each in the place of `dm` or beside it.

    python benchmarks/study/estimators.py run                    # three to six minutes a run, two at a time; resumable
    python benchmarks/study/estimators.py run --only "sid*" --seeds 0
    python benchmarks/study/estimators.py report                 # a table on the standard output

Runs are those of `convergence.py` (150 updates, measured from the same noise for a seed), and compared with its rows.
Nothing here is in the package: what does not pay stays out of it (docs/convergence.md).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parents[1]))

import convergence
from intervals import estimate

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardOutput, markdown_table
from rdm_sdk.method.matching import residual_magnitude
from rdm_sdk.method.noise import per_sample
from rdm_sdk.rewards.context import Renoised, contrast
from rdm_sdk.rewards.dm import DistributionMatching

RESULTS = convergence.RESULTS.with_name("estimators.jsonl")
UPDATES, EVERY = convergence.SHORT, 50
BASELINES = (convergence.ALONE, "gndm preset, rate 0.0005, critics 4 times", "full weights, rate 0.0003")
"""Runs of `convergence.py` that these are compared with."""
FULL: dict[str, Any] = {"student_weights": "full", "critic_weights": "full", **convergence.at_rate(3e-4, 4)}
"""Full weights of student and critic, at the best of their rates (docs/convergence.md)."""


class ScoreIdentity(DistributionMatching):
    """SiD's gradient (arXiv 2404.04057): that of a Fisher divergence, through both networks.

    With d = D_real(x_t) - D_fake(x_t) the loss is d (D_real - x_0 - alpha d), summed over a sample; its gradient at x_0
    goes through x_t into both predictions. Were they constant in x_t, it would be -d, that of distribution matching.
    """

    class Config(RewardConfig):
        alpha: float = 1.2

    def field(self, batch: RewardBatch) -> RewardOutput:
        context, x_0 = batch.require_context(self.name), batch.latents
        renoised = context.renoise(x_0, batch.group_size)
        with torch.enable_grad():
            leaf = x_0.detach().requires_grad_()
            signal = per_sample(context.schedule.alpha(renoised.sigma), x_0)
            x_t = renoised.x_t + signal * (leaf - x_0.detach())
            # A context hands denoisers out without graphs; this estimator is the one that needs them.
            real, fake = (
                getattr(denoiser, "__wrapped__", denoiser)(x_t, renoised.sigma)
                for denoiser in map(context.denoiser, ("teacher", "fake"))
            )
            assert real.requires_grad, "the teacher's graph is missing"
            assert fake.requires_grad, "the critic's graph is missing"
            loss = ((real - fake) * (real - leaf - self.config.alpha * (real - fake))).flatten(1).sum(1)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return RewardOutput(-loss.detach(), -gradient, residual_magnitude(x_0, real.detach()))


class Projected(DistributionMatching):
    """`dm` whose gradient is projected, or is not, wherever it is asked: PDMD's two parts, each without the other."""

    class Config(RewardConfig):
        projected: bool = True

    def field(self, batch: RewardBatch) -> RewardOutput:
        context = batch.require_context(self.name)

        def pair(renoised: Renoised) -> tuple[Tensor, Tensor]:
            return renoised.x_0("teacher"), renoised.x_0("fake")

        return contrast(context, batch.latents, batch.group_size, pair, projected=self.config.projected)


class ScoresOfMatching(Reward):
    """The scores of `dm` alone, for a route by advantages beside the gradient; it asks the same critic."""

    name = "scores"
    capabilities = Capabilities(space="latent", context=True, stochastic=True, parameters=0)

    def score(self, batch: RewardBatch) -> Tensor:
        return DistributionMatching().score(batch)


class PullCritic(TrainerCallback):
    """Implicit distribution alignment (arXiv 2506.00523): after each step the critic moves a little to the student."""

    def __init__(self, trainer: Any, share: float) -> None:
        self.trainer, self.share = trainer, share

    @torch.no_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        critic, student = (self.trainer.roles.parameters_of(role) for role in ("fake", "student"))
        shared = critic.keys() & student.keys()
        assert len(shared) == len(student), "student and critic are not the same network"
        for name in shared:
            critic[name].lerp_(student[name], self.share)


@dataclass(frozen=True)
class Estimator:
    """One way to estimate, run once per seed."""

    name: str
    rewards: Callable[[], Any] = lambda: "dm"
    settings: dict[str, Any] = field(default_factory=dict)
    rank: int = convergence.RANK
    pull: float = 0.0
    """By which share the critic moves to the student after each step."""
    updates: int = UPDATES
    warm: bool = False
    """Whether the student learns the ends of the teacher's flow first, for a third of the updates."""


def estimators() -> list[Estimator]:
    """Return all of them; none changes what it names."""
    both = convergence.at_rate(5e-4, 4) | {"reward_route": "gradient[scores=advantage]"}
    return [
        *(
            Estimator(
                f"sid, alpha {alpha:g}, rate {rate:g}",
                partial(ScoreIdentity, alpha=alpha),
                convergence.at_rate(rate, 4),
            )
            for alpha in (1.0, 1.2)
            for rate in (1e-3, 5e-4)
        ),
        *(
            Estimator(f"full weights, critic pulled by {share}", settings=FULL, rank=0, pull=float(share))
            for share in (".001", ".01", ".03", ".1")
        ),
        Estimator("warm start", warm=True),
        *(
            Estimator(f"pdmd at fresh noise, rate {rate:g}", Projected, convergence.at_rate(rate, 4))
            for rate in (1e-3, 5e-4)
        ),
        *(
            Estimator(f"60 updates, {name}", rewards, convergence.QUICK | settings, updates=convergence.SHORTEST)
            for name, rewards, settings in (
                ("pdmd at fresh noise, deterministic student", Projected, {"sampler": "ode"}),
                ("pdmd, not projected", partial(Projected, projected=False), convergence.PATH),
            )
        ),
        Estimator("dm by both ways", lambda: ["dm", ScoresOfMatching()], both),
    ]


def run(one: Estimator, seed: int, path: Path, updates: int, num_samples: int) -> None:
    """Train one student, and append its measurements to a file as they are made."""
    from peft import LoraConfig

    from rdm_sdk import RDMConfig, RDMTrainer, digits

    lora = critic = LoraConfig(r=one.rank, lora_alpha=one.rank) if one.rank else None
    settings = convergence.LINE | convergence.COMMON | one.settings | {"seed": seed}
    row: dict[str, Any] = {"cell": one.name, "seed": seed, "warm_costs": {}}
    with tempfile.TemporaryDirectory() as folder:
        if one.warm:
            warm = settings | {"output_dir": folder, "max_steps": updates // 3, "save_strategy": "no"}
            first = RDMTrainer(
                digits.teacher_path(), "flow[last_steps=4]", RDMConfig(**warm), digits.prompts(), peft_config=lora
            )
            started = time.process_time()
            first.train()
            first.save_model(f"{folder}/warm")
            row["warm_costs"] = first.costs() | {"cpu_seconds": time.process_time() - started}
            settings |= {"start_from": f"{folder}/warm"}
            updates, lora = updates - updates // 3, None
        config = RDMConfig(output_dir=f"{folder}/run", max_steps=updates, **settings)
        trainer = RDMTrainer(
            digits.teacher_path(), one.rewards(), config, digits.prompts(), peft_config=lora, fake_peft_config=critic
        )
        if one.pull:
            trainer.add_callback(PullCritic(trainer, one.pull))
        convergence.train(trainer, row, EVERY, path, num_samples)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the measurements of whole runs, each run's latest."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    latest = {(row["cell"], row["seed"], row["update"]): row for row in rows}
    whole = {key[:2] for key, row in latest.items() if row["last"]}
    return [row for key, row in latest.items() if key[:2] in whole]


def evaluations(row: dict[str, Any]) -> float:
    """Return the network evaluations of a run, forward passes in samples, a warm start's with them."""
    counts = [row["costs"], row.get("warm_costs", {})]
    return float(
        sum(cost.get(f"cost/{role}_forwards", 0) for cost in counts for role in ("student", "fake", "teacher"))
    )


def seconds(row: dict[str, Any]) -> float:
    """Return the processor's time of a run, a warm start's with it."""
    return float(row["cpu_seconds"] + row.get("warm_costs", {}).get("cpu_seconds", 0))


def report(path: Path) -> str:
    """Return a table of where runs end, `dm` alone of the same length and full weights among them."""
    named = {one.name for one in estimators()}
    peers = [row for row in convergence.read_rows(convergence.RESULTS) if row["cell"] in BASELINES]
    rows = [*peers, *(row for row in read_rows(path) if row["cell"] in named)]
    lines = []
    for cell in dict.fromkeys(row["cell"] for row in rows):
        last = sorted((row for row in rows if row["cell"] == cell and row["last"]), key=lambda row: row["seed"])
        by_step = [estimate(list(values)) for values in zip(*(row["FID-SD"] for row in last), strict=True)]
        lines.append(
            [
                cell,
                ", ".join(str(row["seed"]) for row in last),
                ", ".join(f"{own.mean:.3g}" for own in by_step),
                ", ".join(f"{row['FID-SD'][-1]:.1f}" for row in last),
                f"{estimate([row['diversity'] for row in last]).mean:.3f}",
                f"{estimate([evaluations(row) for row in last]).mean / 1e3:.0f},000",
                f"{estimate([seconds(row) for row in last]).mean:.0f}",
            ]
        )
    header = ("runs", "seeds", "FID-SD after each evaluation", "each seed's last", "diversity", "network evaluations")
    return markdown_table((*header, "CPU seconds"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train and measure what is missing")
    running.add_argument("--only", nargs="+", default=["*"], help="names, with * for anything")
    running.add_argument("--seeds", type=int, nargs="+", default=[0])
    running.add_argument("--processes", type=int, default=2)
    running.add_argument("--smoke", action="store_true", help="3 updates, few samples: does everything run?")
    commands.add_parser("report", help="print a table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.command == "report":
        print(report(options.out))
        return
    done = {(row["cell"], row["seed"]) for row in read_rows(options.out)}
    chosen = [one for one in estimators() if any(fnmatchcase(one.name, pattern) for pattern in options.only)]
    tasks = [(one, seed) for seed in options.seeds for one in chosen if (one.name, seed) not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, convergence.start_worker) as pool:
        pending = [
            pool.submit(run_named, one.name, seed, options.out, *((3, 250) if options.smoke else (one.updates, 1000)))
            for one, seed in tasks
        ]
        for future in tqdm(as_completed(pending), total=len(pending), unit="run"):
            future.result()


def run_named(name: str, *arguments: Any) -> None:
    """Run the estimator of a name, which a worker process can be told where its functions cannot."""
    run(next(one for one in estimators() if one.name == name), *arguments)


if __name__ == "__main__":
    main()
