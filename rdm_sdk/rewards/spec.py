"""The reward spec: "dm + 0.5*hps:v2.1 + 0.3*acme/sharpness[radius=3]", parsed, validated and printed.

    sum     = [sign] product { sign product }
    product = factor { "*" factor }                  numbers, and exactly one reward
    reward  = name [":" variant] ["@" revision] ["[" [key "=" value {"," key "=" value}] "]"]
    value   = true | false | null | number | word | "text as in JSON" | "[" list of these "]"

Nothing here loads a reward, or torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NoReturn, TypeAlias, TypeVar

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

from rdm_sdk.errors import ConfigError, RDMError, RewardError, nearest
from rdm_sdk.plugins.hookspecs import REWARD_NAME

Scalar: TypeAlias = (
    StrictBool | StrictInt | Annotated[float, Field(strict=True, allow_inf_nan=False)] | StrictStr | None
)
Value: TypeAlias = Scalar | tuple[Scalar, ...]
Model = TypeVar("Model", bound=BaseModel)

_KEY = r"[A-Za-z_][A-Za-z0-9_]*"
_PART = r"[A-Za-z0-9_.][A-Za-z0-9_./-]*"
_WORD = r"[A-Za-z0-9_./~:-]+"
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_KEYWORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None}


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
        if value is not None and not re.fullmatch(REWARD_NAME if info.field_name == "name" else _PART, value, re.ASCII):
            raise ValueError("it holds characters that a spec has no place for")
        return value

    @field_validator("options")
    @classmethod
    def _keys_can_be_written(cls, options: dict[str, Value]) -> dict[str, Value]:
        for key in options:
            if not re.fullmatch(_KEY, key, re.ASCII):
                raise ValueError(f"{key!r} is not a name that an option can have")
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
            text += "[" + ",".join(f"{key}={_show(value)}" for key, value in sorted(self.options.items())) + "]"
        return text

    def __str__(self) -> str:
        if abs(self.weight) == 1:
            return self.reference if self.weight == 1 else f"-{self.reference}"
        return f"{self.weight!r}*{self.reference}"


def show_spec(terms: Sequence[RewardTerm]) -> str:
    """Return the spec of a sum of one or more terms."""
    parts = [str(term) for term in terms]
    return parts[0] + "".join(f" - {part[1:]}" if part.startswith("-") else f" + {part}" for part in parts[1:])


def parse_spec(spec: str) -> list[RewardTerm]:
    """Parse a spec such as "dm + 0.5*hps:v2.1" into terms.

    Raises:
        RewardError: the spec is malformed; the message shows the problem and its column.
    """
    return _Parser(spec).sum()


def label_terms(terms: Sequence[RewardTerm]) -> list[str]:
    """Return the shortest names that tell the terms apart: the name, with the variant, or the whole reference.

    Raises:
        RewardError: two terms are the same reward.
    """
    forms: list[Callable[[RewardTerm], str]] = [
        lambda term: term.name,
        lambda term: term.name if term.variant is None else f"{term.name}:{term.variant}",
        lambda term: term.reference,
    ]
    labels = []
    for term in terms:
        unique = [form(term) for form in forms if [form(other) for other in terms].count(form(term)) == 1]
        if not unique:
            raise RewardError(f"two rewards have the name {term.reference!r}; give one of them another name")
        labels.append(unique[0])
    return labels


def make_term(fields: Mapping[str, object]) -> RewardTerm:
    """Return the term with these fields (`name`, `variant`, `revision`, `options`, `weight`).

    Raises:
        RewardError: a field is unknown (its nearest match is named) or has a value it cannot have.
    """
    return checked_model(RewardTerm, fields, f"reward {fields.get('name')!r}", RewardError)


def checked_model(
    model: type[Model], fields: Mapping[str, object], owner: str, error_class: type[RDMError] = ConfigError
) -> Model:
    """Build a pydantic model, turning its complaints into one of the SDK's errors, with the nearest known field."""
    known = list(model.model_fields)
    for name in fields:
        if name not in known:
            offered = f"Options: {', '.join(known)}" if known else "It takes none."
            raise error_class(f"{owner} has no option {name!r}.{nearest(str(name), known)} {offered}")
    try:
        return model.model_validate(dict(fields))
    except PydanticError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise error_class(f"{owner}, option {where}: {first['msg']}; got {first['input']!r}") from error


def _show(value: Value) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(_show(item) for item in value) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(_WORD, value) and value not in _KEYWORDS and not re.match(rf"-?{_NUMBER}", value)
        return value if plain else json.dumps(value)
    return json.dumps(value)


class _Parser:
    """Recursive descent over the spec's text; every failure is a `RewardError` with a column."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def sum(self) -> list[RewardTerm]:
        if not self.text.strip():
            raise RewardError("the reward spec is empty; write a sum of terms such as 'dm + 0.5*clip'")
        sign = self._take(r"[+-]")
        terms = [self._product(sign == "-")]
        while not self._at_end():
            sign = self._take(r"[+-]")
            if sign is None:
                self._fail("expected '+', '-' or '*' here")
            terms.append(self._product(sign == "-"))
        return terms

    def _product(self, negative: bool) -> RewardTerm:
        weight, fields = -1.0 if negative else 1.0, None
        start = self.position
        while True:
            number = self._take(r"[0-9.]+(?:[eE][+-]?[0-9]+)?")
            if number is not None:
                if not re.fullmatch(_NUMBER, number):
                    self._fail(f"{number!r} is not a number")
                weight *= float(number)
            elif fields is None:
                fields = self._reward()
            else:
                self._fail("a product holds one reward and numbers; a second reward stands here")
            if self._take(r"\*") is None:
                break
        if fields is None:
            self._fail("expected '*' and a reward after the number")
        try:
            return make_term(fields | {"weight": weight})
        except RewardError as error:
            self.position = start
            self._fail(str(error))

    def _reward(self) -> dict[str, object]:
        name = self._take(REWARD_NAME)
        if name is None:
            self._fail("expected a number or a reward's name here")
        fields: dict[str, object] = {"name": name}
        for mark, key in ((":", "variant"), ("@", "revision")):
            if self._take(mark, skip_space=False) is not None:
                fields[key] = self._take(_PART, skip_space=False)
                if fields[key] is None:
                    self._fail(f"expected a {key} after {mark!r}")
        if self._take(r"\[", skip_space=False) is not None:
            fields["options"] = self._options()
        return fields

    def _options(self) -> dict[str, Value]:
        options: dict[str, Value] = {}
        while self._take(r"\]") is None:
            if options and self._take(",") is None:
                self._fail("expected ',' or ']' here")
            key = self._take(_KEY)
            if key is None:
                self._fail("expected an option such as key=value here")
            if key in options:
                self._fail(f"the option {key!r} is given twice")
            if self._take("=") is None:
                self._fail(f"expected '=' after the option {key!r}")
            options[key] = self._list() if self._take(r"\[") is not None else self._scalar()
        return options

    def _list(self) -> tuple[Scalar, ...]:
        items: list[Scalar] = []
        while self._take(r"\]") is None:
            if items and self._take(",") is None:
                self._fail("expected ',' or ']' here")
            items.append(self._scalar())
        return tuple(items)

    def _scalar(self) -> Scalar:
        quoted = self._take(r'"(?:[^"\\]|\\.)*"')
        if quoted is not None:
            try:
                return str(json.loads(quoted))
            except ValueError:
                self._fail("a quoted value is written as in JSON")
        word = self._take(_WORD)
        if word is None:
            self._fail("expected a value here; put texts with other characters in double quotes")
        if word in _KEYWORDS:
            return _KEYWORDS[word]
        if re.fullmatch(r"-?[0-9]{1,4000}", word):  # Python reads no longer ones
            return int(word)
        if re.fullmatch(rf"-?{_NUMBER}", word):
            return float(word)
        if re.match(rf"-?{_NUMBER}", word):
            # "1e+16" breaks at "+"; anything else that begins like a number is a text in need of quotes.
            rest = self._take(r"\+[0-9]+", skip_space=False)
            if rest is not None and re.fullmatch(rf"-?{_NUMBER}", word + rest):
                return float(word + rest)
            self._fail("a text that begins with a digit needs double quotes")
        return word

    def _at_end(self) -> bool:
        return not self.text[self.position :].strip()

    def _take(self, pattern: str, skip_space: bool = True) -> str | None:
        """Consume and return the pattern's match at the current position, None if there is none."""
        match = re.compile((r"\s*" if skip_space else "") + f"({pattern})", re.ASCII).match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match[1]

    def _fail(self, problem: str) -> NoReturn:
        rest = self.text[self.position :]
        column = self.position + len(rest) - len(rest.lstrip()) + 1
        raise RewardError(
            f"cannot read the reward spec {self.text!r} at column {column}: {problem}. A spec is a sum of terms such "
            "as 'dm + 0.5*clip'."
        )
