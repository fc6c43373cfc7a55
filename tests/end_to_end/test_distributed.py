"""Two processes on one machine: the same student everywhere, learned from the shares of one batch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = """
import sys, torch
from rdm_sdk import RDMConfig, RDMTrainer, digits
trainer = RDMTrainer(
    digits.teacher_path(),
    args=RDMConfig(output_dir=sys.argv[1], max_steps=2, per_device_train_batch_size=4, num_generations=4,
                   guidance_scale=1.0, max_sequence_length=4, critic_steps=1, save_strategy="no", logging_steps=1,
                   disable_tqdm=True, use_cpu=sys.argv[2] == "cpu", ema_decay=0.9),
    train_dataset=digits.prompts(),
)
noise = torch.randn(1).item()
trainer.train()
sums = [sum(p.double().sum() for p in trainer.parameters_of(role)).item() for role in ("student", "fake")]
print("RANK", trainer.args.process_index, noise, sums, flush=True)
"""


def ranks_of(tmp_path: Path, processes: int, device: str) -> tuple[set[str], list[str]]:
    """Run on several processes; return the first noise of each, and each one's sums over student and critic."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, str(script), str(tmp_path / "out"), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"RANK \d (\S+) (\[.*\])", done.stdout)
    return {noise for noise, _ in found}, [sums for _, sums in found]


@pytest.mark.slow
def test_two_processes_stay_in_step(tmp_path: Path) -> None:
    """After two steps both processes hold the same student and critic; their random state was one."""
    noise, sums = ranks_of(tmp_path, 2, "cpu")
    assert len(noise) == 1
    assert len(sums) == 2
    assert sums[0] == sums[1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_process_per_gpu(tmp_path: Path) -> None:
    """As many as there are GPUs, under NCCL: they hold the same student and critic, from one random state."""
    noise, sums = ranks_of(tmp_path, torch.cuda.device_count(), "cuda")
    assert len(noise) == 1
    assert len(sums) == torch.cuda.device_count()
    assert len(set(sums)) == 1
