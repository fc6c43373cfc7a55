"""A run's processes, as accelerate has started them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from rdm_sdk.training.processes import Processes
from rdm_sdk.training.roll_call import RollCall


def processes_of(accelerator: Accelerator, roll_call: RollCall) -> Processes:
    """Return the processes that an accelerator's is one of, which the roll call knows of when they wait."""

    def reduce(tensor: Tensor, how: Literal["sum", "mean"]) -> Tensor:
        with roll_call.waiting():
            reduced: Tensor = accelerator.reduce(tensor, reduction=how)
        return reduced

    def gather(value: object) -> list[Any]:
        with roll_call.waiting():
            gathered: list[Any] = gather_object([value])
        return gathered

    return Processes(accelerator.num_processes, reduce, gather, accelerator.process_index, roll_call.note)


def leave_unwrapped(accelerator: Accelerator) -> None:
    """Let an accelerator set the precision of a network, and no more: shared out weights cannot be wrapped for DDP.

    Nobody calls that wrapper, whose gradients the step averages itself.
    """
    prepare: Any = partial(accelerator.prepare_model, evaluation_mode=True)
    accelerator.prepare_model = prepare
