"""What a reward beside distribution matching brings, and what it costs: reward against FID-SD on the embedded teacher.

    OMP_NUM_THREADS=1 python benchmarks/reward_study.py --out build/reward_study    # three seeds, about an hour
    python benchmarks/reward_study.py --out build/reward_study --smoke              # a minute, to see that it runs

Each run's figures are written to `<out>/runs.jsonl` as it ends; a run that is already there is not repeated. The table
(mean and standard deviation over seeds) goes to `<out>/table.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig

from rdm_sdk import RDMTrainer, digits, frechet_distance, markdown_table, score_images, teacher_statistics
from rdm_sdk.digits.demo import demo_config

SPECS = (
    "dm",
    "dm + 0.02*legibility",
    "dm + 0.1*legibility",
    "dm + 0.5*legibility",
    "dm + 0.1*jpeg",
    "dm + 0.5*jpeg",
    "dm + 2*jpeg",
)
COLUMNS = ("legibility", "jpeg")


def run(spec: str, seed: int, steps: int, num_samples: int, out: Path) -> dict[str, object]:
    """Train one student and judge its samples: the same noise for every spec of a seed."""
    config = demo_config(out / "training", steps, seed)
    config.log_images = 0
    config.disable_tqdm = True
    lora = LoraConfig(r=32, lora_alpha=32)
    trainer = RDMTrainer(digits.teacher_path(), spec, config, digits.prompts(), peft_config=lora)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    prompts = digits.prompts() * (num_samples // 10)
    images = torch.cat([trainer.sample(prompts[i : i + 250], seed=1000 + i) for i in range(0, len(prompts), 250)])
    scores = score_images(list(COLUMNS), images, prompts, batch_size=500).outputs
    return {
        "spec": spec,
        "seed": seed,
        "steps": steps,
        "FID-SD": frechet_distance(images, teacher_statistics()),
        **{name: scores[name].scores.mean().item() for name in COLUMNS},
        "seconds": seconds,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Return the table of all runs: mean and standard deviation over the seeds."""
    lines = []
    ran = {str(row["spec"]) for row in rows}
    for spec in [spec for spec in SPECS if spec in ran] + sorted(ran - set(SPECS)):
        own = [row for row in rows if row["spec"] == spec]
        cells = [spec, len(own)]
        for name in (*COLUMNS, "FID-SD"):
            values = [float(str(row[name])) for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            digits_shown = 5 if name == "legibility" else 4 if name == "jpeg" else 2
            cells.append(f"{statistics.mean(values):.{digits_shown}f} ± {spread:.{digits_shown}f}")
        lines.append(cells)
    return markdown_table(("rewards", "seeds", *COLUMNS, "FID-SD"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/reward_study"))
    parser.add_argument("--specs", nargs="+", default=list(SPECS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=1000, help="images per run, a multiple of 10")
    parser.add_argument("--smoke", action="store_true", help="two steps, one seed, 100 images")
    options = parser.parse_args()
    if options.smoke:
        options.seeds, options.steps, options.samples = [0], 2, 100
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "runs.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["spec"], row["seed"], row["steps"]) for row in rows}
    for seed in options.seeds:
        for spec in options.specs:
            if (spec, seed, options.steps) not in done:
                rows.append(run(spec, seed, options.steps, options.samples, options.out))
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], flush=True)
    text = table(rows)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
