"""The plugin system: faults stay with the plugin that has them, and everything says who is to blame.

The plugins here are written as pip leaves them: a module and a `.dist-info` folder on the path. Most are looked for
in this process (`run`), as a new interpreter costs seconds of imports; what is about a start itself gets one (`start`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Install = Callable[..., None]
Run = Callable[..., str]

GOOD = 'register("good/ink", "good_one_rewards:Ink"); register("good/darkness", "good_one_rewards:darkness")'


def install_one_good_and_five_bad(install: Install) -> None:
    """One sound plugin, and five with one fault each."""
    install("good-one", body=GOOD)
    install("bad-import", code="import no_such_module\n")
    install("bad-hook", hook="rdm_register_reward")
    install("bad-future", arguments="register, quantum_flux", body='register("future/x", "bad_future_rewards:Ink")')
    install("bad-exit", body="raise SystemExit(3)")
    install("bad-twin", body='register("legibility", "a:B"); register("twin/ink", "bad_twin_rewards:Ink")')


def test_five_bad_plugins_do_not_hurt_a_good_one(install: Install, run: Run, start: Run) -> None:
    """The good plugin's rewards work, and `rdm-sdk plugins` names the five faults with their distributions."""
    install_one_good_and_five_bad(install)
    said = start("plugins")
    faults = {line.split()[2].split(":")[0]: line for line in said.splitlines() if line.startswith("FAULT")}
    assert faults.keys() == {"bad-import", "bad-hook", "bad-future", "bad-exit", "bad-twin"}
    assert "its hook rdm_register_rewards raised SystemExit: 3" in faults["bad-exit"]
    assert "No module named 'no_such_module'" in faults["bad-import"]
    assert "'rdm_register_reward'" in faults["bad-hook"]
    assert "Did you mean 'rdm_register_rewards'?" in faults["bad-hook"]
    assert "{'quantum_flux'}" in faults["bad-future"]
    assert "needs a newer rdm-sdk" in faults["bad-future"]
    assert "the bare name 'legibility', which is kept for the SDK's own rewards" in faults["bad-twin"]
    assert "Traceback" not in said
    code = (
        "import torch, warnings\nfrom rdm_sdk import score_images\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    scores = score_images('good/ink[scale=2] + good/darkness + twin/ink + legibility', torch.zeros(2, 3, 8, "
        "8),  ['one', 'two']).outputs\n"
        "print([round(o.scores[0].item(), 3) for o in list(scores.values())[:3]])\n"
        "print(sorted(str(w.message).split()[2] for w in caught if w.category.__name__ == 'PluginWarning'))"
    )
    lines = run(code=code).splitlines()
    assert lines[0] == "[2.0, 1.0, 1.0]"
    assert lines[1] == str([f"bad-{name}:main" for name in ("exit", "future", "hook", "import", "twin")])


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("import/x", "bad-import:main (1.2) is broken: it cannot be imported: ModuleNotFoundError"),
        ("future/x", "bad-future:main (1.2) is broken: its hook 'rdm_register_rewards' asks for {'quantum_flux'}"),
        ("other/x", "Broken plugins, which may hold it: bad-exit:main, bad-future:main, bad-hook:main, bad-imp"),
    ],
)
def test_asking_for_a_broken_plugins_reward_raises_its_cause(
    install: Install, run: Run, reward: str, words: str
) -> None:
    """The error names the plugin, the fault and what to do."""
    install_one_good_and_five_bad(install)
    assert words in run("rewards", "info", reward)


def test_the_cause_is_chained(install: Install, run: Run) -> None:
    """The plugin's own exception is the error's cause."""
    install("bad-import", code="raise OSError('disk on fire')\n")
    code = (
        "import warnings; warnings.simplefilter('ignore')\nfrom rdm_sdk.plugins.registry import registry\n"
        "try:\n    registry().load('bad-import/x')\nexcept Exception as error:\n    print(repr(error.__cause__))"
    )
    assert run(code=code).strip() == "OSError('disk on fire')"


def test_a_name_with_two_owners_belongs_to_neither(install: Install, run: Run) -> None:
    """Both distributions are named; disabling one settles it; their other rewards work meanwhile."""
    install("acme-one", body='register("acme/ink", "acme_one_rewards:Ink"); register("acme/a", "acme_one_rewards:Ink")')
    install("acme-two", body='register("acme/ink", "acme_two_rewards:Ink")')
    said = run("rewards", "info", "acme/ink")
    assert "registered by acme-one and by acme-two" in said
    assert "RDM_SDK_DISABLE_PLUGINS=acme-two" in said
    assert run("plugins").count("the reward 'acme/ink' is registered by acme-one and by acme-two") == 2
    assert "acme_one_rewards:Ink" in run("rewards", "info", "acme/a")
    assert "acme_one_rewards:Ink" in run("rewards", "info", "acme/ink", RDM_SDK_DISABLE_PLUGINS="acme-two")


def test_two_entry_points_of_one_name_are_two_plugins(install: Install, run: Run) -> None:
    """pluggy would skip the second one without a word."""
    install("acme-one", entry="acme", body='register("acme/a", "acme_one_rewards:Ink")')
    install("acme-two", entry="acme", body='register("acme/b", "acme_two_rewards:Ink")')
    said = run("rewards", "list")
    assert "acme/a" in said
    assert "acme/b" in said


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('register("ink", "a:B")', "the bare name 'ink'"),
        ('register("acme/i nk", "a:B")', "names are written 'owner/name'"),
        ('register("acme/x-2", "a:B")', "or '-' before a letter"),
        ('register("acme/ink", "no target")', "write 'package.module:attribute'"),
        ('register("acme/ink", "a:B", contract=2)', "for version 2 of the contract"),
        ('register("acme/ink", "a:B", flavor="new")', "unexpected keyword argument 'flavor'"),
        ("1 / 0", "its hook rdm_register_rewards raised ZeroDivisionError"),
    ],
)
def test_unacceptable_registrations_are_faults(install: Install, run: Run, body: str, words: str) -> None:
    """What a plugin registers is checked, and what cannot be used is said with its distribution."""
    install("acme-one", body=body)
    (fault,) = [line for line in run("plugins").splitlines() if line.startswith("FAULT")]
    assert words in fault
    assert "acme-one" in fault


def test_a_plugin_without_hooks_is_a_fault(install: Install, run: Run) -> None:
    """The decorator was forgotten."""
    install("acme-one", code="def rdm_register_rewards(register):\n    pass\n")
    said = run("plugins")
    assert (
        "no hook; decorate a function named rdm_register_rewards or rdm_register_models with @rdm_sdk.hookimpl" in said
    )


def test_an_entry_point_of_the_hook_itself_is_a_fault(install: Install, run: Run, tmp_path: Path) -> None:
    """It is there, and decorated; what has to be named is the module around it."""
    install("acme-one", body=GOOD)
    points = tmp_path / "acme_one-1.2.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("acme_one", "acme_one:rdm_register_rewards"))
    assert "'acme_one:rdm_register_rewards' is the hook itself; name the module that holds it" in run("plugins")


def test_a_typo_is_not_blamed_on_a_fault_elsewhere(install: Install, run: Run) -> None:
    """A plugin that could say what it holds is not suspected of holding what it did not name."""
    install("acme-one", body='register("acme/sharpness", "acme_one_rewards:Ink"); register("ink", "a:B")')
    assert "Did you mean 'acme/sharpness'?" in run("rewards", "info", "acme/sharpnes")


def test_damage_and_exits_stay_with_their_plugin(install: Install, start: Run, tmp_path: Path) -> None:
    """A plugin that ends the process at import, and an installation without a name, do not end the program."""
    install("good-one", body=GOOD)
    install("bad-exit", code="import sys; sys.exit('bye')\n")
    install("bad-damage", body="pass")
    (tmp_path / "bad_damage-1.2.dist-info" / "METADATA").unlink()
    said = start("plugins")
    assert "FAULT in bad-exit:main (1.2): it cannot be imported: SystemExit: bye" in said
    assert "good/ink" in said
    assert "Traceback" not in said


def test_a_target_that_exits_is_an_error(install: Install, run: Run, tmp_path: Path) -> None:
    """A script that reads the command line when it is imported does not end the program in silence."""
    install("acme-exit", body='register("acme/exit", "acme_exit_script:score")')
    (tmp_path / "acme_exit_script.py").write_text("import sys; sys.exit(0)")
    assert "'acme/exit' of acme-exit cannot be imported from 'acme_exit_script:score': SystemExit: 0" in run(
        "rewards", "check", "acme/exit"
    )


def test_targets_that_cannot_be_used(install: Install, run: Run) -> None:
    """A target that is missing, or is neither a Reward nor a function, names the distribution."""
    install(
        "acme-one",
        body='register("acme/gone", "acme_one_rewards:Gone"); register("acme/odd", "acme_one_rewards:RewardConfig"); '
        'register("acme/f", "acme_one_rewards:darkness")',
    )
    assert "of acme-one cannot be imported from 'acme_one_rewards:Gone': AttributeError" in run(
        "rewards", "info", "acme/gone"
    )
    assert "neither a Reward class nor a function" in run("rewards", "check", "acme/odd")
    assert "takes no options; got x" in run("rewards", "check", "acme/f[x=1]")


def test_environment_variables(install: Install, run: Run) -> None:
    """Allow, deny and strict."""
    install("good-one", body=GOOD)
    install("bad-import", code="import no_such_module\n")

    def listed(**environment: str) -> str:
        return run("rewards", "list", **environment)

    assert "good/ink" in listed()
    assert "good/ink" not in listed(RDM_SDK_PLUGINS="none")
    assert "legibility" in listed(RDM_SDK_PLUGINS="none")
    assert "good/ink" in listed(RDM_SDK_PLUGINS="Good_One")
    assert "good/ink" not in listed(RDM_SDK_DISABLE_PLUGINS="good-one, bad-import")
    assert "bad-import" not in listed(RDM_SDK_DISABLE_PLUGINS="bad-import")
    assert "RDM_SDK_PLUGINS names 'god-one'" in listed(RDM_SDK_PLUGINS="god-one")
    assert "Did you mean 'good-one'?" in listed(RDM_SDK_PLUGINS="god-one")
    misspelt = listed(RDM_SDK_DISABLE_PLUGINS="god-one")
    assert "RDM_SDK_DISABLE_PLUGINS names 'god-one'" in misspelt
    assert "legibility" not in misspelt  # an error: it must not load what it was to forbid
    assert "Did you mean RDM_SDK_DISABLE_PLUGINS" in listed(RDM_SDK_DISABLED_PLUGINS="good-one").replace("'", "")
    assert "RDM_SDK_STRICT_PLUGINS is set" in listed(RDM_SDK_STRICT_PLUGINS="1")
    assert "good/ink" in listed(RDM_SDK_STRICT_PLUGINS="0")
    assert "FAULT in bad-import" in run("plugins", RDM_SDK_STRICT_PLUGINS="1")


def test_faults_fail_a_strict_listing(install: Install, run: Run) -> None:
    """`rdm-sdk plugins` exits with 1 on a fault where faults are errors, so that a build can stop."""
    install("bad-import", code="import no_such_module\n")
    code = "from rdm_sdk.cli.main import main; print('status', main(['plugins']))"
    assert "status 1" in run(code=code, RDM_SDK_STRICT_PLUGINS="1")
    assert "status 0" in run(code=code)


def test_a_known_plugin_that_is_missing_names_its_pip_command(run: Run) -> None:
    """The project's own plugins are told apart from unknown names."""
    assert "pip install rdm-reward-hps" in run("rewards", "info", "hps", RDM_SDK_PLUGINS="none")
    assert "pip install rdm-reward-hps" in run("rewards", "list", RDM_SDK_PLUGINS="none")
    assert "Did you mean 'hps'?" in run("rewards", "info", "hsp", RDM_SDK_PLUGINS="none")


def test_listing_rewards_imports_nothing_heavy(install: Install, start: Run) -> None:
    """All rewards, installed plugins included, are listed without torch or transformers."""
    install("good-one", body=GOOD)
    code = (
        "import sys, rdm_sdk\nfrom rdm_sdk.plugins.registry import registry\nnames = sorted(registry().rewards)\n"
        "assert {'dm', 'legibility', 'good/ink'} <= set(names), names\n"
        "print(len(names), sorted({'torch', 'transformers', 'diffusers', 'pydantic', 'numpy'} & sys.modules.keys()))"
    )
    count, heavy = start(code=code).strip().split(maxsplit=1)
    assert int(count) >= 4
    assert heavy == "[]"


def test_plugins_as_json(install: Install, run: Run) -> None:
    """The same for machines."""
    install("good-one", body=GOOD)
    install("bad-import", code="import no_such_module\n")
    by_name = {plugin["distribution"]: plugin for plugin in json.loads(run("plugins", "--json"))}
    assert by_name["good-one"]["rewards"] == ["good/ink", "good/darkness"]
    assert by_name["good-one"]["version"] == "1.2"
    assert by_name["good-one"]["hooks"] == ["rdm_register_rewards"]
    assert by_name["good-one"]["failures"] == []
    assert len(by_name["bad-import"]["failures"]) == 1
    entries = json.loads(run("rewards", "list", "--json", RDM_SDK_DISABLE_PLUGINS="bad-import"))
    assert {
        "name": "good/ink",
        "target": "good_one_rewards:Ink",
        "distribution": "good-one",
        "version": "1.2",
        "description": "",
    } in entries


def test_other_plugins_on_another_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of a run must see the same plugins."""
    from rdm_sdk import ConfigError
    from rdm_sdk.training import validation

    own = validation.registry().fingerprint()
    monkeypatch.setattr(validation, "gather_object", lambda mine: [own, [*own, "acme:acme==2.0"]])
    validation.check_same_plugins(1)
    with pytest.raises(ConfigError, match=r"process 1 does not have the same .*: acme:acme==2\.0"):
        validation.check_same_plugins(2)
    monkeypatch.setattr(validation, "gather_object", lambda mine: mine * 2)
    validation.check_same_plugins(2)


# ---- Model families -----------------------------------------------------------------------------------------------

ADAPTER = 'register("AuraFlowPipeline", "{module}_rewards:Ink")'


def asks_for(*pipelines: str, ask: str = "registry().load_model") -> str:
    """Return code that prints what asking for each family raises, or its class."""
    door = "families.load import family_class" if ask == "family_class" else "plugins.registry import registry"
    return (
        f"import warnings; warnings.simplefilter('ignore')\nfrom rdm_sdk.{door}\n"
        f"for pipeline in {pipelines!r}:\n    try:\n        print({ask}(pipeline))\n"
        "    except Exception as error:\n        print(type(error).__name__, error)"
    )


def test_a_plugins_adapter_is_found(install: Install, run: Run) -> None:
    """By the pipeline's class; what is no family is refused, and the SDK's own families are listed for the rest."""
    install("good-aura", hook="rdm_register_models", body=ADAPTER.format(module="good_aura"))
    asked = "AuraFlowPipeline", "StableDiffusion3Pipeline", "StableDiffusion3Pipelin"
    no_family, found, said = run(code=asks_for(*asked, ask="family_class")).splitlines()
    assert "must subclass rdm_sdk.ModelFamily" in no_family
    assert "rdm_sdk.families.sd3.SD3Family" in found
    assert "ModelError StableDiffusion3Pipelin is not supported. Did you mean 'StableDiffusion3Pipeline'?" in said
    assert "AuraFlowPipeline" in said
    assert "docs/write-a-model.md" in said
    listed = run("models", "list")
    assert "AuraFlowPipeline" in listed
    assert "StableDiffusion3Pipeline" in listed


def test_a_family_with_two_owners_belongs_to_neither(install: Install, run: Run) -> None:
    """Both are named, with what settles it; the SDK's own families stay its own."""
    for name in ("aura-one", "aura-two"):
        install(name, hook="rdm_register_models", body=ADAPTER.format(module=name.replace("-", "_")))
    install("greedy", hook="rdm_register_models", body='register("FluxPipeline", "greedy_rewards:Ink")')
    said = run(code=asks_for("AuraFlowPipeline"))
    assert "registered by aura-one and by aura-two" in said
    assert "RDM_SDK_DISABLE_PLUGINS=aura-two" in said
    faults = run("plugins")
    assert "FAULT in greedy:main (1.2): it registers FluxPipeline, which is the SDK's own" in faults
    assert "rdm_sdk.families.flux:FluxFamily" in run(
        code="import warnings; warnings.simplefilter('ignore')\nfrom rdm_sdk.plugins.registry import registry\n"
        "print(registry().models['FluxPipeline'].target)"
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('register("not a class", "a:B")', "give the name of a pipeline class"),
        ('register("AuraFlowPipeline", "a.B")', "write 'package.module:attribute'"),
        ('register("AuraFlowPipeline", "a:B", contract=2)', "for version 2 of the contract"),
        ('register("AuraFlowPipeline", "a:B"); register("AuraFlowPipeline", "a:C")', "twice"),
    ],
)
def test_unacceptable_families_are_faults(install: Install, run: Run, body: str, words: str) -> None:
    """What cannot be registered is said under the plugin's name, and again to whoever asks for it."""
    install("bad-aura", hook="rdm_register_models", body=body)
    said = run("plugins")
    assert "FAULT in bad-aura:main (1.2)" in said
    assert words in said
    if "not a class" not in body and "twice" not in words:
        assert words in run(code=asks_for("AuraFlowPipeline"))


def test_an_adapter_that_cannot_be_imported(install: Install, run: Run) -> None:
    """The error names the distribution and the cause."""
    install("bad-aura", hook="rdm_register_models", body='register("AuraFlowPipeline", "no_such_module:Adapter")')
    said = run(code=asks_for("AuraFlowPipeline"))
    assert "ModelError the family for AuraFlowPipeline of bad-aura cannot be imported" in said
    assert "No module named 'no_such_module'" in said
