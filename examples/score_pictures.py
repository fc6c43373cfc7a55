"""Score pictures on disk, without any training; `rdm-sdk score FOLDER` does the same from the command line.

python examples/score_pictures.py PICTURES --rewards "jpeg" --output scores.csv

With `--prompts prompts.csv` (columns file_name and prompt), or `--prompts names` (`a_red_fox_0012.png` is "a red fox"),
rewards that read prompts can be asked too, such as "clip + hps:v2.1".
"""

import argparse
from pathlib import Path

from rdm_sdk import score_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rewards", default="jpeg")
    parser.add_argument("--prompts")
    parser.add_argument("--output", type=Path, default=Path("scores.csv"))
    options = parser.parse_args()
    scores = score_folder(options.folder, options.rewards, options.prompts)
    for reward, summary in scores.summaries.items():
        values = scores.scores[reward]
        judged = [row for row, value in enumerate(values) if value == value]  # NaN: the reward is not for that picture
        best = max(judged, key=values.__getitem__)
        interval = "" if len(judged) == 1 else f", 95 % of [{summary['low']:.4g}, {summary['high']:.4g}]"
        print(f"{reward}: mean {summary['mean']:.4g}{interval}")
        print(f"  best: {scores.files[best]} ({values[best]:.4g})")
    print("wrote", scores.save(options.output))


if __name__ == "__main__":
    main()
