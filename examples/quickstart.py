"""Distill the embedded digits teacher, save the student, and sample it with plain diffusers.

python examples/quickstart.py --output outputs/quickstart --steps 150
"""

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig

from rdm_sdk import RDMConfig, RDMTrainer, digits, image_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()

    trainer = RDMTrainer(
        model=digits.teacher_path(),  # or any Stable Diffusion 3 hub id, path or pipeline
        reward_funcs="dm",  # or "dm + 0.5*legibility", a function, a list of them
        args=RDMConfig(
            output_dir=str(options.output / "run"),
            max_steps=options.steps,
            per_device_train_batch_size=64,
            num_generations=8,
            learning_rate=1e-3,
            guidance_scale=1.0,
            max_sequence_length=4,  # the digits teacher needs no more text tokens
            log_images=max(1, options.steps // 2),
            save_strategy="no",
        ),
        train_dataset=digits.prompts(),
        peft_config=LoraConfig(r=32, lora_alpha=32),
    )
    trainer.train()
    student = options.output / "student"
    trainer.save_model(str(student))

    # From here on rdm_sdk is not needed: a base, a LoRA and a scheduler.
    pipeline = StableDiffusion3Pipeline.from_pretrained(digits.teacher_path())
    pipeline.load_lora_weights(str(student))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(student, subfolder="scheduler")
    torch.manual_seed(0)
    images = pipeline(
        digits.prompts(), num_inference_steps=4, guidance_scale=1.0, max_sequence_length=4, output_type="pt"
    ).images
    print("wrote", image_grid([("student, 4 steps", images)], options.output / "student.png"))


if __name__ == "__main__":
    main()
