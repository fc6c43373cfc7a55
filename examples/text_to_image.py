"""One program for published bases: Stable Diffusion 1.5, SDXL, SD 3.5, FLUX.1, Qwen-Image, ..., each with rewards.

python examples/text_to_image.py --model stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt \\
    --rewards "dm + 0.1*hps:v2.1 + 0*clip" --guidance 6 --output outputs/sdxl --steps 2000 --batch 4

The pipeline's class decides what is done; nothing here depends on it. `rdm-sdk plan` says first whether it fits, and
`examples/recipes/` has settings for single bases as YAML. Not run on published weights here: the tests run it on tiny
random pipelines of the same classes.
"""

import torch
from peft import LoraConfig
from shared import flags

from rdm_sdk import RDMConfig, RDMTrainer


def main() -> None:
    parser = flags(__doc__, steps=2000)
    parser.add_argument("--model", required=True, help="a hub id or the path of a pipeline")
    parser.add_argument("--prompts", required=True, help="a file: text, CSV, JSON or Parquet")
    parser.add_argument("--rewards", default="dm")
    parser.add_argument("--guidance", type=float, default=4.5, help="the teacher's; 1 for bases that take none")
    parser.add_argument("--resolution", help="height x width, such as 1024x1024; by default the base's own")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    trainer = RDMTrainer(
        options.model,
        options.rewards,
        RDMConfig(
            output_dir=str(options.output / "run"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            num_generations=4,
            learning_rate=5e-5,
            guidance_scale=options.guidance,
            resolutions=[options.resolution] if options.resolution else None,
            bf16=gpu,
            activation_checkpointing=True,
            text_encoders="offload" if gpu else "keep",
            reward_batch_size=1,  # one image's graph through the VAE at a time
            log_images=100,
            save_steps=200,
        ),
        options.prompts,
        peft_config=LoraConfig(r=64, lora_alpha=64),
    )
    trainer.train()
    trainer.save_model(str(options.output / "student"))


if __name__ == "__main__":
    main()
