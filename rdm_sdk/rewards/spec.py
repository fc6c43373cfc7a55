"""The reward spec: "dm + 0.5*hps:v2.1 + 0.3*acme/sharpness[radius=3]", parsed, validated and printed.

Nothing here loads a reward, or torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from math import isfinite
from typing import Annotated, Any, TypeAlias, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
)
from pydantic import ValidationError as PydanticError

from rdm_sdk.errors import ConfigError, RDMError, RewardError, nearest, shown
from rdm_sdk.rewards.grammar import KEY, NAME, NUMBER, PART, SIGN, Parser, show_value

Scalar: TypeAlias = (
    StrictBool | StrictInt | Annotated[float, Field(strict=True, allow_inf_nan=False)] | StrictStr | None
)
Value: TypeAlias = Scalar | tuple[Scalar, ...]
Model = TypeVar("Model", bound=BaseModel)

_FACTOR = re.compile(r"[0-9.]+(?:[eE][+-]?[0-9]+)?")
_SECRET = re.compile(r"(.*_)?(api_?key|access_?key|token|secret|password|passwd|credentials?)", re.IGNORECASE)
_ABSOLUTE = re.compile(r"/|~|[A-Za-z]:[/\\]")
_SEPARATOR = re.compile(r"[/\\]")
_HINT = "A spec is a sum of terms such as 'dm + 0.5*clip'"


class RewardTerm(BaseModel):
    """One reward of a run as it was asked for: which, how it is set up, and its weight.

    `str(term)` is a spec that parses back to an equal term.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    variant: str | None = None
    revision: str | None = None
    options: dict[str, Value] = Field(default_factory=dict)
    weight: FiniteFloat = 1.0

    @field_validator("name", "variant", "revision")
    @classmethod
    def _can_be_written(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not (NAME if info.field_name == "name" else PART).fullmatch(value):
            raise ValueError("it holds characters that a spec has no place for")
        return value

    @field_validator("options", mode="before")
    @classmethod
    def _can_be_read(cls, options: object) -> object:
        """Tell a value that a spec has no form for: a union of types would complain of the first of them alone."""
        for key, value in options.items() if isinstance(options, Mapping) else ():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                writable = isinstance(item, (bool, int, str)) or item is None
                if not (writable or (isinstance(item, float) and isfinite(item))):
                    raise RewardError(
                        f"option {shown(key, 60)} is {shown(value, 60)}, and a spec, which checkpoints and model cards "
                        "hold, has no form for it; options are finite numbers, texts, true, false, null and lists of "
                        "these"
                    )
        return options

    @field_validator("options")
    @classmethod
    def _can_be_kept(cls, options: dict[str, Value]) -> dict[str, Value]:
        for key, value in options.items():
            if not KEY.fullmatch(key):
                raise ValueError(f"{key!r} is not a name that an option can have")
            if is_secret(key) and isinstance(value, str):
                raise RewardError(
                    f"{key} is a secret, and a spec is copied into model cards, checkpoints and logs; let the reward "
                    "read it from an environment variable"
                )
        return options

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def reference(self) -> str:
        """The term without its weight."""
        text = self.name
        text += f":{self.variant}" if self.variant is not None else ""
        text += f"@{self.revision}" if self.revision is not None else ""
        if self.options:
            text += "[" + ",".join(f"{key}={show_value(value)}" for key, value in sorted(self.options.items())) + "]"
        return text

    def __str__(self) -> str:
        if abs(self.weight) == 1:
            return self.reference if self.weight == 1 else f"-{self.reference}"
        return f"{self.weight!r}*{self.reference}"


def is_secret(option: str) -> bool:
    """Whether the name of an option says that its value is nobody else's to see: `api_key`, `hub_token`, ..."""
    return _SECRET.fullmatch(option) is not None


def without_places(term: RewardTerm) -> RewardTerm:
    """Return a term whose options name no folder of this machine: of an absolute path, the last part is left."""
    options = {
        key: f".../{_SEPARATOR.split(value)[-1]}" if isinstance(value, str) and _ABSOLUTE.match(value) else value
        for key, value in term.options.items()
    }
    return term.model_copy(update={"options": options})


def show_spec(terms: Sequence[RewardTerm]) -> str:
    """Return the spec of a sum of one or more terms."""
    parts = [str(term) for term in terms]
    return parts[0] + "".join(f" - {part[1:]}" if part.startswith("-") else f" + {part}" for part in parts[1:])


def parse_spec(spec: str) -> list[RewardTerm]:
    """Parse a spec such as "dm + 0.5*hps:v2.1" into terms.

    Raises:
        RewardError: the spec is malformed; the message shows the problem and its column.
    """
    parser = Parser(spec, "the reward spec ", _HINT, RewardError)
    if parser.at_end():
        raise RewardError("the reward spec is empty; write a sum of terms such as 'dm + 0.5*clip'")
    terms = [_product(parser, negative=parser.take(SIGN) == "-")]
    while not parser.at_end():
        sign = parser.take(SIGN)
        if sign is None:
            parser.fail("expected '+', '-' or '*' here")
        terms.append(_product(parser, negative=sign == "-"))
    return terms


def _product(parser: Parser, negative: bool) -> RewardTerm:
    weight, reference = -1.0 if negative else 1.0, None
    start = parser.position
    while True:
        number = parser.take(_FACTOR)
        if number is not None:
            if not NUMBER.fullmatch(number):
                parser.fail(f"{shown(number, 60)} is not a number")
            weight *= float(number)
        elif reference is None:
            reference = parser.reference("a number or a reward's name")
        else:
            parser.fail("a product holds one reward and numbers; a second reward stands here")
        if not parser.mark("*"):
            break
    if reference is None:
        parser.fail("expected '*' and a reward after the number")
    try:
        return make_term(vars(reference) | {"weight": weight})
    except RewardError as error:
        parser.fail(str(error), at=start)


def label_terms(terms: Sequence[RewardTerm], by_place: Collection[RewardTerm] = ()) -> list[str]:
    """Return the shortest names that tell the terms apart: the name, with the variant, or the whole reference.

    Args:
        terms: the rewards of a run.
        by_place: those that are named `module:name`, of which the latter is the name.

    Raises:
        RewardError: two terms are the same reward.
    """
    forms: list[Callable[[RewardTerm], str]] = [
        lambda term: str(term.variant) if term in by_place else term.name,
        lambda term: term.name if term.variant is None else f"{term.name}:{term.variant}",
        lambda term: term.reference,
    ]
    counts = [Counter(form(term) for term in terms) for form in forms]
    labels = []
    for term in terms:
        written = [form(term) for form in forms]
        unique = [text for text, count in zip(written, counts, strict=True) if count[text] == 1]
        if not unique:
            raise RewardError(
                f"two rewards have the name {shown(term.reference)}; if they are one, name it once, with the sum of "
                "the weights. If not, give one of them another name: name a lambda by 'def', set __name__ of a partial "
                "or a function, and name of a Reward object"
            )
        labels.append(unique[0])
    return labels


def make_term(fields: Mapping[str, object]) -> RewardTerm:
    """Return the term with these fields (`name`, `variant`, `revision`, `options`, `weight`).

    Raises:
        RewardError: a field is unknown (its nearest match is named) or has a value it cannot have.
    """
    return checked_model(RewardTerm, fields, f"reward {fields.get('name')!r}", RewardError)


def _may_be_bool(annotation: object) -> bool:
    """Whether a field takes true and false. Where it takes numbers alone, pydantic would read them as 1 and 0."""
    return annotation in (bool, object, Any) or any(map(_may_be_bool, get_args(annotation)))


def checked_model(
    model: type[Model], fields: Mapping[str, object], owner: str, error_class: type[RDMError] = ConfigError
) -> Model:
    """Build a pydantic model, turning its complaints into one of the SDK's errors, with the nearest known field."""
    known = list(model.model_fields)
    for name in fields:
        if name not in known:
            offered = f"Options: {', '.join(known)}" if known else "It takes none."
            raise error_class(f"{owner} has no option {shown(name)}.{nearest(str(name), known)} {offered}")
        if isinstance(fields[name], bool) and not _may_be_bool(model.model_fields[name].annotation):
            raise error_class(f"{owner}, option {name}: it cannot be true or false; got {shown(fields[name])}")
    try:
        return model.model_validate(dict(fields))
    except PydanticError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise error_class(f"{owner}, option {where}: {first['msg']}; got {shown(first['input'])}") from error
