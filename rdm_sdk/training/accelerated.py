"""A run's processes, as accelerate has started them."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import gather_object

from rdm_sdk.training.processes import Processes


def processes_of(accelerator: Accelerator) -> Processes:
    """Return the processes that an accelerator's is one of."""
    return Processes(
        accelerator.num_processes,
        lambda tensor, how: accelerator.reduce(tensor, reduction=how),
        lambda value: gather_object([value]),
        accelerator.process_index,
    )
