"""Files that HPS is loaded from: the wrong ones, damaged ones, those of the hub; and how prompts are read."""

import json
import pickle

import pytest
import torch
from hps_files import save
from huggingface_hub.errors import LocalEntryNotFoundError
from rdm_reward_hps.reward import FILES, HUB, HumanPreferenceScore, cleaned
from transformers import CLIPTokenizer

from rdm_sdk import RewardError, score_images
from rdm_sdk.testing import save_tiny_clip, tiny_tokenizer

CODE_RAN = []


@pytest.mark.parametrize(
    ("name", "asked", "named"),
    [
        ("HPS_v2_compressed.pt", "v2.1", "v2"),
        ("HPS_v2.1_compressed.pt", "v2", "v2.1"),
        ("HPS_v2.pt", "v2.1", "v2"),
        ("hpsv2_1.pt", "v2", "v2.1"),
        ("HPS-v2.0.pt", "v2.1", "v2"),
    ],
)
def test_the_other_variants_file_is_refused(tmp_path, tensors, name, asked, named):
    """A file that says it is the other variant's is refused, and taken as what it is."""
    file = save(tmp_path, tensors, name)
    with pytest.raises(RewardError, match=rf"is HPS {named} by its name, but hps:{asked} was .*{FILES[asked]}"):
        HumanPreferenceScore(path=str(file), variant=asked)
    HumanPreferenceScore(path=str(file), variant=named)


def test_the_other_variants_folder_is_refused(tmp_path, tensors):
    """So is a folder that holds only the other's file, or names the other; "HPSv2" alone names neither."""
    save(tmp_path / "files", tensors, FILES["v2"])
    with pytest.raises(RewardError, match="is HPS v2 by its name"):
        HumanPreferenceScore(path=str(tmp_path / "files"))
    with pytest.raises(RewardError, match=r"is HPS v2\.1 by its name"):
        HumanPreferenceScore(path=str(save_tiny_clip(tmp_path / "HPSv2.1-hf")), variant="v2")
    for variant in FILES:
        HumanPreferenceScore(path=str(save_tiny_clip(tmp_path / "HPSv2-hf")), variant=variant)


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "visual.proj"), r"missing: visual_projection\.weight"),
        (lambda t: without(t, "visual.transformer.resblocks.1.attn.in_proj_bias"), "missing: .*q_proj.bias"),
        (lambda t: t | {"visual.head.weight": torch.zeros(3)}, r"holds 'visual\.head\.weight'"),
        (lambda t: t | {"visual.proj": torch.zeros(32, 15)}, r"visual_projection.*\[15, 32\], expected \[16, 32\]"),
        (lambda t: t | {"visual.proj": torch.zeros(32)}, r"'visual\.proj' has shape \[32\], expected two dim"),
        (lambda t: t | {"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(95)}, "three equal parts"),
        (lambda t: t | {"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(())}, "three equal parts"),
        (lambda t: {"state_dict": {"weights": [1, 2]}}, "mapping of names to tensors"),
        (lambda t: {}, "mapping of names to tensors"),
    ],
)
def test_wrong_tensors(tmp_path, tensors, change, message):
    """Another model's tensors are refused, and the message says which."""
    with pytest.raises(RewardError, match=message):
        HumanPreferenceScore(path=str(save(tmp_path, change(tensors))))


class Bomb:
    """Pickled, it appends to a list when it is read by an unpickler that runs code."""

    def __reduce__(self):
        return CODE_RAN.append, (1,)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1972298538\n",
        b"<!DOCTYPE html>\n<html><body>Not found</body></html>",
        b"a",
        b"",
        b"(l.",
        b"PK\x03\x04 cut off",
        pickle.dumps({"state_dict": {"weights": Bomb()}}),
        pickle.dumps(Bomb(), protocol=2),
    ],
    ids=["git-lfs pointer", "html", "letter", "empty", "list", "cut zip", "code", "code alone"],
)
@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "HPS_v2.1_compressed.safetensors"])
def test_not_a_checkpoint(tmp_path, content, name):
    """What is no checkpoint is a clear error, and code in it is not run."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RewardError, match=r"cannot read the weights .*complete download"):
        HumanPreferenceScore(path=str(tmp_path / name))
    assert not CODE_RAN


def test_code_in_a_torch_file_is_not_run(tmp_path):
    """A file that torch.save wrote is not trusted more."""
    torch.save({"state_dict": {"weight": torch.zeros(1), "more": Bomb()}}, tmp_path / "hps.pt")
    with pytest.raises(RewardError, match="objects other than tensors, which could run code"):
        HumanPreferenceScore(path=str(tmp_path / "hps.pt"))
    assert not CODE_RAN


def test_nothing_there(tmp_path):
    """A missing file, and a folder without a checkpoint, are clear errors."""
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(RewardError, match=r"no weights at .*HPS_v2\.1_compressed\.pt"):
            HumanPreferenceScore(path=str(path))


def test_config_beside_the_file(tmp_path, tensors):
    """Another model's config is passed over, a damaged or an impossible one is an error."""
    file = save(tmp_path, tensors)
    architecture = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RewardError, match=r"v2\.1 .*does not fit: missing: .*layers\.10"):
        HumanPreferenceScore(path=str(file))
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(RewardError, match=r"cannot read .*config\.json.*move it away"):
        HumanPreferenceScore(path=str(file))
    architecture["vision_config"]["num_attention_heads"] = 5
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    with pytest.raises(RewardError, match=r"architecture of HPS v2\.1 .* cannot be built"):
        HumanPreferenceScore(path=str(file))


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("the cat\u2019s \u201chat\u201d", 'the cat\'s "hat"'),
        ("\u201eso\u201f \u2018so\u201b \u02bc \u201a", "\"so\" 'so' ' '"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs &lt;3", "cats & dogs <3"),
        ("it&rsquo;s", "it's"),
        ("plain caf\u00e9", "plain caf\u00e9"),
    ],
)
def test_prompts_are_read_as_the_original_reads_them(tmp_path, tensors, prompt, read):
    """Worked out by hand from ftfy's tables and html.unescape, which open_clip calls before its tokenizer."""
    assert cleaned(prompt) == read
    hps = HumanPreferenceScore(path=str(save(tmp_path, tensors)))
    ours, theirs = (
        score_images(hps, torch.rand(1, 3, 40, 32, generator=torch.Generator().manual_seed(0)), [text])
        .outputs["hps"]
        .scores
        for text in (prompt, read)
    )
    assert torch.equal(ours, theirs)


def test_tokenizer(tmp_path, tensors):
    """A tokenizer can be named, and one of another model is refused."""
    file = save(tmp_path / "checkpoint", tensors)
    vocabulary = tiny_tokenizer().get_vocab()
    end = vocabulary.pop("<|endoftext|>")
    more = CLIPTokenizer(vocab=vocabulary | {"ab</w>": end, "<|endoftext|>": end + 1}, merges=[])
    more.save_pretrained(tmp_path / "more")
    tiny_tokenizer().save_pretrained(tmp_path / "same")
    HumanPreferenceScore(path=str(file), tokenizer=str(tmp_path / "same"))
    for path in (file, save_tiny_clip(tmp_path / "model")):
        with pytest.raises(RewardError, match=r"the tokenizer .*more' does not fit its CLIP: it has 191 tokens"):
            HumanPreferenceScore(path=str(path), tokenizer=str(tmp_path / "more"))
    with pytest.raises(RewardError, match=r"the tokenizer .*none' cannot be loaded"):
        HumanPreferenceScore(path=str(file), tokenizer=str(tmp_path / "none"))


def test_from_the_hub(monkeypatch, tmp_path, tensors):
    """Each variant asks for its own file of the authors' repository; other repositories may hold a `CLIPModel`."""
    asked = []

    def download(repository, filename, revision=None):
        asked.append((repository, filename, revision))
        if repository != HUB:
            raise LocalEntryNotFoundError("not here")
        return str(save(tmp_path, tensors, filename))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    HumanPreferenceScore()
    HumanPreferenceScore(variant="v2", revision="abc")
    assert asked == [(HUB, FILES["v2.1"], None), (HUB, FILES["v2"], "abc")]

    tiny = HumanPreferenceScore(path=str(save_tiny_clip(tmp_path / "tiny"))).encoder
    monkeypatch.setattr("rdm_reward_hps.reward.load_clip", lambda source, *_: asked.append(source) or tiny)
    assert HumanPreferenceScore(path="someone/hps").encoder is tiny
    assert asked[-1] == "someone/hps"
    with pytest.raises(RewardError, match=r"'someone/HPSv2\.1-hf' is HPS v2\.1 by its name"):
        HumanPreferenceScore(path="someone/HPSv2.1-hf", variant="v2")


def test_hub_out_of_reach(monkeypatch):
    """Without the file, the error says which repository and what to do."""

    def download(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(RewardError, match=r"'xswu/HPSv2' cannot be loaded: .*no network.* Pass path="):
        HumanPreferenceScore()


def test_unknown_variant():
    """There is no v3 here."""
    with pytest.raises(RewardError, match=r"reward 'hps', option variant: .*'v2' or 'v2\.1'"):
        score_images("hps:v3", torch.rand(1, 3, 32, 32), ["a"])
