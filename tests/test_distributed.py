"""Two processes on one machine: the same student everywhere, learned from different noise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys, torch
from rdm_sdk import RDMConfig, RDMTrainer, digits
trainer = RDMTrainer(
    digits.teacher_path(),
    args=RDMConfig(output_dir=sys.argv[1], max_steps=2, per_device_train_batch_size=4, num_generations=4,
                   guidance_scale=1.0, max_sequence_length=4, critic_steps=1, save_strategy="no", logging_steps=1,
                   disable_tqdm=True, use_cpu=True, ema_decay=0.9),
    train_dataset=digits.prompts(),
)
noise = torch.randn(1).item()
trainer.train()
sums = [sum(p.double().sum() for p in trainer.parameters_of(role)).item() for role in ("student", "fake")]
print("RANK", trainer.args.process_index, noise, sums, flush=True)
"""


@pytest.mark.slow
def test_two_processes_stay_in_step(tmp_path: Path) -> None:
    """After two steps both processes hold the same student and critic, though their noise differed."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = dict(re.findall(r"RANK (\d) \S+ (\[.*\])", done.stdout))
    noise = set(re.findall(r"RANK \d (\S+) ", done.stdout))
    assert len(noise) == 2
    assert ranks["0"] == ranks["1"]
