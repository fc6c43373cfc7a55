"""Two processes that hold the base together: the run that two whole ones make, with half of its bytes each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

RUN = """
import json, sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from rdm_sdk import RDMConfig, RDMTrainer, digits

folder = Path(sys.argv[1])


class Stop(TrainerCallback):
    def __init__(self, until):
        self.until = until

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= self.until


def base_of(trainer):
    return [p for name, p in trainer.family.backbone.named_parameters() if "lora_" not in name]


def held(parameters):
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    parts = [p.to_local() for p in parameters if isinstance(p, DTensor)]
    return [sum(p.untyped_storage().nbytes() for p in each) for each in (parts, whole)]


def run(name, until=3, **settings):
    trainer = RDMTrainer(
        digits.teacher_path(),
        "dm + flow + 0.3*legibility",
        RDMConfig(output_dir=str(folder / name), max_steps=3, per_device_train_batch_size=4, num_generations=2,
                  guidance_scale=2.0, max_sequence_length=4, critic_steps=1,
                  reward_route="gradient[legibility=tilt]", ema_decay=0.9,
                  activation_checkpointing=True, log_images=2, eval_strategy="steps", eval_steps=2,
                  save_steps=2, logging_steps=1, disable_tqdm=True, use_cpu=True, report_to="none", ddp_timeout=120,
                  **settings),
        digits.prompts()[:8],
        digits.prompts()[:2],
        callbacks=[Stop(until)],
    )
    most = []
    if trainer.args.fsdp:
        for block in trainer.family.backbone.transformer_blocks:
            block.register_forward_hook(lambda *_: most.append(held(base_of(trainer))[1]))
    before = held(base_of(trainer))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / name / "student"))
    blocks = [held([p for n, p in b.named_parameters() if "lora_" not in n]) for b in
              trainer.family.backbone.transformer_blocks]
    facts = {"total": sum(p.numel() * p.element_size() for p in base_of(trainer)), "held": sum(before),
             "after": sum(held(base_of(trainer))), "most": max(most, default=0), "block": max(map(sum, blocks))}
    (folder / f"{name}_{trainer.args.process_index}.json").write_text(json.dumps(facts))


run("whole")
run("shared", fsdp=True)
run("resumed", until=2, fsdp=True)
run("resumed", fsdp=True)
"""


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of all roles and the moving average of a run's last checkpoint."""
    return load_file(folder / "checkpoint-3" / "rdm_state.safetensors")


@pytest.mark.slow
def test_a_base_in_two_halves(tmp_path: Path) -> None:
    """Weights to 1e-4, half of the bytes, one block at a time beside them; and a resumed run is the same, bit for bit.

    With checkpointing, a tilt through the teacher, a moving average, pictures and evaluations, in which all take part.
    """
    (tmp_path / "run.py").write_text(RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    whole, shared, resumed = (weights(tmp_path / name) for name in ("whole", "shared", "resumed"))
    assert whole.keys() == shared.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert_close(shared[name], tensor, rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        assert shared[name].equal(resumed[name]), name
    exported = [load_file(tmp_path / run / "student/peft/adapter_model.safetensors") for run in ("whole", "shared")]
    assert_close(*exported, rtol=0, atol=1e-4)
    described = [json.loads((tmp_path / run / "student" / "base.json").read_text()) for run in ("whole", "shared")]
    assert described[0] == described[1]
    assert [path.name for path in (tmp_path / "shared" / "images").iterdir()] == ["step_000002.png"]
    for index in range(2):
        facts = json.loads((tmp_path / f"shared_{index}.json").read_text())
        assert json.loads((tmp_path / f"whole_{index}.json").read_text())["held"] == facts["total"]
        assert facts["held"] == facts["after"] <= 0.51 * facts["total"]
        assert 0 < facts["most"] < 0.1 * facts["total"]  # what is in no block, whenever one has run
        assert 0 < facts["block"] < 0.2 * facts["total"]
