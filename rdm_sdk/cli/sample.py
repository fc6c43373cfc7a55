"""`rdm-sdk sample`: sample a trained student with plain diffusers."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdm_sdk.cli.console import SEED, Parser, check_folder, one_line, whole_number
from rdm_sdk.errors import ConfigError

HELP = "sample a trained student with plain diffusers"
_CALL = ("num_inference_steps", "max_sequence_length", "height", "width")


def run(arguments: Sequence[str]) -> int:
    """Write a picture of samples."""
    parser = Parser(prog="rdm-sdk sample", description=HELP)
    parser.add_argument("--model", required=True, help="the base that the student was trained on ('digits' works too)")
    parser.add_argument("--student", type=Path, required=True, help="the folder that training saved")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    for name in _CALL:
        parser.add_argument(f"--{name}", type=whole_number(1), default=None, help="as the student was trained")
    parser.add_argument(
        "--other_base", action="store_true", help="take another base of the same family than the student's"
    )
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--output", type=Path, default=Path("sample.png"), help="the PNG that is written")
    options = parser.parse_args(arguments)
    if not options.student.is_dir():
        raise ConfigError(f"--student: there is no folder {options.student}; give the one that training saved")
    if options.output.is_dir():
        raise ConfigError(f"--output: {options.output} is a folder; give the name of a picture")
    check_folder("--output", options.output.parent)
    given = {name: value for name in _CALL if (value := getattr(options, name)) is not None}
    print(f"wrote {_draw(options, given)}")
    return 0


def _draw(options: Namespace, given: dict[str, Any]) -> Path:
    import torch

    from rdm_sdk.cli.run_arguments import base_path
    from rdm_sdk.families.load import load_pipeline
    from rdm_sdk.training.export import CALL, load_student
    from rdm_sdk.training.pictures import image_grid

    student: Path = options.student
    if not (student / CALL).is_file():
        raise ConfigError(
            f"--student: {student} has no {CALL}, so it is no student; give the folder that training saved"
        )
    steps = json.loads((student / CALL).read_text(encoding="utf-8"))["num_inference_steps"]
    if given.get("num_inference_steps", steps) != steps:
        raise ConfigError(
            f"--num_inference_steps: the student in {student} was trained for {steps} steps, and its scheduler holds "
            f"their noise levels alone; got {given['num_inference_steps']}. Leave it out"
        )
    pipeline = load_pipeline(base_path(options.model), torch.float32)
    call = load_student(pipeline, student, other_base=options.other_base) | given
    if torch.cuda.is_available():
        pipeline.to("cuda")
    torch.manual_seed(options.seed)
    try:
        images = pipeline(prompt=list(options.prompt), output_type="pt", **call).images
    except (ValueError, TypeError) as error:  # what the pipeline does not take
        raise ConfigError(f"{type(pipeline).__name__} cannot be called so: {one_line(error)}") from error
    return image_grid([("", images)], options.output)
