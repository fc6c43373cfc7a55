"""Distribution matching on a teacher in closed form, where the student's true KL divergence can be measured.

    OMP_NUM_THREADS=1 python benchmarks/mixture.py --out benchmarks/results    # every cell, five seeds: 15 minutes
    python benchmarks/mixture.py --only dmd2 gndm                              # some cells
    python benchmarks/mixture.py --smoke                                       # half a minute, to see that it runs

The teacher is a Gaussian mixture per prompt, with its exact posterior mean as the denoiser; student and critic are
small networks that start as its approximation. A step is the trainer's (`RDMTrainer.training_step`): its rollouts, its
`dm` reward, its group statistics; only the model and the optimizers' plumbing are this file's. Cells compare at equal
teacher forwards. Each run is one line of `<out>/mixture.jsonl`, written as it ends; runs that are there are not
repeated. The recipe (critic steps, critic rate, decay of both rates, budget) was chosen on `dmd2` alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rdm_sdk.method.draws import Spread, draw_steps, draw_uniform
from rdm_sdk.method.groups import Normalization
from rdm_sdk.method.importance import effective_sample_size, truncated_weights
from rdm_sdk.method.losses import pathwise_loss
from rdm_sdk.method.matching import denoising_loss
from rdm_sdk.method.noise import FlowSchedule, add_noise, per_sample, to_x_0
from rdm_sdk.method.objective import normalize
from rdm_sdk.method.sampling import FewStepPolicy, StudentOf, plan_steps, redraw, rollout, sample, state_log_ratio
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.context import TEACHER, DiffusionContext
from rdm_sdk.rewards.dm import DistributionMatching
from rdm_sdk.types import Denoiser, Rollout, select_steps

DIMENSIONS, PROMPTS, MODES = 8, 4, 2
WIDTH, BATCH, PRETRAINING_RATE = 64, 64, 3e-3
MIN_SIGMA, MAX_SIGMA = 0.02, 0.98  # RDMConfig's defaults, like the next line's
IMPORTANCE_CAP, MIN_EFFECTIVE_SHARE, MAX_GRAD_NORM = 2.0, 0.5, 1.0
BUDGET = 10_240
"""Teacher forwards of a run: 160 student steps of one draw."""
COSTS = ("teacher_forwards", "rollouts", "student_forwards", "critic_steps", "student_steps")
CURVE_POINTS = 6
SAMPLES_PER_PROMPT = 1000
NEIGHBOR = 4
SCHEDULE, CPU = FlowSchedule(), torch.device("cpu")
POLICY = FewStepPolicy(SCHEDULE, (1.0, 0.75, 0.5, 0.25))


@dataclass(frozen=True)
class MixtureCell:
    """One setting of the method; the defaults are the preset `dmd2`."""

    name: str
    normalization: Normalization = "sample"
    spread: Spread = "free"
    step_spread: Spread | None = None  # None is `spread`, as in the trainer
    critic_correction: Literal["group", "others", "none"] = "none"
    group_size: int = 1  # G
    num_draws: int = 1  # M; a step costs M teacher forwards per sample, so steps fall by M
    learning_rate: float = 2e-3
    critic_learning_rate: float = 3e-3
    critic_steps: int = 5
    num_iterations: int = 1  # student updates per rollout
    importance_sampling_correction: bool = True


@dataclass(frozen=True)
class Teacher:
    """A mixture of K isotropic Gaussians for each of P prompts, in D dimensions.

    Methods take points `[N, D]`, their prompts (int64 `[N]`) and noise levels `[N]`; level 0 is the data.
    """

    weights: Tensor  # [P, K], each row summing to 1
    means: Tensor  # [P, K, D]
    stds: Tensor  # [P, K]

    def sample(self, prompts: Tensor) -> Tensor:
        """Draw clean points `[N, D]` for prompts `[N]`."""
        mode = torch.multinomial(self.weights[prompts], 1)[:, 0]
        return self.means[prompts, mode] + self.stds[prompts, mode, None] * torch.randn(len(prompts), DIMENSIONS)

    def _joint(self, x_t: Tensor, prompts: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log(weight_k N(x_t; noised mode k)) and variances `[N, K]`, and residuals `[N, K, D]`."""
        alpha = SCHEDULE.alpha(sigma)[:, None]
        variance = (alpha * self.stds[prompts]).square() + sigma[:, None].square()
        residual = x_t[:, None] - alpha[:, :, None] * self.means[prompts]
        exponent = residual.square().sum(2) / variance + x_t.shape[1] * (2 * torch.pi * variance).log()
        return self.weights[prompts].log() - 0.5 * exponent, variance, residual

    def log_prob(self, x_0: Tensor, prompts: Tensor) -> Tensor:
        """Return the log-density of clean points, `[N]`."""
        return self._joint(x_0, prompts, torch.zeros(len(x_0)))[0].logsumexp(1)

    def denoise(self, x_t: Tensor, prompts: Tensor, sigma: Tensor) -> Tensor:
        """Return the posterior mean E[x_0 | x_t] `[N, D]`."""
        joint, variance, residual = self._joint(x_t, prompts, sigma)
        gain = SCHEDULE.alpha(sigma)[:, None] * self.stds[prompts].square() / variance
        return (joint.softmax(1)[:, :, None] * (self.means[prompts] + gain[:, :, None] * residual)).sum(1)

    def mode_masses(self, x_0: Tensor, prompts: Tensor) -> Tensor:
        """Return the share of each prompt's points in each mode `[P, K]`, by posterior responsibility."""
        responsibility = self._joint(x_0, prompts, torch.zeros(len(x_0)))[0].softmax(1)
        return torch.stack([responsibility[prompts == p].mean(0) for p in range(len(self.weights))])


@cache
def make_teacher() -> Teacher:
    """Return the study's teacher, the same for every run: uneven masses and widths, about unit variance."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(PROMPTS, MODES, DIMENSIONS, generator=generator)
    weights = torch.tensor([0.7, 0.3]).expand(PROMPTS, MODES)
    stds = torch.tensor([0.3, 0.4, 0.5, 0.7])[:, None].expand(PROMPTS, MODES)  # prompts differ in their scale
    return Teacher(weights, means, stds)


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
def pretrained(seed: int, steps: int = 1500) -> Network:
    """Return a network trained to denoise teacher samples; student and critic start as copies of it."""
    torch.manual_seed(seed)
    network, teacher, batch = Network(), make_teacher(), 512
    optimizer = _adam(network)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        prompts = torch.randint(PROMPTS, (batch,))
        x_0, sigma = teacher.sample(prompts), MIN_SIGMA + (1 - MIN_SIGMA) * draw_uniform("stratified", batch, 1, CPU)
        denoised = network(add_noise(SCHEDULE, x_0, torch.randn_like(x_0), sigma), prompts, sigma)
        _update(optimizer, denoising_loss(SCHEDULE, x_0, denoised, sigma).mean())
        scheduler.step()
    return network


def _adam(network: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(network.parameters(), lr=PRETRAINING_RATE, fused=True)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
    optimizer.step()


def divergence(x_0: Tensor, prompts: Tensor) -> float:
    """Estimate KL(student || teacher) in nats from samples `[N, D]` of prompts `[N]`, averaged over prompts.

    The cross-entropy is the mean of the exact teacher log-density; the entropy is the k-nearest-neighbor estimate of
    Kozachenko and Leonenko (1987) in the form of Kraskov et al. (arXiv cond-mat/0305641, eq. 20), with k = `NEIGHBOR`:
    H = psi(N) - psi(k) + log V_D + D mean log rho_k. It is the estimator of Wang, Kulkarni and Verdu (2009) with the
    second density known. Its bias at zero divergence is measured by `floor()` on teacher samples.
    """
    volume = 0.5 * DIMENSIONS * math.log(math.pi) - math.lgamma(0.5 * DIMENSIONS + 1)
    total = 0.0
    for p in range(PROMPTS):
        own = x_0[prompts == p].double()
        distance = torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist")
        radius = distance.topk(NEIGHBOR + 1, largest=False).values[:, -1].clamp_min(1e-12)  # the first is the point
        count, k = (torch.tensor(float(n), dtype=torch.float64) for n in (len(own), NEIGHBOR))
        entropy = count.digamma() - k.digamma() + volume + DIMENSIONS * radius.log().mean()
        cross = -make_teacher().log_prob(own.float(), torch.full((len(own),), p)).double().mean()
        total += float(cross - entropy) / PROMPTS
    return total


def quality(x_0: Tensor, prompts: Tensor) -> dict[str, float]:
    """Return the estimated KL and the total variation between the mode masses of samples and teacher."""
    teacher = make_teacher()
    missed = 0.5 * (teacher.mode_masses(x_0, prompts) - teacher.weights).abs().sum(1).mean()
    return {"kl": divergence(x_0, prompts), "mode_tv": float(missed)}


@cache
def floor(seed: int = 0, per_prompt: int = SAMPLES_PER_PROMPT) -> dict[str, float]:
    """Return what `quality` says of the teacher's own samples."""
    torch.manual_seed(seed)
    prompts = torch.arange(PROMPTS).repeat_interleave(per_prompt)
    return quality(make_teacher().sample(prompts), prompts)


def student_quality(student: Network, per_prompt: int) -> dict[str, float]:
    """Judge the student's samples from the same noise every time, without a trace in the random state."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(12345)
        prompts = torch.arange(PROMPTS).repeat_interleave(per_prompt)
        x_0 = sample(lambda x_t, sigma: student(x_t, prompts, sigma), torch.randn(len(prompts), DIMENSIONS), POLICY)
        return quality(x_0, prompts)


@dataclass(frozen=True)
class Replay:
    """A rollout in one of its uses: `types.Experience` without what only whole models need."""

    prompts: Tensor  # int64 [N], group-major
    rollout: Rollout
    plan: Tensor  # the step k that each sample is trained at in each use, int64 [num_iterations, N]
    use: int
    weights: Tensor  # importance weights of this use's states, [N]; exactly 1 in the first use


class Run:
    """One student in training; the methods are those of `RDMTrainer`, for one micro-batch per step."""

    def __init__(self, cell: MixtureCell, start: Network) -> None:
        self.cell = cell
        self.networks = {"student": copy.deepcopy(start), "fake": copy.deepcopy(start)}
        self.optimizers = {role: _adam(network) for role, network in self.networks.items()}  # `decay` sets the rates
        self.reward = DistributionMatching()
        self.replay: Replay | None = None
        self.costs = Counter(dict.fromkeys(COSTS, 0))
        self.effective_shares: list[float] = []

    def denoiser(self, role: str, prompts: Tensor) -> Denoiser:
        """Return a role's denoiser for prompts `[N]`; it counts its evaluations."""

        def denoise(x_t: Tensor, sigma: Tensor) -> Tensor:
            if role == TEACHER:
                self.costs["teacher_forwards"] += len(x_t)
                return make_teacher().denoise(x_t, prompts, sigma)
            self.costs["student_forwards"] += len(x_t) if role == "student" else 0
            return torch.as_tensor(self.networks[role](x_t, prompts, sigma))

        return denoise

    def student_of(self, prompts: Tensor) -> StudentOf:
        return lambda rows: self.denoiser("student", prompts[rows])

    def batch(self, replay: Replay, x_0: Tensor) -> RewardBatch:
        """Return the latest samples as the `dm` reward sees them, with fresh renoising draws."""
        cell, names = self.cell, [""] * BATCH  # `dm` knows prompts only through its denoisers
        denoiser, times = partial(self.denoiser, prompts=replay.prompts), (MIN_SIGMA, MAX_SIGMA)
        context = DiffusionContext(
            schedule=SCHEDULE,
            denoiser=denoiser,
            min_time=MIN_SIGMA,
            max_time=MAX_SIGMA,
            num_draws=cell.num_draws,
            spread=cell.spread,
            critic_correction=cell.critic_correction,
            critic_times=times,
        )
        return RewardBatch(
            latents=x_0.detach(),
            prompts=names,
            group_size=cell.group_size,
            decode=lambda x: x,
            context=context,
            weights=replay.weights,
        )

    def collect(self) -> Replay:
        """Roll the student out; every batch holds the prompts in equal shares, whatever the group size."""
        cell, groups = self.cell, BATCH // self.cell.group_size
        prompts = (torch.arange(groups) % PROMPTS).repeat_interleave(cell.group_size)
        first = draw_steps(cell.step_spread or cell.spread, groups, cell.group_size, POLICY.num_steps, CPU)
        plan = plan_steps(first, cell.num_iterations, POLICY.num_steps)
        done = rollout(self.student_of(prompts), torch.randn(BATCH, DIMENSIONS), plan[0] + 1, POLICY)
        self.costs["rollouts"] += BATCH
        return Replay(prompts, done, plan, 0, torch.ones(BATCH))

    def reuse(self) -> Replay | None:
        """Return the stored rollout for one more use, or None if it is used up or too stale."""
        own = self.replay
        if own is None or own.use + 1 >= self.cell.num_iterations:
            return None
        own = replace(own, use=own.use + 1)
        if not self.cell.importance_sampling_correction:
            return own
        ratios = state_log_ratio(self.student_of(own.prompts), own.rollout, own.plan[own.use], POLICY, "sum")
        self.effective_shares.append(float(effective_sample_size(ratios.exp())) / BATCH)
        if not self.effective_shares[-1] >= MIN_EFFECTIVE_SHARE:
            return None
        return replace(own, weights=truncated_weights(ratios, IMPORTANCE_CAP))

    def decay(self, share: float) -> None:
        """Set both learning rates to a share of the cell's."""
        self.optimizers["student"].param_groups[0]["lr"] = share * self.cell.learning_rate
        self.optimizers["fake"].param_groups[0]["lr"] = share * self.cell.critic_learning_rate

    def step(self) -> None:
        """Roll out or reuse, train the critic on the student's samples as they are now, and update the student."""
        replay = self.replay = self.reuse() or self.collect()
        steps = replay.plan[replay.use]
        student = self.denoiser("student", replay.prompts)
        x_0 = student(select_steps(replay.rollout.states, steps), POLICY.levels(steps))
        if replay.use:
            redraw(replay.rollout, x_0.detach(), steps, POLICY)
        for _ in range(self.cell.critic_steps):
            _update(self.optimizers["fake"], self.reward.training_loss(self.batch(replay, x_0)))
            self.costs["critic_steps"] += 1
        with torch.no_grad():
            output = self.reward.field(self.batch(replay, x_0))
        (field,) = normalize({"dm": output}, self.cell.group_size, self.cell.normalization).values()
        weighted = per_sample(replay.weights, field) * field
        _update(self.optimizers["student"], pathwise_loss(x_0, weighted))
        self.costs["student_steps"] += 1


def run_cell(
    cell: MixtureCell, seed: int, teacher_forwards: int = BUDGET, per_prompt: int = SAMPLES_PER_PROMPT
) -> dict[str, object]:
    """Train one cell on a budget of teacher forwards and return its costs and quality.

    `curve` holds `CURVE_POINTS` records over the run, the first from before training; `kl` and `mode_tv` are the last
    one's, `best_kl` the curve's lowest after the start. They are None once the student's samples are not finite.
    """
    lowest = floor(seed, per_prompt)["kl"]
    start = pretrained(seed)
    torch.manual_seed(1000 + seed)
    run, started = Run(cell, start), time.perf_counter()
    num_steps = teacher_forwards // (BATCH * cell.num_draws)
    marks = {round(num_steps * i / (CURVE_POINTS - 1)) for i in range(1, CURVE_POINTS)}
    curve: list[dict[str, float | None]] = [{"student_steps": 0, **student_quality(start, per_prompt)}]
    for i in range(1, num_steps + 1):
        run.decay(1 - (i - 1) / num_steps)
        run.step()
        if i in marks:
            found = student_quality(run.networks["student"], per_prompt)
            finite = math.isfinite(found["kl"])
            curve.append({"student_steps": i, **{k: v if finite else None for k, v in found.items()}})
    known, shares = [point["kl"] for point in curve[1:] if point["kl"] is not None], run.effective_shares
    result = asdict(cell) | {"seed": seed, "budget": teacher_forwards, "floor_kl": lowest, "start_kl": curve[0]["kl"]}
    result |= {"kl": curve[-1]["kl"], "best_kl": min(known, default=None), "mode_tv": curve[-1]["mode_tv"]}
    result |= dict(run.costs) | {"effective_share": sum(shares) / len(shares) if shares else None, "curve": curve}
    return result | {"seconds": round(time.perf_counter() - started, 2)}


RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
DMD2 = MixtureCell("dmd2")
STRATIFIED = replace(DMD2, name="stratified", spread="stratified", group_size=8)
GNDM = replace(STRATIFIED, name="gndm", critic_correction="others")
WHOLE = replace(GNDM, name="gndm_whole", critic_correction="group")
SHARED = replace(STRATIFIED, name="shared", spread="shared")
GNDM_SHARED = replace(GNDM, name="gndm_shared", spread="shared")
SWEPT = (DMD2, STRATIFIED, GNDM, WHOLE, SHARED, GNDM_SHARED)
ONE_STEP = replace(GNDM, name="gndm_one_step", step_spread="shared")  # is it the step or the level that one shares?
FREE = replace(DMD2, name="free", group_size=8)
SHORT = {"num_draws": "M", "group_size": "G", "learning_rate": "lr", "num_iterations": "uses", "critic_steps": "critic"}


def _named(base: MixtureCell, **fields: Any) -> MixtureCell:
    """Return a cell that differs from `base` in some fields, named after their values."""
    suffix = "_".join(f"{SHORT.get(field, '')}{value}" for field, value in fields.items())
    return replace(base, name=f"{base.name}_{suffix}", **fields)


CELLS_A = [
    # Draws and correction apart: free draws without it are `dmd2`, stratified ones `stratified`.
    *(*SWEPT, _named(GNDM, spread="free")),
    # Group statistics, beside DMD2's free draws and beside everything of GNDM.
    *(_named(base, normalization=n) for base in (FREE, GNDM) for n in ("group", "batch", "rms")),
    *(_named(base, normalization="group", learning_rate=rate) for base in (FREE, GNDM) for rate in (4e-3, 8e-3)),
    *(_named(base, num_draws=m) for base in (DMD2, GNDM) for m in (2, 4)),
    *(_named(GNDM, group_size=g) for g in (1, 4, 16)),
    *(_named(ONE_STEP, learning_rate=rate) for rate in (2e-3, 8e-3, 1.6e-2)),
    *(_named(base, critic_steps=1) for base in SWEPT),  # a critic that lags: the correction's case
    *(_named(base, learning_rate=rate) for base in SWEPT for rate in RATES if rate != 2e-3),
]
"""Question a: what GNDM's parts are worth, and at which learning rate each variant breaks."""
CELLS_C = [
    _named(base, num_iterations=uses)
    for base in (STRATIFIED, replace(STRATIFIED, name="unweighted", importance_sampling_correction=False))
    for uses in (2, 4, 8)
]
"""Question c: student updates per rollout, with and without importance weights; one update is `stratified`."""
CELLS = CELLS_A + CELLS_C


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/study"), help="folder of mixture.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    names = [cell.name for cell in CELLS]
    parser.add_argument("--only", nargs="+", metavar="NAME", default=names, choices=names, help="cells; all by default")
    parser.add_argument("--smoke", action="store_true", help="one seed, a few steps, few samples")
    options = parser.parse_args()
    cells = [cell for cell in CELLS if cell.name in options.only]
    smoke = (BATCH * 2 * CURVE_POINTS, 100)
    seeds, size = (options.seeds[:1], smoke) if options.smoke else (options.seeds, (BUDGET, SAMPLES_PER_PROMPT))
    torch.set_num_threads(1)  # small tensors: more threads only cost
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "mixture.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    done = {(row["name"], row["seed"], row["budget"]) for row in rows}
    # Seeds outside, so that a pretrained network serves all cells and a part of the study compares all of them.
    todo = [(cell, seed) for seed in seeds for cell in cells if (cell.name, seed, size[0]) not in done]
    for cell, seed in (progress := tqdm(todo)):
        row = run_cell(cell, seed, *size)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        progress.set_postfix_str(f"{cell.name}: {row['kl']}")


if __name__ == "__main__":
    main()
