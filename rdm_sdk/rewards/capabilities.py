"""What a reward declares of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeGuard, get_args, get_origin, get_type_hints

from rdm_sdk.errors import RewardError, nearest


@dataclass(frozen=True)
class Capabilities:
    """What a reward can do and needs; declared by its author, never sniffed."""

    space: Literal["pixel", "latent"] = "pixel"
    """Whether it reads decoded images or latents."""
    gradient: Literal["none", "autograd", "field", "awaited"] = "none"
    """"autograd": `score` is differentiable; "field": the reward computes its gradient itself, in `field`; "awaited":
    an asynchronous reward is told its gradient by whoever scores, in `gradient_async`."""
    scope: Literal["sample", "group"] = "sample"
    """"group": a sample's score depends on the other samples of its prompt, so groups are always judged whole."""
    prompts: bool = False
    """Whether the prompt matters to the score."""
    columns: tuple[str, ...] = ()
    """Columns of the dataset that it cannot do without; it is not for samples with None in one (`applies`)."""
    reads: tuple[str, ...] = ()
    """Further columns that it reads where the dataset has them; these and `columns` alone are sent to a server."""
    head: bool = False
    """Whether the role that it `trains` is a module, made by `make_head`, and no LoRA adapter."""
    range: tuple[float, float] | None = None
    """Bounds of the scores in native units, where there are any (they may be infinite)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the images or latents that it is given."""
    stochastic: bool = False
    """Whether two calls on the same batch may differ."""
    context: bool = False
    """Whether `score` needs the models of a training run (`batch.context`); one with `gradient="field"` always may."""
    asynchronous: bool = False
    """Whether it is awaited (`score_async`); such rewards run at the same time as the others."""
    trains: str | None = None
    """The role that the reward trains with `training_loss`, if any: a LoRA adapter on the base model, or the module
    of `make_head`."""
    parameters: int | None = None
    """How many parameters its models hold, for `rdm-sdk plan`; None is unknown."""

    @property
    def needs_models(self) -> bool:
        """Whether it cannot judge samples without the models that made them."""
        return self.context or self.gradient == "field"

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        for name, hint in get_type_hints(Capabilities).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                offered = ", ".join(repr(choice) for choice in choices)
                raise RewardError(
                    f"Capabilities({name}={value!r}) cannot be used; it must be one of {offered}."
                    f"{nearest(str(value), choices)}"
                )
            if hint is bool and not isinstance(value, bool):
                raise RewardError(f"Capabilities({name}={value!r}) cannot be used; it must be True or False")
        for name in ("columns", "reads"):
            columns: object = getattr(self, name)
            if isinstance(columns, str):
                raise RewardError(f"Capabilities({name}={columns!r}) must be a tuple of names: ({columns!r},)")
        count: object = self.parameters
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise RewardError(
                f"Capabilities(parameters={count!r}) cannot be used; it must be a whole number, 0 or more, or None"
            )
        bounds: object = self.range
        if bounds is not None and not (_are_two_numbers(bounds) and bounds[0] < bounds[1]):
            raise RewardError(f"Capabilities(range={bounds!r}) cannot be used; it must be (low, high) or None")

    def _check_combinations(self) -> None:
        if self.asynchronous and self.gradient not in ("none", "awaited"):
            raise RewardError(
                f"Capabilities(asynchronous=True, gradient={self.gradient!r}): an asynchronous reward is only scored; "
                "declare gradient='none', or 'awaited' if gradient_async(batch) returns the gradient too"
            )
        if self.gradient == "awaited" and not self.asynchronous:
            raise RewardError(
                "Capabilities(gradient='awaited') goes with asynchronous=True: gradient_async(batch) is awaited"
            )
        if self.dtype == "float16" and self.gradient == "autograd":
            raise RewardError(
                "Capabilities(dtype='float16', gradient='autograd'): gradients of pixels underflow in float16; take "
                "bfloat16, or float32 and convert inside score()"
            )
        if self.context and self.asynchronous:
            raise RewardError(
                "Capabilities(context=True, asynchronous=True): a reward that needs the run's models computes "
                "with them, and is not awaited; write score(batch), without asynchronous=True"
            )
        if self.context and self.gradient == "autograd":
            raise RewardError(
                "Capabilities(context=True, gradient='autograd'): nothing is differentiated through the run's models; "
                "declare gradient='field' and return the gradient from field(batch), or gradient='none'"
            )


def _are_two_numbers(value: object) -> TypeGuard[Sequence[float]]:
    """Whether a value is a pair of numbers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(isinstance(bound, Real) and not isinstance(bound, bool) for bound in value)
