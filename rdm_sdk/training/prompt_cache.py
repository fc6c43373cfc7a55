"""Encoded prompts, kept for as long as they are used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from rdm_sdk.errors import ConfigError
from rdm_sdk.families.encodings import Masks, full_lengths, padded, rows_without_padding
from rdm_sdk.types import Condition, select, sent

if TYPE_CHECKING:
    from rdm_sdk.training.prompt_store import PromptStore

TOGETHER = 8
"""How many prompts of a dataset are encoded at a time."""
KEPT = 256
"""How many prompts are kept, where not all are."""


class PromptCache:
    """Encoded prompts, the most recently used ones kept (on the CPU, without padding); a call returns conditions.

    In a batch, an encoding's last bits depend on the batch. So what is encoded together must not depend on when a
    prompt is first asked for, or a resumed run would not be the uninterrupted one: prompts that the cache `knows` are
    encoded in batches that their list alone decides, all others by themselves.

    Args:
        encode: encodes a batch of prompts, None being no prompt.
        device: where conditions are needed.
        capacity: how many prompts are kept; None is all.
        encoded: called after new prompts were encoded.
        masks: the family's.
        check: raises if the encodings of prompts `[N, ...]` cannot be used; asked about those that are.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str | None]], Condition],
        device: torch.device,
        capacity: int | None = KEPT,
        encoded: Callable[[], None] = lambda: None,
        masks: Masks = (),
        check: Callable[[Condition, Sequence[str | None]], None] = lambda condition, prompts: None,
    ) -> None:
        self._encode, self._device, self._encoded, self._check = encode, device, encoded, check
        self._masks, self._lengths = masks, dict[str, int]()
        self.capacity = capacity
        self.bytes_kept = 0
        """How much memory the prompts that are kept take."""
        self._rows: OrderedDict[str | None, Condition] = OrderedDict()
        self._batches: dict[str, tuple[list[str], int]] = {}
        """A known prompt's batch, and its place there."""
        self._usable: set[str | None] = set()
        """The prompts whose rows were checked."""
        self._nothing: Condition = {}
        """No prompt, on the device."""
        self.store: PromptStore | None = None
        """Where known prompts are kept beyond the run."""

    # ---- Prompts that are known ---------------------------------------------------------------------------------

    def know(self, prompts: Iterable[str]) -> None:
        """Encode these prompts, as far as they are not known yet, in batches of `TOGETHER`, in their order."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._batches]
        for start in range(0, len(new), TOGETHER):
            batch = new[start : start + TOGETHER]
            self._batches |= {prompt: (batch, place) for place, prompt in enumerate(batch)}

    @property
    def batches(self) -> list[list[str]]:
        """The known prompts, in the batches that they are encoded in."""
        return [batch for batch, place in self._batches.values() if place == 0]

    def prepare(self, batch: list[str]) -> None:
        """Encode a batch of known prompts, unless it is kept; where there is a store, it is kept there."""
        if self.store is None:
            self._fetch(batch)
        elif not self.store.holds(batch):
            rows = self._encoded_rows(batch)
            self._check_rows(batch, rows)
            self.store.write(batch, rows, self._lengths)

    def close(self, reason: str) -> None:
        """Answer for the prompts that are kept alone from now on; others raise a `ConfigError` with the reason."""

        def refuse(prompts: Sequence[str | None]) -> Condition:
            raise ConfigError(f"the prompt {prompts[0]!r} cannot be encoded: {reason}")

        self._encode = refuse

    # ---- Encodings ----------------------------------------------------------------------------------------------

    def __call__(self, prompts: Sequence[str | None]) -> Condition:
        """Return the condition of the prompts, `[N, ...]`, in their order; each goes to the device once."""
        unique = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        if list(unique) == [None] and self._nothing:
            condition = self._nothing
        else:
            self._fetch(unique)
            condition = padded([self._rows[prompt] for prompt in unique], self._lengths, self._device)
            if list(unique) == [None]:
                self._nothing = condition
        self._forget(prompts)
        if len(unique) == len(prompts):
            return dict(condition)
        return select(condition, sent(torch.tensor([unique[prompt] for prompt in prompts]), self._device))

    @property
    def kept(self) -> int:
        """How many prompts are kept."""
        return len(self._rows)

    def _fetch(self, prompts: Iterable[str | None]) -> None:
        """Have these prompts among the rows."""
        for prompt in prompts:
            if prompt not in self._rows:  # nor just now, with another of its batch
                self._fetch_one(prompt)
            if prompt not in self._usable:
                self._check_rows([prompt], [self._rows[prompt]])
                self._usable.add(prompt)

    def _fetch_one(self, prompt: str | None) -> None:
        """Read a prompt from the store, or encode its batch; a prompt that is not known is a batch of its own."""
        batch, place = self._batches.get(prompt, ([], 0)) if prompt is not None else ([], 0)
        if not batch:
            self._keep([prompt], self._encoded_rows([prompt]))
        elif self.store is not None and self.store.holds(batch):
            row, self._lengths = self.store.row(batch, place)
            self._keep([prompt], [row])
        else:
            rows = self._encoded_rows(batch)
            self._keep(batch, rows)
            if self.store is not None:
                self._check_rows(batch, rows)
                self.store.write(batch, rows, self._lengths)

    def _check_rows(self, prompts: Sequence[str | None], rows: Sequence[Condition]) -> None:
        for prompt, row in zip(prompts, rows, strict=True):
            self._check({name: tensor[None] for name, tensor in row.items()}, [prompt])

    def _keep(self, prompts: Sequence[str | None], rows: Sequence[Condition]) -> None:
        for prompt, row in zip(prompts, rows, strict=True):
            self._drop(prompt)
            self._rows[prompt] = row
            self.bytes_kept += _bytes(row)

    def _drop(self, prompt: str | None) -> None:
        row = self._rows.pop(prompt, None)
        self._usable.discard(prompt)
        self.bytes_kept -= 0 if row is None else _bytes(row)

    def _encoded_rows(self, prompts: Sequence[str | None]) -> list[Condition]:
        condition = self._encode(prompts)
        self._lengths = full_lengths(condition, self._masks)
        self._encoded()
        return rows_without_padding(condition, self._masks)

    def _forget(self, used: Iterable[str | None]) -> None:
        """Let go of what was not used for longest, beyond the capacity."""
        for prompt in used:
            if prompt in self._rows:
                self._rows.move_to_end(prompt)
        while self.capacity is not None and len(self._rows) > self.capacity:
            self._drop(next(iter(self._rows)))


def _bytes(row: Condition) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in row.values())
