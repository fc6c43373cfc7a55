"""Train a tiny CLIP on the embedded digits and their prompts, so that CLIP rewards mean something without a download.

    OMP_NUM_THREADS=1 python benchmarks/digits_clip.py --out build/digits_clip    # about a minute on one CPU thread
    python benchmarks/digits_clip.py --out build/digits_clip --smoke              # seconds, to see that it runs

The output folder then holds a `CLIPModel` with its tokenizer in `transformers` format: `clip[path="build/digits_clip"]`
is a reward that knows the ten digits. `tests/assets/digits_clip` is what this script wrote. Training sees the 1,297
training scans only; the figures that are printed at the end are of the 500 held-out ones and of the teacher's samples.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from digits_teacher import augment, cosine, load_split
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rdm_sdk import digits
from rdm_sdk.digits import DIGIT_WORDS, IMAGE_SIZE, PROMPT_TEMPLATES
from rdm_sdk.digits.classifier import scans_to_images
from rdm_sdk.digits.demo import sample
from rdm_sdk.vision import ClipEncoder, ImageTransform, load_clip

PROMPTS = [template.format(word) for template in PROMPT_TEMPLATES for word in DIGIT_WORDS]
PROJECTION = 32
DIGITS_PER_STEP, OTHERS_PER_STEP = 96, 32
LEARNING_RATE = 2e-3
NOISE = 0.1
"""Largest standard deviation of the noise on training images: samples of a few steps are less clean than scans."""


def new_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"hidden_act": "gelu", "projection_dim": PROJECTION}
    text = shared | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {
        "hidden_size": 80,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def contrastive_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """CLIP's symmetric loss where a row has several right columns, and a column several right rows.

    Args:
        logits: scaled cosines `[N, P]` of images and prompts.
        positive: 1 where they show and name the same digit, 0 elsewhere, float `[N, P]`.
    """
    # A picture of no digit has no prompt to find, but no prompt may find it; a digit may also be missing by chance.
    per_image = positive / positive.sum(dim=1, keepdim=True).clamp(min=1)
    per_prompt = positive / positive.sum(dim=0, keepdim=True).clamp(min=1)
    return (F.cross_entropy(logits, per_image) + F.cross_entropy(logits.T, per_prompt.T)) / 2


def pictures_of_nothing(count: int) -> Tensor:
    """Return random gray images `[count, 3, 32, 32]` in [0, 1]: flat, blobs, and noise of a scan's and of our pixels.

    A reward may be shown such images. Without them in training, noise scored as well as an eight.
    """
    kinds = [torch.rand(count // 4, 1, size, size) for size in (1, 4, 8, IMAGE_SIZE)]
    images = torch.cat([F.interpolate(kind, size=IMAGE_SIZE, mode="bicubic").clamp(0, 1) for kind in kinds])
    return (images * torch.rand(len(images), 1, 1, 1)).expand(-1, 3, -1, -1)


def train(model: CLIPModel, tokenizer: CLIPTokenizer, steps: int) -> None:
    data = load_split()
    images, labels = scans_to_images(data["train_scans"]), data["train_labels"]
    named = torch.arange(len(PROMPTS)) % len(DIGIT_WORDS)
    tokens = tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    transform = ImageTransform(IMAGE_SIZE)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    model.train()
    bar = tqdm(range(steps), desc="clip", mininterval=1)
    for step in bar:
        index = torch.randint(len(images), (DIGITS_PER_STEP,))
        batch = augment(images[index], degrees=10, scale=0.1, shift=0.05)
        batch = batch + torch.rand(DIGITS_PER_STEP, 1, 1, 1) * NOISE * torch.randn_like(batch)
        batch = torch.cat([batch, pictures_of_nothing(OTHERS_PER_STEP)])
        positive = F.pad((labels[index, None] == named).float(), (0, 0, 0, OTHERS_PER_STEP))
        # All forty prompts in every step: no image is taught by the luck of the prompt that was drawn for it.
        output = model(**tokens, pixel_values=transform(batch))
        loss = contrastive_loss(output.logits_per_image, positive)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=loss.item(), scale=model.logit_scale.exp().item())
    model.eval()


def teacher_samples(count: int, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return `count` images of the embedded teacher (a multiple of 10) and the digits asked for."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    pipeline.set_progress_bar_config(disable=True)
    asked = torch.arange(count) % len(DIGIT_WORDS)
    prompts = digits.prompts() * (count // len(DIGIT_WORDS))
    return sample(pipeline, prompts, seed=0, num_inference_steps=num_steps, guidance_scale=1.0), asked


@torch.no_grad()
def figures_of(encoder: ClipEncoder, images: Tensor, asked: Tensor) -> dict[str, dict[str, float]]:
    """Per template: how often the right one of the ten digits' prompts is ranked first, and the mean cosines."""
    embedded = encoder.embed_images(ImageTransform(encoder.image_size)(images))
    figures = {}
    for template in PROMPT_TEMPLATES:
        cosines = embedded @ encoder.embed_prompts([template.format(word) for word in DIGIT_WORDS]).T
        right = cosines.gather(1, asked[:, None])[:, 0]
        figures[template] = {
            "accuracy": round((cosines.argmax(dim=1) == asked).float().mean().item(), 4),
            "cosine, right": round(right.mean().item(), 4),
            "cosine, wrong": round(((cosines.sum(dim=1) - right) / (len(DIGIT_WORDS) - 1)).mean().item(), 4),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--smoke", action="store_true", help="three steps, ten samples of the teacher")
    options = parser.parse_args()
    steps, count, num_steps = (3, 10, 2) if options.smoke else (options.steps, 200, 20)

    started = time.perf_counter()
    torch.manual_seed(0)
    tokenizer_path = Path(digits.teacher_path()) / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_path)
    model = new_model(tokenizer)
    train(model, tokenizer, steps)
    seconds = time.perf_counter() - started
    model.save_pretrained(options.out)
    # Copied, because save_pretrained also writes down how this process loaded it (offline, from a local folder).
    shutil.copytree(tokenizer_path, options.out, dirs_exist_ok=True)

    encoder = load_clip(str(options.out))  # judged as a reward loads it
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes on disk": sum(file.stat().st_size for file in options.out.iterdir()),
        "training seconds": round(seconds, 1),
        "logit scale": round(encoder.logit_scale, 3),
        "held-out scans": figures_of(encoder, digits.heldout_images(), digits.heldout_labels()),
        "teacher's samples": figures_of(encoder, *teacher_samples(count, num_steps)),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
