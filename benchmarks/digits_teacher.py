"""Train the embedded digits teacher from nothing: classifier, VAE, text encoders and SD3 transformer.

    python benchmarks/digits_teacher.py --out build/digits            # everything, about an hour on 2 CPU cores
    python benchmarks/digits_teacher.py --out build/digits --smoke    # a minute, to see that it runs

Each stage writes its result to the output folder and is skipped when the result is there; the diffusion stage also
resumes from its last checkpoint. At the end the figures are printed and written to `figures.json`.
Data: the 1,797 scans of `sklearn.datasets.load_digits`, 1,297 for training and 500 held out (stratified, fixed seed).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rdm_sdk import digits, feature_statistics, frechet_distance, legibility
from rdm_sdk.digits import DIGIT_WORDS, IMAGE_SIZE, PROMPT_TEMPLATES
from rdm_sdk.digits.classifier import DigitClassifier, accuracy, scans_to_images
from rdm_sdk.digits.demo import GUIDANCE
from rdm_sdk.evaluation.distances import FeatureStatistics

MAX_TOKENS = 8
LATENT_SIZE = 8

Vae = Any
Pipeline = Any
"""`AutoencoderKL` and `StableDiffusion3Pipeline`, whose members diffusers does not declare."""


def load_split() -> dict[str, Tensor]:
    scans, labels = load_digits(return_X_y=True)
    split = train_test_split(
        scans.reshape(-1, 8, 8).astype(np.uint8), labels, test_size=500, stratify=labels, random_state=0
    )
    names = ("train_scans", "heldout_scans", "train_labels", "heldout_labels")
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in zip(names, split, strict=True)}


def augment(images: Tensor, degrees: float, scale: float, shift: float) -> Tensor:
    """Rotate, scale and shift each image at random; `shift` is a share of the image's size."""
    n = images.shape[0]
    angle = (torch.rand(n) * 2 - 1) * math.radians(degrees)
    zoom = 1 + (torch.rand(n, 2) * 2 - 1) * scale
    move = (torch.rand(n, 2) * 2 - 1) * shift * 2
    theta = torch.stack(
        [
            torch.stack([angle.cos() * zoom[:, 0], -angle.sin(), move[:, 0]], 1),
            torch.stack([angle.sin(), angle.cos() * zoom[:, 1], move[:, 1]], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False).clamp(0, 1)


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_classifier(data: dict[str, Tensor], steps: int) -> DigitClassifier:
    torch.manual_seed(0)
    model = DigitClassifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    images, labels = scans_to_images(data["train_scans"]), data["train_labels"]
    for step in tqdm(range(steps), desc="classifier", mininterval=5):
        index = torch.randint(len(images), (128,))
        batch = augment(images[index], degrees=12, scale=0.12, shift=0.06)
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps)
        F.cross_entropy(model(batch), labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def new_vae() -> Vae:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(data: dict[str, Tensor], steps: int) -> Vae:
    torch.manual_seed(1)
    vae = new_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    images = scans_to_images(data["train_scans"])
    bar = tqdm(range(steps), desc="vae", mininterval=5)
    for step in bar:
        batch = augment(images[torch.randint(len(images), (64,))], degrees=8, scale=0.08, shift=0.04)
        posterior = vae.encode(batch * 2 - 1).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        error = F.mse_loss(reconstruction, batch * 2 - 1)
        optimizer.param_groups[0]["lr"] = 2e-3 * cosine(step, steps)
        (error + 2e-4 * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(mse=error.item(), kl=kl.item())
    vae = vae.eval().requires_grad_(False)
    # The pipeline decodes z / scaling_factor + shift_factor: unit variance and zero mean make the prior N(0, 1) fit.
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    return vae


def new_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer whose every known word is one token (each word gets its own chain of merges)."""
    words = sorted({word for template in PROMPT_TEMPLATES for word in template.format("").split()} | set(DIGIT_WORDS))
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges: list[Any] = []  # pairs of strings, which the tokenizer takes and does not declare
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                tokens.append(pieces[0])
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise AssertionError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def muted_t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    """Return a tiny T5 that outputs zeros, which is what the pipeline uses for an absent T5.

    The digits need no third text encoder, but a pipeline without one is not loaded by a plain `from_pretrained`. Its
    tokenizer knows no word, so every word is one token and `max_sequence_length=4` is enough for "a handwritten seven".
    """
    config = T5Config(vocab_size=8, d_model=64, d_kv=8, d_ff=8, num_layers=1, num_heads=1, dropout_rate=0.0)
    encoder = T5EncoderModel(config).requires_grad_(False)
    encoder.encoder.final_layer_norm.weight.zero_()
    return encoder, T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)


def new_pipeline(vae: Vae) -> Pipeline:
    tokenizer = new_tokenizer()

    def text_encoder() -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )

    t5, t5_tokenizer = muted_t5()
    torch.manual_seed(2)
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=64,
        pos_embed_max_size=LATENT_SIZE // 2,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder(),
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def encode_prompts(pipeline: Pipeline, prompts: list[str], t5_tokens: int) -> tuple[Tensor, Tensor]:
    """`pipeline.encode_prompt` with gradients for the CLIP encoders; the muted T5 gives rows of zeros."""
    hidden, pooled = [], []
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        ids = pipeline.tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled.append(output[0])
    embeds = F.pad(torch.cat(hidden, -1), (0, 0, 0, t5_tokens))
    return embeds, torch.cat(pooled, -1)


def train_diffusion(data: dict[str, Tensor], vae: Vae, steps: int, num_copies: int, out: Path) -> Pipeline:
    """Flow matching with 10 % empty prompts; returns the pipeline with averaged weights."""
    pipeline = new_pipeline(vae)
    modules = torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2]).train()
    average = copy.deepcopy(modules).requires_grad_(False)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.98))
    checkpoint, first = out / "diffusion.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        modules.load_state_dict(state["modules"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    images, labels = scans_to_images(data["train_scans"]), data["train_labels"].tolist()
    # Augmented copies of every scan are encoded once, so that the loop spends its time on the transformer.
    torch.manual_seed(3)
    copies = [images] + [augment(images, degrees=6, scale=0.06, shift=0.02) for _ in range(num_copies)]
    with torch.no_grad():
        means = torch.cat([vae.encode(copy_ * 2 - 1).latent_dist.mean for copy_ in copies])
    latents = (means - vae.config.shift_factor) * vae.config.scaling_factor
    torch.manual_seed(100 + first)
    losses: list[float] = []
    bar = tqdm(range(first, steps), desc="diffusion", initial=first, total=steps, mininterval=5)
    for step in bar:
        index = torch.randint(len(latents), (128,))
        templates = [PROMPT_TEMPLATES[i] for i in torch.randint(len(PROMPT_TEMPLATES), (128,)).tolist()]
        prompts = [t.format(DIGIT_WORDS[labels[i % len(labels)]]) for t, i in zip(templates, index, strict=True)]
        prompts = ["" if drop < 0.1 else prompt for drop, prompt in zip(torch.rand(128), prompts, strict=True)]
        # A call without max_sequence_length has 256 T5 tokens, all zero: some steps teach that they mean nothing.
        embeds, pooled = encode_prompts(pipeline, prompts, t5_tokens=256 if step % 50 == 49 else 0)
        x_0, eps, sigma = latents[index], torch.randn(128, 1, LATENT_SIZE, LATENT_SIZE), torch.rand(128)
        x_t = torch.lerp(x_0, eps, sigma[:, None, None, None])
        velocity = pipeline.transformer(
            hidden_states=x_t,
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, eps - x_0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * cosine(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            bar.set_postfix(loss=float(np.mean(losses[-250:])))
            state = {"modules": modules.state_dict(), "average": average.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    modules.load_state_dict(average.state_dict())
    modules.eval().requires_grad_(False)
    return pipeline


def measure(out: Path, most: int) -> dict[str, object]:
    """Sample the teacher in plain diffusers; add the reference statistics of FID-SD to the evaluation file.

    No figure is of more than `most` images, a multiple of 250. Reads and judges the packaged assets, so copy a new
    teacher there first.
    """
    pipeline: Pipeline = StableDiffusion3Pipeline.from_pretrained(digits.teacher_path())
    pipeline.set_progress_bar_config(disable=True)

    def sample(num_steps: int, guidance_scale: float, count: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        call = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale, "max_sequence_length": 4}
        prompts, batches = digits.prompts() * 25, range(count // 250)
        bar = tqdm(batches, desc=f"{num_steps} steps, guidance {guidance_scale}", mininterval=5)
        return torch.cat([pipeline(prompts, output_type="pt", **call).images for _ in bar])

    evaluation_file = out / "evaluation.safetensors"
    stored = load_file(evaluation_file)
    if "teacher_feature_count" not in stored:
        made = feature_statistics(sample(40, GUIDANCE, most, seed=1000))
        stored["teacher_feature_total"], stored["teacher_feature_products"] = made.total, made.products
        stored["teacher_feature_count"] = torch.tensor(made.count)
        save_file(stored, evaluation_file)
    reference = FeatureStatistics(
        stored["teacher_feature_total"], stored["teacher_feature_products"], int(stored["teacher_feature_count"])
    )
    train = scans_to_images(load_split()["train_scans"])
    figures: dict[str, object] = {"training digits, FID to held-out": frechet_distance(train, digits.heldout_images())}
    for num_steps, guidance_scale, count in ((40, 1.0, 2000), (4, 1.0, 10000), (40, 2.0, 2000)):
        count = min(count, most)
        images = sample(num_steps, guidance_scale, count, seed=0)
        figures[f"{num_steps} steps, guidance {guidance_scale}"] = {
            "FID to held-out": frechet_distance(images, digits.heldout_images()),
            "FID-SD": frechet_distance(images, reference),
            "legibility": legibility(images, digits.prompts() * (count // 10)),
            "images": count,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=14000, help="diffusion steps")
    parser.add_argument("--measure", action="store_true", help="judge the packaged teacher and make its statistics")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps = (20, 20, 20) if args.smoke else (2500, 2500, args.steps)
    data, started = load_split(), time.time()

    evaluation_file = args.out / "evaluation.safetensors"
    if not evaluation_file.exists():
        state = train_classifier(data, steps[0]).state_dict()
        kept = {name: data[name] for name in ("heldout_scans", "heldout_labels")}
        save_file({f"classifier.{k}": v for k, v in state.items()} | kept, evaluation_file)
    if not (args.out / "vae").exists():
        train_vae(data, steps[1]).save_pretrained(args.out / "vae")
    vae: Vae = AutoencoderKL.from_pretrained(args.out / "vae")
    classifier = DigitClassifier().eval()
    state = load_file(evaluation_file)
    classifier.load_state_dict({k[11:]: v for k, v in state.items() if k.startswith("classifier.")})
    heldout = scans_to_images(data["heldout_scans"])
    with torch.no_grad():
        decoded = (vae.decode(vae.encode(heldout * 2 - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        figures: dict[str, object] = {
            "classifier_heldout_accuracy": accuracy(classifier, heldout, data["heldout_labels"]),
            "classifier_heldout_legibility": classifier.legibility(heldout, data["heldout_labels"]).mean().item(),
            "vae_heldout_rmse_of_255": 255 * F.mse_loss(decoded, heldout).sqrt().item(),
            "vae_heldout_legibility": classifier.legibility(decoded, data["heldout_labels"]).mean().item(),
        }
    print(json.dumps(figures, indent=2), flush=True)
    if not (args.out / "teacher").exists():
        pipeline = train_diffusion(data, vae, steps[2], 1 if args.smoke else 15, args.out)
        # Half precision for the large parts, which diffusers loads as float32 by default; transformers would keep the
        # text encoders in the dtype they are stored in.
        pipeline.transformer.half()
        pipeline.vae.half()
        pipeline.save_pretrained(args.out / "teacher.tmp")
        (args.out / "teacher.tmp").rename(args.out / "teacher")
    figures["seconds"] = time.time() - started
    if args.measure:
        figures["samples"] = measure(args.out, 250 if args.smoke else 10000)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
