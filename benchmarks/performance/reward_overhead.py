"""What evaluating a reward costs beside the bare model call.

    OMP_NUM_THREADS=1 python benchmarks/performance/reward_overhead.py              # ViT-B/16 shapes, batch 32
    python benchmarks/performance/reward_overhead.py --model ViT-L-14 --size 1024   # CLIPScore's own shapes

The weights are random.

Bare: the CLIP image tower on preprocessed pixels and the cosines with ready prompt embeddings, with back-propagation to
the pixels where a gradient is asked for. Evaluation: `evaluate_rewards` on images of `--size`: decoding, preprocessing,
chunks, checks, and the gradient carried back to the decoder's input (an identity here). Timed in turns; the fastest
turn of each is printed, which other work on the machine has disturbed least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from rdm_sdk import RewardBatch, markdown_table
from rdm_sdk.rewards.evaluate import evaluate_rewards
from rdm_sdk.testing import example_images, tiny_tokenizer
from rdm_sdk.vision import ClipEncoder, ClipReward

VISION = {
    "ViT-B-32": (768, 12, 32),
    "ViT-B-16": (768, 12, 16),
    "ViT-L-14": (1024, 24, 14),
}
"""Width, layers and patch size of the image tower."""


def random_clip(name: str) -> ClipReward:
    """Return CLIPScore on a CLIP of the given shapes with random weights."""
    width, layers, patch = VISION[name]
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": 224,
    }
    tokenizer = tiny_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    reward = ClipReward()
    reward.use(ClipEncoder(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)), tokenizer))
    return reward


def seconds_of(work: Callable[[bool], object], differentiate: bool) -> float:
    """Return how long work takes, with or without the gradient."""
    started = time.perf_counter()
    work(differentiate)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=VISION, default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=512, help="height and width of the judged images")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    reward = random_clip(options.model)
    reward.to(device)
    prompts = [f"prompt {i}" for i in range(options.batch)]
    images = example_images(options.batch, options.size, options.size).to(device)
    pixels = reward.transform(images)
    texts = reward.encoder.embed_prompts(prompts)

    def bare(differentiate: bool) -> Tensor:
        leaf = pixels.detach().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            scores = (reward.encoder.embed_images(leaf) * texts).sum(-1)
        return torch.autograd.grad(scores.sum(), leaf)[0] if differentiate else scores

    def evaluated(differentiate: bool) -> object:
        batch = RewardBatch.from_images(images, prompts)
        return evaluate_rewards({"clip": reward}, batch, gradients_of=None if differentiate else ())

    rows = []
    for differentiate in (False, True):
        bare(differentiate), evaluated(differentiate)
        turns = [(seconds_of(bare, differentiate), seconds_of(evaluated, differentiate)) for _ in range(options.turns)]
        model, own = (min(column) for column in zip(*turns, strict=True))
        rows.append(("scores and gradient" if differentiate else "scores", model, own, own / model))
        print(rows[-1], flush=True)
    title = f"{options.model}, batch {options.batch}, {options.size} px, {device}"
    print(markdown_table((title, "bare model (s)", "evaluation (s)", "ratio"), rows))


if __name__ == "__main__":
    main()
