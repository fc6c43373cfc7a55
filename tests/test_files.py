"""Files are replaced as a whole, and a write that fails leaves things as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rdm_sdk.files import replacing


def test_a_file_is_replaced_once_it_is_written(tmp_path: Path) -> None:
    """Until then the old one is there."""
    path = tmp_path / "new" / "scores.csv"
    for text in ("first", "second"):
        with replacing(path) as staged:
            staged.write_text(text, encoding="utf-8")
            assert path.exists() == (text == "second")
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates"), KeyboardInterrupt()])
def test_half_a_file_is_not_left_behind(tmp_path: Path, error: BaseException) -> None:
    """The old file stays, and the error is the one that was raised, whether or not anything was written."""
    path = tmp_path / "scores.csv"
    path.write_text("old", encoding="utf-8")

    def write(half: bool) -> None:
        with replacing(path) as staged:
            if half:
                staged.write_text("half", encoding="utf-8")
            raise error

    for half in (True, False):
        with pytest.raises(type(error)) as caught:
            write(half)
        assert caught.value is error
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_text(encoding="utf-8") == "old"


def test_a_file_that_cannot_take_its_place_is_removed(tmp_path: Path) -> None:
    """A folder stands there."""
    (tmp_path / "scores.csv" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r"scores\.csv"), replacing(tmp_path / "scores.csv") as staged:
        staged.write_text("whole", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_tensors_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    """What safetensors writes is private to its owner, and a cache of prompts may be several people's."""
    with replacing(tmp_path / "tensors") as staged:
        save_file({"x": torch.zeros(2)}, staged)
    (tmp_path / "text").write_text("as usual", encoding="utf-8")
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "text").stat().st_mode
