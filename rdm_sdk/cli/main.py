"""The command line: `rdm-sdk demo`, `train`, `sample`, `presets`; `rewards.py` and `plan.py` add more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import rdm_sdk
from rdm_sdk.cli.plan import add_command
from rdm_sdk.cli.rewards import add_commands
from rdm_sdk.errors import ConfigError, RDMError
from rdm_sdk.training.presets import PRESETS, show_preset


@dataclass
class RunArguments:
    """What `rdm-sdk train` needs beside the settings of `RDMConfig`."""

    model: str = field(metadata={"help": "Base model: a hub id, a local path, or 'digits' for the embedded teacher."})
    prompts: str | None = field(
        default=None, metadata={"help": "Text file, one prompt per line; not needed for 'digits'."}
    )
    rewards: str = field(default="dm", metadata={"help": "Reward spec, such as 'dm + 0.5*legibility'."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank of the student and the critic."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha of the student and the critic."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get adapters; the family's usual ones by default."}
    )
    save_to: str | None = field(default=None, metadata={"help": "Folder for the student; output_dir/student if unset."})
    resume: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, or 'latest' for the last one in output_dir."}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for the SDK's own errors, which are printed in one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="rdm-sdk", description=rdm_sdk.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"rdm-sdk {rdm_sdk.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="distill the embedded digits teacher and compare, in about five minutes")
    demo.add_argument("--output", type=Path, default=Path("demo"))
    demo.add_argument("--steps", type=int, default=None, help="optimizer steps of the student")
    demo.add_argument("--samples", type=int, default=1000, help="images per row of the table, a multiple of 10")
    demo.add_argument("--seed", type=int, default=0)
    sample = commands.add_parser("sample", help="sample a trained student with plain diffusers")
    sample.add_argument("--model", required=True, help="the base that the student was trained on ('digits' works too)")
    sample.add_argument("--student", type=Path, required=True, help="the folder that training saved")
    sample.add_argument("--prompt", action="append", required=True, help="may be given several times")
    for name in ("num_inference_steps", "max_sequence_length", "height", "width"):
        sample.add_argument(f"--{name}", type=int, default=None, help="as the student was trained, unless given")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--output", type=Path, default=Path("sample.png"))
    commands.add_parser(
        "train",
        help="train a student: --config run.yaml and any setting as a flag; 'train --help' lists them",
        add_help=False,
    )
    presets = commands.add_parser("presets", help="settings of known methods").add_subparsers(required=True)
    presets.add_parser("list", help="all presets").set_defaults(run=_list_presets)
    show = presets.add_parser("show", help="a preset as YAML for 'train --config'")
    show.add_argument("name")
    show.set_defaults(run=_show_preset)
    demo.set_defaults(run=_demo)
    sample.set_defaults(run=_sample)
    add_commands(commands)
    add_command(commands)
    try:
        if arguments[:1] == ["train"]:
            return train(arguments[1:])
        options = parser.parse_args(arguments)
        status: int = options.run(options)
    except RDMError as error:
        print(f"rdm-sdk: {error}", file=sys.stderr)
        return 2
    return status


def train(arguments: list[str]) -> int:
    """Train from a YAML file (`--config`) and flags; flags win."""
    from peft import LoraConfig
    from trl.scripts.utils import TrlParser

    from rdm_sdk import RDMConfig, RDMTrainer
    from rdm_sdk.training.config import check_known

    known = [f.name for cls in (RunArguments, RDMConfig) for f in fields(cls) if f.init]
    check_known([a[2:].split("=")[0] for a in arguments if a.startswith("--") and a != "--help"], [*known, "config"])
    if "--config" in arguments:
        check_known(_yaml_keys(arguments[arguments.index("--config") + 1 :]), [*known, "env"])
    dataclasses: list[Any] = [RunArguments, RDMConfig]
    parser = TrlParser(dataclasses, prog="rdm-sdk train")
    run, config = parser.parse_args_and_config(args=arguments)
    lora = LoraConfig(r=run.lora_r, lora_alpha=run.lora_alpha, target_modules=run.lora_target_modules)
    prompts = run.prompts or (rdm_sdk.digits.prompts() if run.model == "digits" else None)
    if prompts is None:
        raise ConfigError("--prompts is missing: give a text file with one prompt per line")
    trainer = RDMTrainer(_base(run.model), run.rewards, config, prompts, peft_config=lora)
    trainer.train(resume_from_checkpoint=True if run.resume == "latest" else run.resume)
    target = run.save_to or str(Path(config.output_dir) / "student")
    trainer.save_model(target)
    print(f"wrote the student to {target}")
    return 0


def _yaml_keys(rest: list[str]) -> list[str]:
    import yaml

    if not rest or not Path(rest[0]).is_file():
        raise ConfigError(f"--config: there is no file {rest[0] if rest else ''!r}")
    try:
        content = yaml.safe_load(Path(rest[0]).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: {rest[0]} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {rest[0]} must map settings to values")
    return list(content)


def _demo(options: argparse.Namespace) -> int:
    if options.samples < 100 or options.samples % 10:
        raise ConfigError(f"--samples must be a multiple of 10, at least 100; got {options.samples}")
    from rdm_sdk.digits.demo import run_demo

    given = {} if options.steps is None else {"steps": options.steps}
    run_demo(options.output, num_samples=options.samples, seed=options.seed, **given)
    return 0


def _list_presets(options: argparse.Namespace) -> int:
    width = max(map(len, PRESETS))
    for name, own in PRESETS.items():
        print(f"{name:<{width}}  {own.summary}")
    return 0


def _show_preset(options: argparse.Namespace) -> int:
    print(show_preset(options.name))
    return 0


def _sample(options: argparse.Namespace) -> int:
    import torch
    from diffusers import DiffusionPipeline

    from rdm_sdk.training.export import load_student

    if not options.student.is_dir():
        raise ConfigError(f"--student: there is no folder {options.student}; give the one that training saved")
    pipeline = DiffusionPipeline.from_pretrained(_base(options.model))
    call = load_student(pipeline, options.student)
    for name in ("num_inference_steps", "max_sequence_length", "height", "width"):
        if getattr(options, name) is not None:
            call[name] = getattr(options, name)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    torch.manual_seed(options.seed)
    images = pipeline(prompt=options.prompt, output_type="pt", **call).images
    path = rdm_sdk.image_grid([("", images)], options.output)
    print(f"wrote {path}")
    return 0


def _base(model: str) -> str:
    return rdm_sdk.digits.teacher_path() if model == "digits" else model


if __name__ == "__main__":
    sys.exit(main())
