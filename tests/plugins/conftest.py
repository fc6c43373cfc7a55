"""Plugins as pip leaves them, and programs that find them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rdm_sdk.cli.main import main
from rdm_sdk.plugins.registry import discover, registry

Install = Callable[..., None]
Run = Callable[..., str]
HOOK = "from rdm_sdk import hookimpl\n\n@hookimpl\ndef {hook}({arguments}):\n    {body}\n"
INK = '''
from rdm_sdk import Capabilities, Reward, RewardConfig

class Ink(Reward):
    """How dark an image is."""
    capabilities = Capabilities(gradient="autograd")
    class Config(RewardConfig):
        scale: float = 1.0
    def score(self, batch):
        return self.config.scale * (1 - batch.images.mean(dim=(1, 2, 3)))

def darkness(images, prompts, **columns):
    return (1 - images.mean(dim=(1, 2, 3))).tolist()
'''


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """Return `install(distribution, entry, hook=..., arguments=..., body=..., code=...)`."""

    def make(
        distribution: str,
        entry: str = "main",
        hook: str = "rdm_register_rewards",
        arguments: str = "register",
        body: str = "pass",
        code: str | None = None,
    ) -> None:
        module = distribution.replace("-", "_")
        source = HOOK.format(hook=hook, arguments=arguments, body=body) if code is None else code
        (tmp_path / f"{module}.py").write_text(source)
        (tmp_path / f"{module}_rewards.py").write_text(INK)
        info = tmp_path / f"{module}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[rdm_sdk]\n{entry} = {module}\n")

    return make


@pytest.fixture
def start(tmp_path: Path) -> Run:
    """Return `start(code or command-line words, **environment)`: standard output and error of a fresh interpreter."""

    def process(*words: str, code: str | None = None, **environment: str) -> str:
        command = ["-c", code] if code is not None else ["-m", "rdm_sdk.cli.main", *words]
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        everything = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
        done = subprocess.run([sys.executable, *command], env=everything, capture_output=True, text=True, timeout=120)
        return done.stdout + done.stderr

    return process


@contextmanager
def plugins_of(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Look for plugins anew, in a folder too and by these variables; afterwards nobody has seen them."""
    before, shown = set(sys.modules), warnings.showwarning
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.showwarning = lambda *told, **_: print(warnings.formatwarning(*told[:4]), file=sys.stderr)
        for unseen in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", unseen)  # as Python has it
        patch.syspath_prepend(str(folder))
        for name, value in environment.items():
            patch.setenv(name, value)
        found = (discover, registry)
        for cached in found:
            cached.cache_clear()
        try:
            yield
        finally:
            warnings.showwarning = shown
            for name in set(sys.modules) - before:
                if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                    del sys.modules[name]
            for cached in found:
                cached.cache_clear()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return `run(...)`: what `start(...)` returns, of this process."""

    def here(*words: str, code: str | None = None, **environment: str) -> str:
        capsys.readouterr()
        with plugins_of(tmp_path, environment):
            if code is None:
                main(words)
            else:
                exec(code, {})
        return "".join(capsys.readouterr())

    return here
