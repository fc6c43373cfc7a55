"""Reading the text in a picture: PaddleOCR's PP-OCRv6 (small) by `rapidocr`, on weights inside its wheel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdm_sdk import RewardError

DETECTION, RECOGNITION = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
LONGEST_SIDE = 960
"""Pictures are made no larger than that before text is looked for, and never enlarged: PaddleOCR's old default."""


class Reader:
    """Reads pictures on the CPU, each with one thread, so that what it reads depends on nothing but the picture.

    Args:
        threads: how many pictures are read at the same time.

    Raises:
        RewardError: a model is missing or cannot be loaded. Nothing is ever downloaded.
    """

    def __init__(self, threads: int) -> None:
        from rapidocr import RapidOCR

        self.threads = threads
        self.source = f"PP-OCRv6 small, rapidocr {version('rapidocr')}"
        params = {
            "Global.log_level": "error",  # it warns of every picture without text
            "Global.use_cls": False,  # looks for lines that stand on their head
            "Det.model_path": str(_bundled(DETECTION)),
            "Det.limit_type": "max",
            "Det.limit_side_len": LONGEST_SIDE,
            "Rec.model_path": str(_bundled(RECOGNITION)),
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        try:
            self._engine: Any = RapidOCR(params=params)
            blank = np.full((32, 64, 3), 255, np.uint8)
            # Models are loaded at their first use, which is to be now.
            self._engine(blank, use_det=True, use_rec=False)
            self._engine(blank, use_det=False, use_rec=True)
            self._engine(blank, use_det=True, use_rec=True)
        except Exception as error:
            raise RewardError(
                f"the models of rapidocr cannot be loaded: {type(error).__name__}: {str(error).strip()[-300:]}. "
                "Install it anew: pip install --force-reinstall --no-deps rapidocr"
            ) from error

    def read(self, pictures: NDArray[np.uint8]) -> list[str]:
        """Return the text in each RGB picture `[N, H, W, 3]`, lines from top to bottom, with a space between them."""
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._read_one, pictures))

    def _read_one(self, picture: NDArray[np.uint8]) -> str:
        found = self._engine(np.ascontiguousarray(picture[:, :, ::-1]))  # OpenCV's order of colors
        return " ".join(found.txts or ())


def _bundled(name: str) -> Path:
    path = Path(str(files("rapidocr"))) / "models" / name
    if not path.is_file():
        raise RewardError(
            f"rapidocr {version('rapidocr')} has no {name} in its folder of models, and nothing is downloaded; the ocr "
            "reward was written for rapidocr 3.10: pip install 'rapidocr==3.10.*'"
        )
    return path
