"""`rdm-sdk plan`: what memory a run takes, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rdm_sdk.errors import ConfigError

HELP = "memory that a training run takes, per part, from configs alone; exit status 1 if it does not fit"


@dataclass
class PlanArguments:
    """What `plan` takes beside what `train` takes."""

    memory: float | None = field(
        default=None, metadata={"help": "GB (2^30 bytes) that it must fit into; by default this GPU's, if any."}
    )

    def __post_init__(self) -> None:
        if self.memory is not None and not self.memory > 0:
            raise ConfigError(f"--memory must be a positive number of GB; got {self.memory}")


def run(arguments: Sequence[str]) -> int:
    """Print the plan, and what would help where it does not fit; return the exit status."""
    from rdm_sdk.cli.run_arguments import parse_run
    from rdm_sdk.planning.advice import advise, show_advice
    from rdm_sdk.planning.plan import GB, PlannedRun

    # A run on a GPU is planned, and there need be none here: the settings are checked as those of a CPU.
    given, (options,) = parse_run("plan", HELP, arguments, [PlanArguments], {"use_cpu": True})
    given.check()
    run = PlannedRun(given.model, given.config, given.arguments.rewards, *given.loras)
    plan = run.plan()
    print(plan)
    if plan.unknown:
        print(f"unknown, and not in the total: {', '.join(plan.unknown)}")
    memory = _memory_here() if options.memory is None else options.memory * GB
    if memory is None:
        return 0
    if plan.total <= memory:
        print(f"\nfits into {memory / GB:.2f} GB")
        return 0
    print(f"\ndoes not fit into {memory / GB:.2f} GB; {show_advice(advise(run, int(memory)))}")
    return 1


def _memory_here() -> int | None:
    """Return the memory of this machine's GPU in bytes, None where there is none."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
