"""The kit's check of imports, for the modules of all rewards at once: a process for each takes seconds of imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

from rdm_sdk.plugins.registry import registry
from rdm_sdk.testing import reward_checks

IMPORT_ALL = """
import importlib, json, sys, torch

def awake(*_):
    raise RuntimeError("CUDA was initialized at import")

torch.cuda._lazy_init = torch.cuda.init = awake
failed = []
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except Exception:
        failed.append(module)
if not torch.is_grad_enabled() or torch.get_default_dtype() != torch.float32:
    failed = sys.argv[1:]
print(json.dumps(failed))
"""


def check_imports_together() -> None:
    """Let the kit look at all registered rewards in one process; where one of them fails, each is looked at alone."""
    alone = reward_checks.import_problem
    modules = sorted({entry.target.partition(":")[0] for entry in registry().rewards.values()})

    @cache
    def all_are_well() -> bool:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", IMPORT_ALL, *modules]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == []

    def problem(module: str) -> str:
        return "" if module in modules and all_are_well() else alone(module)

    reward_checks.import_problem = problem
