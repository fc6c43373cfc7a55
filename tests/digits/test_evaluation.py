"""The judges of digit samples, checked against formulas written here."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from rdm_sdk import (
    DataError,
    digits,
    diversity,
    feature_statistics,
    frechet_distance,
    legibility,
    teacher_statistics,
    teacher_steps_worth,
)
from rdm_sdk.digits.classifier import load_classifier


def features(images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return load_classifier().features(images).double().numpy()


def test_frechet_distance_is_the_formula():
    """The distance equals its formula with scipy's matrix square root, from images and from statistics."""
    real = digits.heldout_images()
    a, b = features(real[:250]), features(real[250:] * 0.8)
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2)
    expected += np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(real[:250], real[250:] * 0.8) == pytest.approx(expected, rel=1e-3)
    statistics = feature_statistics(real[250:] * 0.8)
    assert frechet_distance(real[:250], statistics) == pytest.approx(expected, rel=1e-3)


def test_real_digits_are_legible_and_near_the_teacher():
    """Held-out digits are legible, legibility falls for wrong prompts, and the teacher's statistics are digits'."""
    real, labels = digits.heldout_images(), digits.heldout_labels().tolist()
    right = [digits.prompts()[label] for label in labels]
    wrong = [digits.prompts()[(label + 1) % 10] for label in labels]
    assert legibility(real, right) > 0.97
    assert legibility(real, wrong) < 0.01
    assert frechet_distance(real, teacher_statistics()) < 0.2 * frechet_distance(1 - real, teacher_statistics())


def test_measuring_draws_no_random_number():
    """Who measures a run in a callback does not change the run: its random state is PyTorch's global one."""
    before = torch.get_rng_state()
    images, prompts = digits.heldout_images()[:100], digits.prompts() * 10
    frechet_distance(images, teacher_statistics())
    legibility(images, prompts)
    diversity(images, prompts)
    assert torch.equal(torch.get_rng_state(), before)


def test_diversity_is_the_deviation_within_a_prompt():
    """Different pictures of different prompts are no diversity; of one prompt they are, pixel by pixel."""
    black, white = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    images = torch.stack([black, white, black, white])
    assert diversity(images, ["a", "b", "a", "b"]) == 0
    assert diversity(images, ["a", "a", "b", "b"]) == pytest.approx(0.5**0.5)
    with pytest.raises(DataError, match="'c' has one"):
        diversity(images[:3], ["a", "a", "c"])


@pytest.mark.parametrize(
    ("distance", "steps"),
    [(400.0, "below 1"), (300.0, "1"), (70.0, "2"), (50.0, "2.8"), (30.0, "4"), (20.0, "5.7"), (9.0, "8 or more")],
)
def test_a_student_is_worth_teacher_steps(distance, steps):
    """At the teacher's own distances its own steps; halfway between two of them their geometric mean; named ends."""
    assert teacher_steps_worth(distance, {4: 30.0, 1: 300.0, 2: 70.0, 8: 10.0}) == steps


def test_many_steps_are_written_out():
    """As a number of steps is read, with two digits that count."""
    assert teacher_steps_worth(15.0, {100: 20.0, 200: 10.0}) == "140"
    assert teacher_steps_worth(20.0, {50: 40.0, 100: 20.0, 200: 10.0}) == "100"


def test_bad_input_is_named():
    """Too few images, images of another size and prompts without a digit are errors that say so."""
    real = digits.heldout_images()
    with pytest.raises(DataError, match="more than 64 images"):
        frechet_distance(real[:10], real)
    with pytest.raises(DataError, match="reference must be"):
        frechet_distance(real, real[..., :16])
    with pytest.raises(DataError, match="names no digit"):
        legibility(real[:1], ["a handwritten letter"])


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [("a handwritten seven", 7), ("The digit 3", 3), ("zero", 0), ("one or two", None), ("a cat", None), ("17", None)],
)
def test_digit_in_prompt(prompt, digit):
    """A prompt's digit is found as a word or a numeral, and only if it is the only one."""
    assert digits.digit_in_prompt(prompt) == digit
