"""Prompts in memory and on disk: what is encoded together, and that it is the same bits whoever asks, and when."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import TINY_PIPELINES, tiny_sd, tiny_sd3

from rdm_sdk import ConfigError, DataError, RDMTrainer, digits
from rdm_sdk.families.load import load_family
from rdm_sdk.training import prompt_cache, prompt_encoding
from rdm_sdk.training.processes import Processes
from rdm_sdk.training.prompt_cache import TOGETHER, PromptCache
from rdm_sdk.training.prompt_store import PromptStore, encoder_key
from rdm_sdk.types import Condition

Make = Callable[..., RDMTrainer]
CPU = torch.device("cpu")
PROMPTS = [f"prompt number {i}" for i in range(TOGETHER + 3)]


class Encoder:
    """Encodes a prompt as its length and the size of its batch, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[str | None]] = []

    def __call__(self, prompts: Sequence[str | None]) -> Condition:
        self.batches.append(list(prompts))
        return {"told": torch.tensor([[float(len(prompt or "")), len(prompts)] for prompt in prompts])}


# ---- What is encoded together ---------------------------------------------------------------------------------------


def test_known_prompts_are_encoded_in_batches_that_their_list_decides() -> None:
    """Whichever is asked for first; others, and no prompt, by themselves."""
    encoder = Encoder()
    cache = PromptCache(encoder, CPU)
    cache.know([*PROMPTS, PROMPTS[0]])
    cache.know([*PROMPTS[:2], "for evaluation"])
    assert cache([PROMPTS[-1], "free", None, PROMPTS[-1], PROMPTS[2]])["told"][:, 1].tolist() == [3, 1, 1, 3, TOGETHER]
    assert encoder.batches == [PROMPTS[TOGETHER:], ["free"], [None], PROMPTS[:TOGETHER]]
    cache(PROMPTS)
    assert len(encoder.batches) == 4
    cache(["for evaluation"])
    assert encoder.batches[-1] == ["for evaluation"]


def test_a_prompt_that_was_forgotten_is_encoded_in_the_same_batch_again() -> None:
    """So that its bits do not depend on what was asked for meanwhile."""
    encoder = Encoder()
    cache = PromptCache(encoder, CPU, capacity=2)
    cache.know(PROMPTS)
    cache([PROMPTS[0]])
    cache(["one", "another"])
    cache([PROMPTS[0]])
    assert encoder.batches == [PROMPTS[:TOGETHER], ["one"], ["another"], PROMPTS[:TOGETHER]]
    assert cache.kept == 2


def test_what_was_used_last_is_kept() -> None:
    """Not what was encoded last."""
    encoder = Encoder()
    cache = PromptCache(encoder, CPU, capacity=2)
    for prompt in ("a", "b", "a", "c", "a"):
        cache([prompt])
    assert encoder.batches == [["a"], ["b"], ["c"]]


def test_real_encodings_do_not_depend_on_what_was_asked_for_before() -> None:
    """SD3's pooled encodings do depend on the batch; two caches with other histories agree bit for bit."""
    family = load_family(tiny_sd3(), torch.float32)
    one, other = PromptCache(family.condition, CPU), PromptCache(family.condition, CPU)
    for cache in (one, other):
        cache.know(PROMPTS)
    one([PROMPTS[5], "free", PROMPTS[-1]])
    other([PROMPTS[-1], None])
    first, second = one(PROMPTS), other(PROMPTS)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(one(["free"])[name], other(["free"])[name]) for name in first)
    alone = family.condition([PROMPTS[0]])
    assert any(not torch.equal(alone[name][0], first[name][0]) for name in first)


def test_a_row_goes_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's samples share one; no prompt stays there."""
    sent: list[int] = []
    original = prompt_cache.padded

    def counted(rows: Sequence[Condition], *rest: Any) -> Condition:
        sent.append(len(rows))
        return original(rows, *rest)

    monkeypatch.setattr(prompt_cache, "padded", counted)
    cache = PromptCache(Encoder(), CPU)
    assert cache(["a", "a", "a", "bb", "bb", "bb"])["told"][:, 0].tolist() == [1, 1, 1, 2, 2, 2]
    assert cache([None] * 4)["told"][:, 0].tolist() == [0] * 4
    assert cache([None] * 3)["told"].shape == (3, 2)
    assert sent == [2, 1]


def test_the_bytes_that_are_kept_are_counted() -> None:
    """Two float32 values a prompt; none of those that were forgotten."""
    cache = PromptCache(Encoder(), CPU, capacity=3)
    cache(["a", "b", "c", "d", "e"])
    assert (cache.kept, cache.bytes_kept) == (3, 3 * 2 * 4)


# ---- On disk --------------------------------------------------------------------------------------------------------


def stored(folder: Path, prompts: Sequence[str] = PROMPTS, masks: Any = ()) -> tuple[PromptCache, Encoder]:
    """Return a cache with a store in which some prompts are encoded, and its encoder."""
    encoder = Encoder()
    cache = PromptCache(encoder, CPU, masks=masks)
    cache.know(prompts)
    cache.store = PromptStore(folder, "key")
    for batch in cache.batches:
        cache.prepare(batch)
    return cache, encoder


def test_a_second_start_reads_what_the_first_has_encoded(tmp_path: Path) -> None:
    """Bit for bit, without encoding a known prompt; another list of prompts is encoded anew."""
    first, encoder = stored(tmp_path)
    assert len(encoder.batches) == 2
    again, idle = stored(tmp_path)
    assert torch.equal(again(PROMPTS)["told"], first(PROMPTS)["told"])
    assert idle.batches == []
    assert len(list(tmp_path.rglob("*"))) == 3  # the encoder's folder, and a file a batch
    _, busy = stored(tmp_path, [*PROMPTS, "one more"])
    assert busy.batches == [[*PROMPTS[TOGETHER:], "one more"]]


def test_rows_on_disk_are_without_padding_too(tmp_path: Path) -> None:
    """And come back as they were, by the lengths that the file names."""
    family = load_family(TINY_PIPELINES["PixArtSigmaPipeline"](), torch.float32)
    plain, disk = (PromptCache(family.condition, CPU, masks=family.masks) for _ in range(2))
    for cache in (plain, disk):
        cache.know(PROMPTS)
    disk.store = PromptStore(tmp_path, "key")
    for batch in disk.batches:
        disk.prepare(batch)
    expected, found = plain(PROMPTS), disk(PROMPTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert size < sum(tensor.numel() * tensor.element_size() for tensor in expected.values()) / 5


def test_a_file_that_was_cut_is_encoded_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning that names it."""
    cache, _ = stored(tmp_path)
    assert cache.store is not None
    path = PromptStore(tmp_path, "key").path(cache.batches[0])
    path.write_bytes(path.read_bytes()[:-4])
    with caplog.at_level(logging.WARNING):
        _, encoder = stored(tmp_path)
    assert f"{path} is damaged" in caplog.text
    assert encoder.batches == [PROMPTS[:TOGETHER]]


def test_values_that_were_changed_are_an_error(tmp_path: Path) -> None:
    """Found when they are read; it says which file to delete."""
    cache, _ = stored(tmp_path)
    path = PromptStore(tmp_path, "key").path(cache.batches[0])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again, encoder = stored(tmp_path)
    assert encoder.batches == []
    with pytest.raises(DataError, match=r"safetensors is damaged \(its checksum is another\); delete it and start"):
        again([again.batches[0][-1]])


@pytest.mark.parametrize("changed", ["first", "second"])
def test_every_tensor_is_checked(tmp_path: Path, changed: str) -> None:
    """A prompt may have several."""
    store = PromptStore(tmp_path, "key")
    store.write(["a"], [{"first": torch.zeros(2), "second": torch.zeros(2)}], {})
    path = store.path(["a"])
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    save_file(load_file(path) | {f"0.{changed}": torch.ones(2)}, path, facts)
    with pytest.raises(DataError, match="its checksum is another"):
        store.row(["a"], 0)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the file nor a part of it."""
    monkeypatch.setattr("rdm_sdk.training.prompt_store.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(DataError, match=r"could not be written to .* \(full\)\. Make room there"):
        stored(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_is_an_error_of_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What safetensors raises then is no error of the system, so the command line would print a traceback."""

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("rdm_sdk.training.prompt_store.save_file", full)
    with pytest.raises(DataError, match=r"prompt_cache: the encodings of 8 prompts .*No space left"):
        stored(tmp_path)


def test_the_key_is_of_all_that_encodes() -> None:
    """Another weight, length or dtype is another key; the same pipeline has the same, however often it was called."""
    family = load_family(tiny_sd3(), torch.float32)
    key = encoder_key(family, 1.0)
    family.condition(["a prompt"])
    assert encoder_key(family, 1.0) == key == encoder_key(load_family(tiny_sd3(), torch.float32), 2.0)
    assert encoder_key(load_family(tiny_sd3(), torch.float32, max_sequence_length=7), 1.0) != key
    assert encoder_key(load_family(tiny_sd(), torch.float32), 1.0) != key
    with torch.no_grad():
        family.pipeline.text_encoder_2.text_projection.weight[0, 0] += 1
    changed = encoder_key(family, 1.0)
    assert changed != key
    family.pipeline.tokenizer.padding_side = "left"
    assert encoder_key(family, 1.0) != changed
    family.pipeline.text_encoder.to(torch.bfloat16)
    half = encoder_key(family, 1.0)
    assert len({key, changed, half}) == 3
    family.pipeline.text_encoder.to(torch.float32)
    assert encoder_key(family, 1.0) != half  # of the same values


def test_a_backbone_that_is_told_its_guidance_has_a_key_for_each() -> None:
    """There it is a part of what is kept."""
    family = load_family(TINY_PIPELINES["FluxPipeline"](), torch.float32)
    assert encoder_key(family, 1.0) != encoder_key(family, 2.0)


# ---- Runs -----------------------------------------------------------------------------------------------------------


def test_a_run_with_a_folder_is_the_run_without(make_trainer: Make, tmp_path: Path) -> None:
    """Bit for bit: when it encodes, when it reads, and when it drops the encoders; then it encodes no text at all."""
    settings = {"prompt_cache": str(tmp_path / "cache"), "guidance_scale": 1.5}
    weights = []
    for name, more in (("none", {"prompt_cache": None}), ("writes", {}), ("reads", {"text_encoders": "drop"})):
        trainer = make_trainer(tmp_path / name, **(settings | more))
        trainer.train()
        weights.append([p.detach() for p in trainer.parameters_of("student")])
    assert all(torch.equal(a, b) for other in weights[1:] for a, b in zip(weights[0], other, strict=True))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == -(-len(digits.prompts()) // TOGETHER)


def test_more_prompts_than_are_kept_are_told(
    make_trainer: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Because each use of most of them encodes a batch; a folder keeps them all."""
    trainer = make_trainer(tmp_path / "run")
    few, many = (Dataset.from_dict({"prompt": [f"the number {i}" for i in range(n)]}) for n in (240, 257))
    for prompts, told in ((few, False), (many, True)):
        trainer.models.encode = PromptCache(Encoder(), CPU)
        caplog.clear()
        prompt_encoding.prepare_prompts(trainer.models, trainer.args, Processes(), prompts)
        assert ("a folder as prompt_cache keeps all of them" in caplog.text) is told


def test_prompts_that_just_fit_into_memory_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of them already has been taken from what is free."""
    cache = PromptCache(Encoder(), CPU)
    cache.know(f"prompt {i}" for i in range(4 * TOGETHER))
    total = 4 * TOGETHER * 2 * 4
    monkeypatch.setattr(
        "rdm_sdk.training.prompt_encoding.psutil.virtual_memory",
        lambda: SimpleNamespace(available=total - cache.bytes_kept),
    )
    models: Any = SimpleNamespace(encode=cache)
    prompt_encoding._encode_all(models, quiet=True)
    assert cache.kept == 4 * TOGETHER


def test_processes_share_the_work(make_trainer: Make, tmp_path: Path) -> None:
    """Each encodes every so manieth batch, and waits; one that does not see the others' files says so."""
    prompts = [f"a {i}" for i in range(3 * TOGETHER)]
    trainer = make_trainer(tmp_path / "run", prompts=prompts)
    waits: list[int] = []

    def other(folder: Path, index: int, write: bool) -> Callable[[object], list[Any]]:
        """Return what stands in for a second process, which has written its share at the second meeting."""

        def gather(value: object) -> list[Any]:
            waits.append(index)
            if write and len(waits) % 2 == 0:
                cache, _ = stored(folder / "elsewhere", prompts)
                for batch in cache.batches:
                    source, target = cache.store.path(batch), trainer.models.encode.store.path(batch)  # type: ignore
                    if not target.exists():
                        target.write_bytes(source.read_bytes())
            return [value, value]

        return gather

    for write in (True, False):
        folder = tmp_path / str(write)
        trainer.args.prompt_cache = str(folder)
        counted = Encoder()
        trainer.models.encode._encode = counted
        processes = Processes(2, lambda tensor, how: tensor, other(tmp_path, 1, write), 1)
        if write:
            prompt_encoding.prepare_prompts(trainer.models, trainer.args, processes, trainer.train_dataset)
        else:
            with pytest.raises(ConfigError, match="process 1 does not see what another has encoded, such as 'a 0'"):
                prompt_encoding.prepare_prompts(trainer.models, trainer.args, processes, trainer.train_dataset)
        assert counted.batches == [prompts[TOGETHER : 2 * TOGETHER]]


def test_a_folder_that_cannot_be_written_is_refused(make_trainer: Make, tmp_path: Path) -> None:
    """Before the base is loaded."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"prompt_cache='.*file' cannot be written to"):
        make_trainer(tmp_path, model="no/such/base", prompt_cache=str(tmp_path / "file"))


def test_changed_files_are_read_by_value(tmp_path: Path) -> None:
    """A file with the same prompts and other values is refused, even if it is a whole file."""
    cache, _ = stored(tmp_path)
    path = PromptStore(tmp_path, "key").path(cache.batches[0])
    save_file(load_file(path), path, {"prompts": "null"})
    _, encoder = stored(tmp_path)
    assert encoder.batches == [PROMPTS[:TOGETHER]]
