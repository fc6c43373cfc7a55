"""Names of students and runs: as much of their paths as tells them from each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdm_sdk import ConfigError
from rdm_sdk.evaluation.candidates import Candidate, distinct, teacher_candidate
from rdm_sdk.evaluation.names import short_names


def student(folder: Path, steps: int = 4) -> Candidate:
    return Candidate(f"{folder.name}, {steps} steps", steps, folder, {}, "")


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["a/s", "b/s", "c"], ["a/s", "b/s", "c"]),
        (["seed0/demo/student", "seed1/demo/student"], ["seed0/demo/student", "seed1/demo/student"]),
        (["seed0/demo/student", "seed0/other/student"], ["demo/student", "other/student"]),
        (["0/demo/s", "1/demo/s", "x/s"], ["0/demo/s", "1/demo/s", "x/s"]),
    ],
)
def test_names_are_as_long_as_need_be(folders: list[str], names: list[str], tmp_path: Path) -> None:
    """Each for itself."""
    assert short_names([tmp_path / folder for folder in folders]) == names


def test_a_folder_within_the_other(tmp_path: Path) -> None:
    """The ends of one path may be all of the other's, and a name may be taken by something else."""
    assert short_names([Path("/s"), Path("/a/s")]) == ["/s", "a/s"]
    assert short_names([tmp_path / "a" / "teacher"], taken=("teacher",)) == ["a/teacher"]


def test_folders_are_named_as_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link by its own name; where the name says nothing, by the folder that it stands for."""
    (tmp_path / "run7").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "run7")
    monkeypatch.chdir(tmp_path / "run7")
    assert short_names([tmp_path / "latest", Path("..")]) == ["latest", tmp_path.name]
    assert short_names([Path()]) == ["run7"]


def test_students_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """However far up their folders differ, and whatever their numbers of steps."""
    one, other = tmp_path / "seed0" / "demo" / "student", tmp_path / "seed1" / "demo" / "student"
    found = distinct([teacher_candidate(4, {}), student(one, 2), student(one), student(other)])
    assert [candidate.name for candidate in found] == [
        "teacher, 4 steps",
        "seed0/demo/student, 2 steps",
        "seed0/demo/student, 4 steps",
        "seed1/demo/student, 4 steps",
    ]
    found = distinct([teacher_candidate(4, {}), student(tmp_path / "a" / "teacher")])
    assert [candidate.name for candidate in found] == ["teacher, 4 steps", "a/teacher, 4 steps"]


def test_one_student_in_two_spellings_is_given_twice(tmp_path: Path) -> None:
    """By where the paths lead."""
    (tmp_path / "student").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "student")
    for again in (tmp_path / "link", tmp_path / "x" / ".." / "student", tmp_path / "student"):
        with pytest.raises(ConfigError, match=r"student, 4 steps' is given twice"):
            distinct([student(again), student(tmp_path / "student")])
