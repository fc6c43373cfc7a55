"""Two processes on one machine: the same student everywhere, learned from the shares of one batch."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

RUN = """
import sys, torch
from pathlib import Path
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
Path(sys.argv[1], f"rank_{trainer.args.process_index}.txt").write_text(f"{noise} {sums}")  # their lines mix
"""


def ranks_of(tmp_path: Path, processes: int, device: str) -> tuple[set[str], list[str]]:
    """Run on several processes; return the first noise of each, and each one's sums over student and critic."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, str(script), str(tmp_path / "out"), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [path.read_text().split(" ", 1) for path in sorted((tmp_path / "out").glob("rank_*.txt"))]
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


GO_ON = """
import sys, torch
from pathlib import Path
from transformers import TrainerCallback
from rdm_sdk import RDMConfig, RDMTrainer, digits

folder, until = sys.argv[1], int(sys.argv[2])
processes = int(__import__("os").environ.get("WORLD_SIZE", "1"))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step >= until


def bright(images, prompts):
    return images.mean(dim=(1, 2, 3)).tolist()


trainer = RDMTrainer(
    digits.teacher_path(),
    ["dm", "flow", (bright, 0.2)],
    RDMConfig(output_dir=folder, max_steps=4, per_device_train_batch_size=8 // processes, num_generations=2,
              guidance_scale=1.0, max_sequence_length=4, critic_steps=1, num_iterations=2, weighting="balance",
              min_effective_sample_size=0.0, save_steps=1, logging_steps=1, disable_tqdm=True, use_cpu=True,
              report_to="none"),
    digits.prompts(),
    callbacks=[Stop()],
)
trainer.train(resume_from_checkpoint=True)
if trainer.args.process_index == 0:
    of = trainer.roles.parameters_of
    weights = {f"{role}.{name}": p for role in ("student", "fake") for name, p in of(role).items()}
    torch.save(weights, Path(folder) / "weights.pt")
"""


def go_on(folder: Path, processes: int, until: int) -> dict[str, torch.Tensor]:
    """Run up to a step from wherever the folder's run is; return the weights."""
    folder.mkdir(exist_ok=True)
    script = folder.parent / "go_on.py"
    script.write_text(GO_ON)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(script), str(folder), str(until)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt")
    return weights


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Two processes, then one, then two again: the run that two processes make; stored rollouts are shared out anew."""
    whole = go_on(tmp_path / "whole", 2, until=4)
    for processes, until in ((2, 1), (1, 3), (2, 4)):  # it changes in the middle of a rollout's two uses, both ways
        weights = go_on(tmp_path / "changed", processes, until)
    assert weights.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


TROUBLE = """
import os, signal, sys, time
from rdm_sdk import RDMConfig, RDMTrainer, digits

trouble, rank = sys.argv[2], int(os.environ["RANK"])
calls = []


def troubled(images, prompts):
    calls.append(1)
    if rank == 1 and len(calls) == 2:
        sys.stdout.write(f"TROUBLE {time.time()} ")  # one write, or the lines of two processes mix
        sys.stdout.flush()
        if trouble == "hangs":
            time.sleep(1000)
        if trouble == "fails":
            raise ValueError("no picture today")
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean(dim=(1, 2, 3)).tolist()


RDMTrainer(
    digits.teacher_path(),
    [(troubled, 0.2)],
    RDMConfig(output_dir=sys.argv[1], max_steps=4, per_device_train_batch_size=2, num_generations=2, guidance_scale=1.0,
              max_sequence_length=4, save_strategy="no", disable_tqdm=True, use_cpu=True, report_to="none",
              ddp_timeout=15),
    digits.prompts(),
).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (
            "hangs",
            "process 1 did not come; it has been asking the rewards troubled for [12][0-9] s.*ddp_timeout=15 seco",
        ),
        ("fails", "process 1 has failed: ValueError: no picture today"),
        ("is killed", "process 1 gives no sign of life .its last was that it was .*killed, or is it out of memory"),
    ],
)
def test_a_process_in_trouble_ends_the_others(tmp_path: Path, trouble: str, words: str) -> None:
    """Within half a minute, with what it was doing; one that hangs is ended as well."""
    script = tmp_path / "run.py"
    script.write_text(TROUBLE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(script), str(tmp_path / "out"), trouble]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    ended = time.time()
    assert done.returncode != 0
    (begun,) = re.findall(r"TROUBLE (\S+)", done.stdout)
    assert re.search(rf"(RDMError: |process 0 ends, still ).*{words}", done.stderr), done.stderr[-5000:]
    print(f"{trouble}: over after {ended - float(begun):.1f} s")
    assert ended - float(begun) < 30
