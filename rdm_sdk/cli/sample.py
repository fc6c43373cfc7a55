"""`rdm-sdk sample`: sample a trained student with plain diffusers, and its teacher beside it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rdm_sdk.cli.console import SEED, Parser, add_place, check_file, check_folder, find_device, whole_number
from rdm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from rdm_sdk.evaluation.candidates import Candidate

HELP = "sample a trained student with plain diffusers, and its teacher beside it"
STEM_BYTES = 235
"""How many bytes of the 255 in a file name are the prompt's; a number and what is added on writing follow."""
_CALL = ("max_sequence_length", "height", "width")


def run(arguments: Sequence[str]) -> int:
    """Write a picture of samples, or each sample as a file."""
    options = _parser().parse_args(arguments)
    if options.student is not None and not options.student.is_dir():
        raise ConfigError(f"--student: there is no folder {options.student}; give the one that training saved")
    if options.student is None and options.teacher is None:
        raise ConfigError("there is nothing to sample: give --student, or --teacher with its number of steps, or both")
    if options.output is None and options.files is None:
        options.output = Path("sample.png")
    folders: dict[str, Path] = {}
    if options.output is not None:
        check_file("--output", options.output, "picture")
        folders["--output"] = options.output.parent
    if options.files is not None:
        check_folder("--files", options.files)
        folders["--files"] = options.files
    prompts, candidates = _prompts(options), _candidates(options)
    names = [candidate.name for candidate in candidates]
    for place in [] if options.files is None else _places(names, options.files).values():
        _check_pictures(place, _file_names(prompts, options.samples))
    from rdm_sdk.training.validation import check_writable

    for option, folder in folders.items():
        check_writable(str(folder), option)
    rows = _sampled(options, candidates, prompts)
    if options.files is not None:
        print(f"wrote {_write_files(rows, prompts, options.samples, options.files)} pictures into {options.files}")
    if options.output is not None:
        print(f"wrote {_write_grid(rows, prompts, options.samples, options.output)}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="rdm-sdk sample", description=HELP)
    parser.add_argument("--model", required=True, help="the base that the student was trained on ('digits' works too)")
    parser.add_argument("--student", type=Path, help="the folder that training saved")
    parser.add_argument("--teacher", type=whole_number(1), metavar="STEPS", help="the base too, at a number of steps")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--prompts", help="a file of prompts: text, CSV, JSON or Parquet")
    parser.add_argument("--samples", type=whole_number(1), default=1, help="of each prompt")
    for name in ("num_inference_steps", *_CALL):
        parser.add_argument(f"--{name}", type=whole_number(1), default=None, help="as the student was trained")
    parser.add_argument(
        "--other_base", action="store_true", help="take another base of the same family than the student's"
    )
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="the teacher's")
    add_place(parser)
    parser.add_argument("--seed", type=SEED, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, help="one PNG of all; sample.png unless --files is given")
    parser.add_argument("--files", type=Path, help="a folder for each sample as a PNG, named by its prompt")
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    """Return the prompts of `--prompt` and `--prompts`, in this order, each once."""
    from rdm_sdk.training.data import load_prompts

    listed = [] if options.prompts is None else list(load_prompts(options.prompts, "--prompts")["prompt"])
    given = [*(options.prompt or []), *listed]
    if not given:
        raise ConfigError("there are no prompts: give --prompt, or a file by --prompts")
    return list(dict.fromkeys(list(load_prompts(given, "--prompt")["prompt"])))


def _candidates(options: argparse.Namespace) -> list[Candidate]:
    """Return what is sampled, without loading anything."""
    from rdm_sdk.cli.run_arguments import base_path
    from rdm_sdk.evaluation.candidates import distinct, shared_call, student_candidates, teacher_candidate
    from rdm_sdk.families.load import find_folder

    call = {name: value for name in _CALL if (value := getattr(options, name)) is not None}
    steps = [] if options.num_inference_steps is None else [options.num_inference_steps]
    students = [] if options.student is None else student_candidates(options.student, steps, call)
    teacher = [] if options.teacher is None else [teacher_candidate(options.teacher, shared_call(students, call))]
    find_folder(base_path(options.model))
    return distinct([*teacher, *students])  # a student's folder may be called "teacher"


def _sampled(options: argparse.Namespace, candidates: Sequence[Candidate], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return each candidate's images of every prompt, those of a prompt in a row, by the candidate's name."""
    import torch
    from tqdm import tqdm

    from rdm_sdk.cli.run_arguments import base_path
    from rdm_sdk.evaluation.sampling import Sampler

    device = find_device(options.device)
    repeated = [prompt for prompt in prompts for _ in range(options.samples)]
    sampler = Sampler(
        base_path(options.model),
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        batch_size=min(8, len(repeated)),
        candidates=candidates,
        dtype=getattr(torch, options.dtype),
        device=device,
        other_base=options.other_base,
    )
    rows = {}
    for candidate in candidates:
        with tqdm(total=len(repeated), desc=candidate.name, unit="image") as bar:
            sampled = sampler.images(candidate, repeated, "rows", bar.update)
        rows[candidate.name] = sampled.images.float() / 255
        if (warning := sampled.warning(candidate.name)) is not None:
            print(f"note: {warning}")
    return rows


def _write_grid(rows: dict[str, Tensor], prompts: Sequence[str], samples: int, output: Path) -> Path:
    """Write one picture: a row for each candidate, or for each candidate's samples of a prompt where there are more."""
    from rdm_sdk.training.pictures import image_grid

    if samples == 1:
        return image_grid(
            [(name.replace(", ", "\n") if len(rows) > 1 else "", row) for name, row in rows.items()], output
        )
    parts = [
        (f"{_short(prompt)}\n{name}", row[i * samples : (i + 1) * samples])
        for i, prompt in enumerate(prompts)
        for name, row in rows.items()
    ]
    return image_grid(parts, output)


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 30 else f"{prompt[:29]}…"


def _places(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return the folder of each candidate's files: one in `folder` where there are several, else `folder`."""
    return {name: folder / re.sub(r"\W+", "_", name) if len(names) > 1 else folder for name in names}


def _file_names(prompts: Sequence[str], samples: int) -> list[str]:
    """Return the name of each sample's file: `<prompt>_<number>.png`."""
    stems = [_stem(prompt) for prompt in prompts for _ in range(samples)]
    return [f"{stem}_{number:04d}.png" for number, stem in enumerate(stems)]


def _stem(prompt: str) -> str:
    """Return a prompt as a file's name begins: 80 letters at most, and no more bytes than a name may have."""
    letters = re.sub(r"\W+", "_", prompt).strip("_")[:80]
    return letters.encode()[:STEM_BYTES].decode(errors="ignore") or "prompt"


def _check_pictures(place: Path, names: Sequence[str]) -> None:
    """Raise `ConfigError` if a folder holds pictures that would lie between the new ones, and be scored as such."""
    from rdm_sdk.evaluation.folder import SUFFIXES

    found = (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
    others = sorted({path.relative_to(place).as_posix() for path in found} - set(names))
    if others:
        raise ConfigError(
            f"--files: {place} holds pictures that would lie between the new ones, {others[0]!r} first; give another "
            "folder, or remove them"
        )


def _write_files(rows: dict[str, Tensor], prompts: Sequence[str], samples: int, folder: Path) -> int:
    """Write each image as a file, in a folder for each candidate where there are several.

    `rdm-sdk score --prompts` reads the prompts in `metadata.jsonl` beside them.
    """
    from PIL import Image

    from rdm_sdk.files import replacing
    from rdm_sdk.training.pictures import to_uint8

    names, places = _file_names(prompts, samples), _places(list(rows), folder)
    for candidate, row in rows.items():
        place = places[candidate]
        for name, pixels in zip(names, to_uint8(row).numpy(), strict=True):
            with replacing(place / name) as staged:
                Image.fromarray(pixels).save(staged, format="PNG")
        lines = [{"file_name": name, "prompt": prompts[number // samples]} for number, name in enumerate(names)]
        with replacing(place / "metadata.jsonl") as staged:
            staged.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return len(rows) * len(names)
