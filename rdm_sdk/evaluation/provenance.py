"""What figures are kept with: hashes of what was evaluated, and what rewards tell of themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdm_sdk.errors import RewardError
from rdm_sdk.rewards.resolve import WeightedReward


def digest(content: object) -> str:
    """Return a short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def files_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return a short hash of the names and bytes of the files of a folder that match the patterns."""
    hashed = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        hashed.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()[:24]


def rewards_provenance(rewards: Sequence[WeightedReward]) -> dict[str, Any]:
    """Return each reward's provenance by its label, as JSON holds it; values that JSON does not know become texts.

    To be called before anything is scored: what cannot be written would cost all scores at the end.

    Raises:
        RewardError: a provenance is none that JSON can hold.
    """
    return {reward.label: _as_json(reward) for reward in rewards}


def _as_json(reward: WeightedReward) -> Any:
    content = reward.reward.provenance()
    try:
        return json.loads(json.dumps(content, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(
            f"reward {reward.label!r}: provenance() must return what JSON can hold, texts as keys; {error}"
        ) from error
