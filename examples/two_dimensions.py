"""Networks of your own, and distribution matching to look at: a ring of Gaussians in two dimensions.

python examples/two_dimensions.py --output outputs/ring --steps 600 --batch 256

The teacher is known in closed form; student and critic are small networks that start as its approximation. Whatever has
the methods of `rdm_sdk.training.models.Models` can be distilled by `DistillationStep`. It writes `ring.gif`: gray are
the teacher's samples, red the student's after four evaluations, and lines show where R_dm pulls them, D_real - D_fake.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from shared import flags
from torch import Tensor, nn

from rdm_sdk import RDMConfig, RewardError
from rdm_sdk.method.noise import FlowSchedule, add_noise, to_x_0
from rdm_sdk.method.sampling import FewStepPolicy, sample
from rdm_sdk.rewards.context import DiffusionContext
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.step import DistillationStep
from rdm_sdk.types import Condition, Denoiser

SCHEDULE, STEPS, MODES, WIDTH = FlowSchedule(), 4, 8, 0.2
POLICY = FewStepPolicy(SCHEDULE, (1.0, 0.75, 0.5, 0.25))
ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
CENTERS = 1.4 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def teacher(x_t: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x_0 | x_t] of the ring, `[N, 2]`: each mode's posterior mean, weighed by how likely the mode is."""
    alpha, level = SCHEDULE.alpha(sigma)[:, None], sigma[:, None]
    variance = (alpha * WIDTH) ** 2 + level**2
    residual = x_t[:, None] - alpha[:, :, None] * CENTERS
    shares = (-0.5 * residual.square().sum(2) / variance).softmax(1)
    means = CENTERS + (alpha * WIDTH**2 / variance)[:, :, None] * residual
    return (shares[:, :, None] * means).sum(1)


def teacher_samples(count: int) -> Tensor:
    """Draw points `[N, 2]` of the ring."""
    return CENTERS[torch.randint(MODES, (count,))] + WIDTH * torch.randn(count, 2)


class Network(nn.Module):
    """A denoiser `[N, 2]` that predicts the flow, and may be told which of the student's steps made a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5 + STEPS, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)
        )

    def forward(self, x_t: Tensor, sigma: Tensor, steps: Tensor | None = None) -> Tensor:
        """Return x_0 for points `[N, 2]`, noise levels `[N]` and steps (int64 `[N]`, None for none)."""
        told = torch.zeros(len(x_t), STEPS)
        if steps is not None:
            told = nn.functional.one_hot(steps, STEPS).float()
        level = torch.stack([sigma, (4 * sigma).sin(), (4 * sigma).cos()], 1)
        return to_x_0(SCHEDULE, "flow", self.layers(torch.cat([x_t, level, told], 1)), x_t, sigma)


def pretrained(steps: int) -> Network:
    """Return a network that has learned to denoise the ring."""
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        x_0, sigma = teacher_samples(512), 0.02 + 0.98 * torch.rand(512)
        denoised = network(add_noise(SCHEDULE, x_0, torch.randn_like(x_0), sigma), sigma)
        (denoised - x_0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network


class RingModels:
    """The teacher and two networks, as the step asks for them: `rdm_sdk.training.models.Models`."""

    policy, device = POLICY, torch.device("cpu")

    def __init__(self, start: Network) -> None:
        self.networks = {"student": start, "fake": copy.deepcopy(start)}

    def encode(self, prompts: Sequence[str | None]) -> Condition:
        """Prompts say nothing here; a condition has a row for each all the same."""
        return {"nothing": torch.zeros(len(prompts), 1)}

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return list(self.networks[role].parameters())

    def denoiser(self, role: str, condition: Condition, steps: Tensor | None = None) -> Denoiser:
        if role == "teacher":
            return teacher
        network = self.networks[role]
        return lambda x_t, sigma: network(x_t, sigma, steps if role == "fake" else None)

    def step_shape(self, step: int) -> tuple[int, ...]:
        return (2,)

    def to_images(self, latents: Tensor) -> Tensor:
        raise RewardError("points are no images; use rewards of latents")

    def vae_at_hand(self) -> nullcontext[None]:
        return nullcontext()

    def complete(self, context: DiffusionContext, condition: Condition) -> DiffusionContext:
        return context


@torch.no_grad()
def picture(models: RingModels, size: int = 320) -> Image.Image:
    """Return a frame: the teacher's points, the student's, and R_dm's pull on them at the middle noise level."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # always the same noise, so that frames compare
        points = sample(models.networks["student"], torch.randn(300, 2), POLICY.inference())
        sigma, last = torch.full((300,), 0.5), torch.full((300,), STEPS - 1)
        x_t = add_noise(SCHEDULE, points, torch.randn_like(points), sigma)
        pulls = teacher(x_t, sigma) - models.networks["fake"](x_t, sigma, last)
        real = teacher_samples(600)

    frame = Image.new("RGB", (size, size), "white")
    drawing = ImageDraw.Draw(frame)

    def place(point: Tensor) -> tuple[float, float]:
        x, y = (size * (0.5 + point / 5)).tolist()
        return x, y

    for group, color, radius in ((real, "#b0b0b0", 1.5), (points, "#c0392b", 2.0)):
        for x, y in map(place, group):
            drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    for point, pull in zip(points, pulls, strict=True):
        drawing.line((*place(point), *place(point + pull)), fill="#2c3e50")
    return frame


def distill(models: RingModels, num_steps: int, batch: int, frame_every: int) -> list[Image.Image]:
    """Train the student, and return a frame of its start and one of every so many steps."""
    settings = RDMConfig(num_generations=8, critic_steps=5, use_cpu=True, report_to="none")
    step = DistillationStep(Judge(models, resolve_rewards("dm"), settings), settings)
    rates = {"student": 1e-3, "fake": 3e-3}
    optimizers = {
        role: torch.optim.Adam(models.parameters_of(role), rate, betas=(0.0, 0.99)) for role, rate in rates.items()
    }
    frames = [picture(models)]
    for number in range(num_steps):
        for role, rate in rates.items():
            optimizers[role].param_groups[0]["lr"] = rate * (1 - number / num_steps)
        step.begin([{"prompts": ["the ring"] * batch, "columns": {}}], number)
        for turn in range(settings.critic_steps):
            for loss in step.critic_losses(turn):
                loss.backward()
            step.end_critics()
            optimizers["fake"].step()
            optimizers["fake"].zero_grad()
        step.student_loss(0).loss.backward()
        step.end(number + 1)
        optimizers["student"].step()
        optimizers["student"].zero_grad()
        if (number + 1) % frame_every == 0:
            frames.append(picture(models))
    return frames


def write_gif(frames: list[Image.Image], path: Path) -> Path:
    """Write frames as an animated picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0)
    return path


def main() -> None:
    parser = flags(__doc__, steps=600)
    parser.add_argument("--pretraining", type=int, default=2000, help="steps in which the networks learn to denoise")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small tensors: more threads only cost
    models = RingModels(pretrained(options.pretraining))
    frames = distill(models, options.steps, options.batch, max(1, options.steps // 40))
    print("wrote", write_gif(frames, options.output / "ring.gif"))


if __name__ == "__main__":
    main()
