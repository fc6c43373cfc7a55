"""What importing a module does to a program, seen in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec


@cache
def import_problem(module: str) -> str:
    """Import a module in a fresh interpreter, where it may wake and set nothing; returns what went wrong."""
    if find_spec(module) is None:
        return f"the module {module!r} cannot be found"
    code = (
        "import sys, torch\n"
        "def awake(*_): raise RuntimeError('CUDA was initialized at import')\n"
        "torch.cuda._lazy_init = torch.cuda.init = awake\n"
        "import importlib; importlib.import_module(sys.argv[1])\n"
        "if not torch.is_grad_enabled(): raise RuntimeError('gradients were turned off at import')\n"
        "dtype = torch.get_default_dtype()\n"
        "if dtype != torch.float32: raise RuntimeError(f'the default dtype was set to {dtype} at import')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, env=environment)
    return (
        ""
        if done.returncode == 0
        else f"importing {module!r} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    )
