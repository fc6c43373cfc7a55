"""Time and memory of a training cycle against NVIDIA's `modelopt.torch.fastgen`, in one process, in turns.

    pip install rdm-sdk scipy -c constraints.txt
    pip install --no-deps nvidia-modelopt ninja nvidia-ml-py pulp omegaconf antlr4-python3-runtime
    OMP_NUM_THREADS=1 python benchmarks/performance/against_modelopt.py                        # the digits teacher
    OMP_NUM_THREADS=1 python benchmarks/performance/against_modelopt.py --layers 12 --heads 16 --batch 8 --cycles 2
    OMP_NUM_THREADS=1 python benchmarks/performance/against_modelopt.py --compile both --ways "shared rollouts"

In an environment of its own: `--no-deps` keeps PyTorch as it is. Both sides have the same network, batch, student
steps, guidance, optimizer and clipping, and per cycle the same updates: `critic_steps` of the critic, then one of the
student. The other side is driven as its documentation shows: `DMDPipeline` with a deep copy of the teacher as student
and one as critic, backward simulation, prompts encoded beforehand and at no cost here; and it has no rewards, no checks
and logs nothing. Both sides' rollouts end at random steps of the student, here a sample's and there a whole batch's:
the other side's draws are seeded so that its steps come in turn, and in an even number of cycles both evaluate the
student exactly as often as on average. `forwards` are a cycle's evaluations of the student, in samples.

A row per way to train on this side: adapters with fresh rollouts for every update (what the other side does), full
copies with the same, and adapters with rollouts that critic and student share, which is the default. Bytes are those of
the denoisers' weights, one gradient per trained weight, and optimizer states; what both need alike, encoders and
decoder, is left out. A ratio below 1 is in favor of this side.

`--compile ours` is `torch_compile=True` here, and `both` compiles the other side's networks in the same way. Compiling
happens in the cycles before the timed ones: `compiling_s` is how long it took, `compiling_late_s` what of it was timed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from copy import deepcopy
from importlib import import_module
from typing import Any

import torch
from alternation import WARM_UP, Alternate
from diffusers import DiffusionPipeline, SD3Transformer2DModel
from peft import LoraConfig
from torch import nn

from rdm_sdk import RDMConfig, RDMTrainer, digits
from rdm_sdk.families.compiled import compile_networks, compiling_seconds
from rdm_sdk.training.randomness import forked

WAYS: dict[str, dict[str, Any]] = {
    "same rollouts": {"critic_rollouts": "fresh", "matching": "mixture"},
    "same rollouts, full copies": {
        **{"critic_rollouts": "fresh", "matching": "mixture"},
        **{"student_weights": "full", "critic_weights": "full"},
    },
    "shared rollouts": {},
}
"""Settings of this side."""


class Counted(nn.Module):
    """A network whose evaluations are counted, in samples; outside of what is compiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.samples = network, 0

    def forward(self, **inputs: Any) -> Any:
        self.samples += len(inputs["hidden_states"])
        return self.network(**inputs)


class Peer:
    """A cycle of the other side on a trainer's model, batch and settings.

    Args:
        trainer: whose backbone is copied, and whose settings hold.
        teacher: the network, without adapters.
    """

    def __init__(self, trainer: RDMTrainer, teacher: nn.Module) -> None:
        fastgen: Any = import_module("modelopt.torch.fastgen")
        args = self.args = trainer.args
        guided = args.guidance_scale != 1.0
        times = [*trainer.models.policy.sigmas, 0.0]
        config = fastgen.DMDConfig(
            pred_type="flow",
            guidance_scale=args.guidance_scale if guided else None,
            student_sample_steps=args.num_inference_steps,
            student_sample_type="sde",
            num_train_timesteps=1000,
            student_update_freq=args.critic_steps + 1,
            backward_simulation=True,
            sample_t_cfg=fastgen.SampleTimestepConfig(
                time_dist_type="uniform", min_t=args.min_time, max_t=args.max_time, t_list=times
            ),
        )
        self.student = Counted(deepcopy(teacher).train().requires_grad_(True))
        self.cycles, self.updates, self.seed, self.before_timing = 0, 0, 0, (0, 0.0)
        self.fake = fastgen.create_fake_score(teacher)
        self.pipeline = fastgen.DMDPipeline(self.student, teacher, self.fake, config)
        options: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "weight_decay": args.weight_decay}
        self.optimizers = {
            "student": torch.optim.AdamW(self.student.parameters(), lr=args.learning_rate, **options),
            "fake": torch.optim.AdamW(self.fake.parameters(), lr=2 * args.learning_rate, **options),
        }
        size = args.train_batch_size
        condition = trainer.models.encode((digits.prompts() * size)[:size])
        blank = trainer.models.encode([None] * size)["encoder_hidden_states"]
        self.shape = (size, *trainer.models.latent_shapes[0])
        self.condition, self.negative = condition, {"negative_encoder_hidden_states": blank} if guided else {}

    def compile(self) -> None:
        """Compile the networks as the trainer compiles its."""
        networks = self.student.network, self.pipeline.teacher, self.fake
        compile_networks(networks, str(self.args.torch_compile_backend), self.args.torch_compile_mode)

    def run(self) -> None:
        """Take a cycle's updates."""
        self.cycles += 1
        for _ in range(self.args.critic_steps):
            self._update("fake", self.fake, self.pipeline.compute_fake_score_loss)
        self._update("student", self.student, self.pipeline.compute_student_loss, **self.negative)
        if self.cycles == 1 + WARM_UP:  # the first was before the trainer's first
            self.before_timing = self.student.samples, compiling_seconds()

    def _update(self, name: str, network: nn.Module, loss_of: Any, **more: Any) -> None:
        device = next(network.parameters()).device
        latents, noise = torch.zeros(self.shape, device=device), torch.randn(self.shape, device=device)
        with forked(device):
            self._seed(device)
            loss = loss_of(latents, noise, **self.condition, **more)["total"]
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()

    def _seed(self, device: torch.device) -> None:
        """Seed the draws of an update, of which the first is the step that its rollout ends at: the steps in turn."""
        steps, drawn = self.args.num_inference_steps, -1
        while drawn != self.updates % steps:
            self.seed += 1
            torch.manual_seed(self.seed)
            drawn = int(torch.randint(0, steps, (1,), device=device))
        torch.manual_seed(self.seed)
        self.updates += 1

    def bytes(self) -> int:
        """Return the bytes of weights, gradients and optimizer states."""
        networks = (self.student, self.pipeline.teacher, self.fake)
        return bytes_of((p for network in networks for p in network.parameters()), self.optimizers.values())


def bytes_of(parameters: Iterable[nn.Parameter], optimizers: Iterable[Any]) -> int:
    """Return the bytes of weights, of a gradient for each that is trained, and of what optimizers remember."""
    weights = {id(p): p for p in parameters}.values()
    state = [t for one in optimizers for kept in one.state.values() for t in kept.values() if torch.is_tensor(t)]
    sizes = [p.nbytes * (1 + p.requires_grad) for p in weights] + [tensor.nbytes for tensor in state]
    return sum(sizes)


def base_of(layers: int | None, heads: int | None) -> Any:
    """Return the embedded pipeline, or one with a larger transformer with random weights in its place."""
    pipeline = DiffusionPipeline.from_pretrained(digits.teacher_path())
    if layers or heads:
        config = dict(pipeline.transformer.config)
        width = {"num_attention_heads": heads, "caption_projection_dim": heads * config["attention_head_dim"]}
        config |= ({"num_layers": layers} if layers else {}) | (width if heads else {})
        pipeline.transformer = SD3Transformer2DModel.from_config(config)
    return pipeline


def compare(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one way, in turns with the other side."""
    pipeline = base_of(options.layers, options.heads)
    teacher = deepcopy(pipeline.transformer)
    with tempfile.TemporaryDirectory() as folder:
        args = RDMConfig(
            output_dir=folder,
            max_steps=options.cycles + WARM_UP,
            per_device_train_batch_size=options.batch,
            guidance_scale=options.guidance_scale,
            max_sequence_length=4,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            torch_compile=options.compile is not None,
            torch_compile_backend=options.backend if options.compile else None,
            ema_decay=0.0,  # the other side has none
            **WAYS[way],
        )
        lora = None if "student_weights" in WAYS[way] else LoraConfig(r=options.rank, lora_alpha=options.rank)
        trainer = RDMTrainer(pipeline, "dm", args, digits.prompts(), peft_config=lora)
        peer = Peer(trainer, teacher.to(trainer.args.device))
        if options.compile == "both":
            peer.compile()
        timer = Alternate(peer.run)
        trainer.add_callback(timer)
        trainer.train()
    cycle, other = timer.totals()
    critics = trainer.critic_optimizer
    student: Any = trainer.optimizer
    assert critics is not None
    compiled, (samples_before, compiled_before) = compiling_seconds(), peer.before_timing
    mine = bytes_of(trainer.roles.parameters(), [student.optimizer, critics.optimizer])
    return {
        "way": way,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "batch": options.batch,
        "compile": options.compile,
        "rank": options.rank,
        "cycle_s": round(cycle, 4),
        "modelopt_s": round(other, 4),
        "time": round(cycle / other, 3),
        "forwards": round(trainer.costs()["cost/student_forwards"] / (options.cycles + WARM_UP), 1),
        "modelopt_forwards": round((peer.student.samples - samples_before) / options.cycles, 1),
        "megabytes": round(mine / 1e6, 2),
        "modelopt_megabytes": round(peer.bytes() / 1e6, 2),
        "bytes": round(mine / peer.bytes(), 3),
        "compiling_s": round(compiled),
        "compiling_late_s": round(compiled - compiled_before, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cycles", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument(
        "--compile", choices=["ours", "both"], help="whose networks torch.compile compiles; by default none"
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile, where something is compiled")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; 16 is the SDK's default")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, help="blocks of a network with random weights; by default the teacher's")
    parser.add_argument("--heads", type=int, help="attention heads of a network with random weights, its width")
    options = parser.parse_args()
    try:
        import_module("modelopt.torch.fastgen")
    except ImportError as error:
        parser.error(f"this compares with nvidia-modelopt, which cannot be imported ({error}); see above: --help")
    for way in options.ways:
        print(json.dumps(compare(way, options)), flush=True)


if __name__ == "__main__":
    main()
