"""CLIP rewards on a tiny CLIP that knows the digits: right prompts win, and gradients lead to higher scores.

The weights in `tests/assets/digits_clip` are what `benchmarks/digits_clip.py` wrote; they never saw the held-out scans.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from rdm_sdk import digits, score_images
from rdm_sdk.rewards.base import RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards

WEIGHTS = Path(__file__).parents[1] / "assets" / "digits_clip"
COUNT = 200


@pytest.fixture(scope="module", params=["clip", "hps", "pickscore"])
def reward(request):
    """Each CLIP reward, on the shipped weights."""
    return resolve_rewards(f'{request.param}[path="{WEIGHTS}"]')[0].reward


@pytest.fixture(scope="module")
def scans():
    """Held-out scans `[200, 3, 32, 32]` and the digits they show, `[200]`."""
    return digits.heldout_images()[:COUNT], digits.heldout_labels()[:COUNT]


def named(shown: torch.Tensor) -> list[str]:
    """Return the prompts that name these digits."""
    return [digits.prompts()[digit] for digit in shown.tolist()]


@pytest.mark.parametrize("template", digits.PROMPT_TEMPLATES)
def test_the_right_prompt_wins(reward, scans, template):
    """Of ten digits' prompts, the right one scores highest on 95 % of the scans, and far above the others' mean."""
    images, shown = scans
    prompts = [template.format(word) for word in digits.DIGIT_WORDS]
    batch = RewardBatch.from_images(images.repeat_interleave(10, dim=0), prompts * COUNT)
    scores = evaluate_reward(reward, batch, gradients_of=()).scores.view(COUNT, 10)
    right = scores.gather(1, shown[:, None])[:, 0]
    wrong = (scores.sum(dim=1) - right) / 9
    assert (scores.argmax(dim=1) == shown).float().mean() >= 0.95
    # In units of the reward's scale, because PickScore is a cosine times 13.6 here.
    assert ((right - wrong) / reward.scale).mean() > 0.5


def test_noise_is_no_digit(reward, scans):
    """Noise scores lower under every prompt than every digit's scans do on average under theirs."""
    noise = torch.rand(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    of_noise = evaluate_reward(reward, RewardBatch.from_images(noise, digits.prompts() * 10), gradients_of=())
    of_scans = evaluate_reward(reward, RewardBatch.from_images(scans[0], named(scans[1])), gradients_of=())
    means = torch.stack([of_scans.scores[scans[1] == digit].mean() for digit in range(10)])
    assert of_noise.scores.max() < means.min()


@pytest.mark.parametrize("offset", [0, 3], ids=["right prompt", "wrong prompt"])
def test_one_step_up_the_gradient_raises_the_score(reward, scans, offset):
    """A step of at most 4/255 per pixel along the gradient raises the score of 95 % of the scans, back inside [0, 1].

    Its mean gain is more than five times that of a random step with the same largest change of a pixel.
    """
    images, shown = scans
    prompts = named((shown + offset) % 10)
    before = evaluate_reward(reward, RewardBatch.from_images(images, prompts))

    def gain(direction: torch.Tensor) -> torch.Tensor:
        step = 4 / 255 * direction / direction.abs().amax(dim=(1, 2, 3), keepdim=True)
        batch = RewardBatch.from_images((images + step).clamp(0, 1), prompts)
        return evaluate_reward(reward, batch, gradients_of=()).scores - before.scores

    along = gain(before.gradient)
    assert (along > 0).float().mean() >= 0.95
    noise = torch.randn(before.gradient.shape, generator=torch.Generator().manual_seed(0))
    assert along.mean() > 5 * gain(noise).mean().abs()


def test_the_shipped_weights_are_small():
    """The repository stays small."""
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 2e6


def test_the_script_runs(tmp_path, monkeypatch, capsys):
    """`--smoke` writes a folder that a CLIP reward loads, and prints its figures."""
    monkeypatch.setattr(sys, "argv", ["digits_clip.py", "--out", str(tmp_path / "clip"), "--smoke"])
    importlib.import_module("digits_clip").main()
    figures = json.loads(capsys.readouterr().out)
    assert set(figures["held-out scans"]) == set(figures["teacher's samples"]) == set(digits.PROMPT_TEMPLATES)
    assert {file.name for file in (tmp_path / "clip").iterdir()} == {file.name for file in WEIGHTS.iterdir()}
    scores = score_images(f'clip[path="{tmp_path / "clip"}"]', digits.heldout_images()[:10], digits.prompts()).outputs
    assert scores["clip"].scores.isfinite().all()
