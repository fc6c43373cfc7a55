"""Presets: valid settings, printed as YAML that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rdm_sdk import ConfigError, RDMConfig, RDMTrainer
from rdm_sdk.cli.main import main
from rdm_sdk.training.presets import PRESETS, preset, show_preset

NAMES = ("dmd2", "gndm", "dmdr", "gndmr", "refl", "grpo")


def test_the_named_methods_are_there() -> None:
    """Those that the comparison needs."""
    assert set(NAMES) <= PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_config(name: str, tmp_path: Path) -> None:
    """Its settings are fields of RDMConfig, and what is set beside them wins."""
    settings = preset(name)
    config = RDMConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert {key: getattr(config, key) for key in settings} == settings
    changed = RDMConfig(output_dir=str(tmp_path), use_cpu=True, **(settings | {"critic_steps": 7}))
    assert changed.critic_steps == 7
    settings["num_generations"] = 99
    assert preset(name) != settings  # a copy, so that a user's changes stay the user's


def test_presets_say_what_makes_the_methods_differ() -> None:
    """DMD2 looks at each sample alone, DMDR adds a fixed reward after a cold start, GNDMR an adaptive one."""
    dmd2, gndm, dmdr, gndmr, refl, grpo = (PRESETS[name] for name in NAMES)
    assert dmd2.rewards == gndm.rewards == "dm"
    assert dmd2.settings["num_generations"] == 1
    assert gndm.settings["num_generations"] > 1
    assert dmd2.settings["normalization"] == dmdr.settings["normalization"] == "sample"
    assert dmd2.settings["spread"] == dmdr.settings["spread"] == "free"
    assert dmd2.settings["critic_correction"] == dmdr.settings["critic_correction"] == "none"
    assert gndm.settings["critic_correction"] == "others"
    assert str(dmdr.settings["weighting"]).startswith("fixed[cold_start=")
    assert not str(gndmr.settings["weighting"]).startswith("fixed")
    assert "dm" not in refl.rewards
    assert grpo.settings["reward_route"] == "advantage"
    shared = gndm.settings.keys() & gndmr.settings.keys() - {"weighting"}
    assert {key: gndm.settings[key] for key in shared} == {key: gndmr.settings[key] for key in shared}


def test_an_unknown_preset_names_its_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """In Python and on the command line."""
    with pytest.raises(ConfigError, match=r"no preset 'gdnm'\. Did you mean 'gndm'\? There are: dmd2, gndm"):
        preset("gdnm")
    assert main(["presets", "show", "dmdrr"]) == 2
    assert "there is no preset 'dmdrr'. Did you mean 'dmdr'" in capsys.readouterr().err


def test_list_names_all_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    """One line per preset: its name and what it is."""
    assert main(["presets", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(own.summary in line for own, line in zip(PRESETS.values(), lines, strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_what_show_prints_is_the_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """YAML that reads back as its settings and its rewards."""
    assert main(["presets", "show", name]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == show_preset(name)
    assert yaml.safe_load(printed) == {"rewards": PRESETS[name].rewards} | preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_what_show_prints_trains(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`presets show NAME > run.yaml`, then `train --config run.yaml`, on the embedded digits."""
    assert main(["presets", "show", name]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    trained: list[RDMTrainer] = []
    train: Callable[..., object] = RDMTrainer.train

    def watching(self: RDMTrainer, *args: object, **kwargs: object) -> object:
        trained.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(RDMTrainer, "train", watching)
    flags = {"model": "digits", "output_dir": str(tmp_path / "run"), "max_steps": "2", "critic_steps": "1"}
    flags |= {"per_device_train_batch_size": "8", "max_sequence_length": "4", "guidance_scale": "1"}
    flags |= {"save_strategy": "no", "disable_tqdm": "true", "use_cpu": "true", "report_to": "none"}
    arguments = [part for key, value in flags.items() for part in (f"--{key}", value)]
    assert main(["train", "--config", str(tmp_path / "run.yaml"), *arguments]) == 0
    (trainer,) = trained
    assert {key: getattr(trainer.args, key) for key in preset(name)} == preset(name)
    assert trainer.state.global_step == 2
    assert (tmp_path / "run" / "student" / "pytorch_lora_weights.safetensors").is_file()
