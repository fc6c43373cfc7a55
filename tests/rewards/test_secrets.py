"""Secrets and places of a machine do not get into what a run writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from rdm_sdk import Capabilities, Reward, RewardBatch, RewardConfig, RewardError, parse_spec
from rdm_sdk.rewards.resolve import plan_rewards
from rdm_sdk.rewards.spec import is_secret, without_places


class Paid(Reward):
    """A judge behind an API."""

    capabilities = Capabilities()

    class Config(RewardConfig):
        api_key: str = ""
        login: SecretStr = SecretStr("")
        level: int = 1

    def score(self, batch: RewardBatch) -> Any:
        return batch.images.mean((1, 2, 3))


def test_an_object_s_secrets_are_in_no_term_and_no_provenance() -> None:
    """Neither those that are secrets by type, nor by name; the rest is kept."""
    reward = Paid(api_key="sk-12345", login="hunter2", level=3)
    (planned,) = plan_rewards(reward)
    assert planned.term.options == {"level": 3}
    written = f"{reward.provenance()} {planned.term!r}"
    assert "sk-12345" not in written
    assert "hunter2" not in written
    assert reward.provenance()["options"] == {"level": 3}
    assert reward.config.api_key == "sk-12345"


@pytest.mark.parametrize("spec", ['acme/judge[api_key="sk-1"]', "acme/judge[hub_token=abc]", "a/b[PASSWORD=x]"])
def test_a_secret_in_a_spec_is_refused(spec: str) -> None:
    """Because the spec itself is written to many places."""
    with pytest.raises(RewardError, match="is a secret, and a spec is copied into model cards"):
        parse_spec(spec)


@pytest.mark.parametrize("secret", ["api_key", "apikey", "hf_token", "token", "client_secret", "DB_PASSWORD"])
@pytest.mark.parametrize("harmless", ["token_env", "max_tokens", "key", "monkey", "secretary"])
def test_which_names_are_secrets(secret: str, harmless: str) -> None:
    """What holds one; not what names where one is."""
    assert is_secret(secret)
    assert not is_secret(harmless)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/ada/models/clip", ".../clip"),
        ("~/clip", ".../clip"),
        ("C:\\models\\clip", ".../clip"),
        ("openai/clip", "openai/clip"),
        ("models/clip", "models/clip"),
        (3, 3),
    ],
)
def test_places_of_a_machine_are_shortened(value: Any, expected: Any) -> None:
    """On a model card, which is for others to read."""
    (term,) = parse_spec("clip")
    assert without_places(term.model_copy(update={"options": {"path": value}})).options == {"path": expected}


def test_the_card_names_no_folder(make_trainer: Any, tmp_path: Path) -> None:
    """In a run's export."""
    trainer = make_trainer(tmp_path, "dm + 0.1*jpeg")
    trainer.rewards[1].term.options["path"] = "/home/ada/tints"
    trainer.save_model(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert "/home/ada" not in card
    assert ".../tints" in card
