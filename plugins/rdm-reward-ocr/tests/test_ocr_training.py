"""The SDK's step teaches a small student to spell, by nothing but what the text recognition reads."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from rdm_sdk import RDMConfig, RDMTrainer, RewardBatch, digits
from rdm_sdk.method.noise import FlowSchedule
from rdm_sdk.method.sampling import FewStepPolicy, sample
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.training.judge import Judge
from rdm_sdk.training.step import DistillationStep

WORDS = ["BAKE", "MINT"]
PROMPTS = [f'a sign that says "{word}"' for word in WORDS]
CHOICES = [*zip(*WORDS, "SOUP", strict=True)]
"""Per place of a word, the letters that can stand there: those of both words, and one that is always wrong."""
PLACES, LETTERS = len(CHOICES), len(CHOICES[0])
WIDTH, HEIGHT = 28, 48


def glyphs():
    """The letters that can stand at each place, dark on light, `[places, letters, H, W]`."""
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 34)
    drawn = []
    for letter in (letter for place in CHOICES for letter in place):
        image = Image.new("L", (WIDTH, HEIGHT), 240)
        ImageDraw.Draw(image).text((WIDTH / 2, HEIGHT / 2), letter, 20, font, anchor="mm")
        drawn.append(torch.from_numpy(np.array(image)) / 255)
    return torch.stack(drawn).unflatten(0, (PLACES, LETTERS))


class Speller:
    """A linear student: what the SDK's step asks of a model (`rdm_sdk.training.models.Models`), no more.

    Latents `[N, places * letters]` are how much of each letter stands at each place; decoded, the letters are mixed
    by the softmax of that.
    """

    policy = FewStepPolicy(FlowSchedule(), (1.0, 0.5))
    device = torch.device("cpu")

    def __init__(self):
        self.student = nn.Linear(len(PROMPTS), PLACES * LETTERS, bias=False)
        nn.init.zeros_(self.student.weight)
        self.glyphs = glyphs()

    def encode(self, prompts):
        return {"prompt": nn.functional.one_hot(torch.tensor([PROMPTS.index(p) for p in prompts]), len(PROMPTS))}

    def parameters_of(self, role):
        return list(self.student.parameters())

    def denoiser(self, role, condition, steps=None):
        # Half of the noise stays in the prediction, so that the endpoints of a group differ.
        return lambda x_t, sigma: self.student(condition["prompt"].float()) + x_t / 2

    def step_shape(self, step):
        return (PLACES * LETTERS,)

    def to_images(self, latents):
        shares = (8 * latents).unflatten(1, (PLACES, LETTERS)).softmax(-1)
        gray = torch.einsum("npl,plhw->nhpw", shares, self.glyphs).flatten(2)
        return gray[:, None].expand(-1, 3, -1, -1)

    def vae_at_hand(self):
        return nullcontext()

    def complete(self, context, condition):
        return context


def mean_score(models, reward, seed):
    """The mean reward of new samples of the student."""
    prompts = [prompt for prompt in PROMPTS for _ in range(8)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        noise = torch.randn(len(prompts), PLACES * LETTERS)
        endpoints = sample(models.denoiser("student", models.encode(prompts)), noise, models.policy)
        batch = RewardBatch.from_images(models.to_images(endpoints), prompts)
        return float(reward.score(batch).mean())


@pytest.mark.slow
def test_a_student_learns_to_spell():
    """Over 12 steps of policy gradient the reward of new samples rises from that of chance to nearly all letters."""
    torch.manual_seed(0)
    settings = RDMConfig(
        num_generations=12, per_device_train_batch_size=24, use_cpu=True, report_to="none", matching="mixture"
    )
    models, rewards = Speller(), resolve_rewards("ocr")
    step = DistillationStep(Judge(models, rewards, settings), settings)
    optimizer = torch.optim.Adam(models.parameters_of("student"), lr=0.08)
    batch = {"prompts": [p for p in PROMPTS for _ in range(settings.num_generations)], "columns": {}}
    before = mean_score(models, rewards[0].reward, 1)
    for number in range(12):
        step.begin([batch], number)
        step.student_loss(0).loss.backward()
        step.end(number + 1)
        optimizer.step()
        optimizer.zero_grad()
    after = mean_score(models, rewards[0].reward, 1)
    assert before < 0.4
    assert after > 0.8


def test_watched_in_a_mixed_run(tmp_path):
    """In a run of the trainer the reward sees the prompts with a text, and is quiet about the others."""
    prompts = digits.prompts()
    texts = [str(number) if number % 2 else None for number in range(len(prompts))]
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "guidance_scale": 1.0, "critic_steps": 1}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    args = RDMConfig(output_dir=str(tmp_path), max_steps=4, max_sequence_length=4, **settings, **quiet)
    data = Dataset.from_dict({"prompt": prompts[:4], "text": texts[:4]})
    trainer = RDMTrainer(digits.teacher_path(), "dm + 0*ocr", args, data)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert sorted(row["rewards/ocr/applies"] for row in rows) == [0, 0, 1, 1]
    assert all(("rewards/ocr/mean" in row) == bool(row["rewards/ocr/applies"]) for row in rows)
