"""How many images a second a served reward scores, against the same reward in this process.

    OMP_NUM_THREADS=1 python benchmarks/performance/serving_throughput.py   # jpeg, 32 images, 512 px
    OMP_NUM_THREADS=1 python benchmarks/performance/serving_throughput.py --transport float32

Two kinds of figures, each the median of some turns in which both are measured one after the other. Images a second want
free cores. Processor time per image does not hang on what else the machine does: that of the reward alone, of
the server, and of the client, which a run spends beside its own work. `share_of_processor_time` is what the server's
machine has left for scoring.

The server is a child process on a local socket (`isolated`), which leaves the network out: what is measured is packing,
sending, reading, checking and answering. Calls are sent one after the other, and `--clients` at a time, as the ranks of
a run or the chunks of a batch are. Every call has a batch that nobody has looked at, as each step of a run has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil

from rdm_sdk import Reward, RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.serving.isolated import Isolated
from rdm_sdk.testing import example_images

CHUNK = 5
"""Images of 512 pixels that a server on a CPU judges at a time."""


def seconds_per_image(
    reward: Reward, batch: RewardBatch, clients: int, calls: int, clock: Callable[[], float], chunk: int | None = None
) -> float:
    """Return what a clock shows per image, over a number of calls by some clients at a time."""
    with ThreadPoolExecutor(clients) as pool:
        started = clock()
        list(pool.map(lambda _: evaluate_reward(reward, replace(batch), chunk_size=chunk), range(calls)))
        return (clock() - started) / (calls * len(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="jpeg")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--transport", default="uint8")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    local = resolve_rewards(options.reward)[0].reward
    spec = f'isolated[python="{sys.executable}",reward={options.reward},transport={options.transport}]'
    served = resolve_rewards(spec)[0].reward
    assert isinstance(served, Isolated)
    batch = RewardBatch.from_images(example_images(options.batch, options.size, options.size))
    evaluate_reward(served, batch), evaluate_reward(local, batch)
    server = psutil.Process(served.child.process.pid)

    def over_there() -> float:
        times = server.cpu_times()
        return float(times.user + times.system)

    clocks: dict[str, tuple[Reward, int, Callable[[], float], int | None]] = {
        "local_ms": (local, 1, time.process_time, None),
        "local_in_chunks_ms": (local, 1, time.process_time, CHUNK),
        "server_ms": (served, 1, over_there, None),
        "client_ms": (served, 1, time.process_time, None),
        "local_waited_ms": (local, 1, time.perf_counter, None),
        "served_waited_ms": (served, 1, time.perf_counter, None),
        "clients_waited_ms": (served, options.clients, time.perf_counter, None),
    }
    turns = [
        {
            name: 1000 * seconds_per_image(reward, batch, clients, options.calls, clock, chunk)
            for name, (reward, clients, clock, chunk) in clocks.items()
        }
        for _ in range(options.turns)
    ]
    middle = {name: statistics.median(turn[name] for turn in turns) for name in clocks}

    def ratio(one: str, other: str) -> float | None:
        if not all(turn[other] for turn in turns):
            return None  # too short for the clock of another process, which ticks every 10 ms
        return round(statistics.median(turn[one] / turn[other] for turn in turns), 3)

    row = {
        "reward": options.reward,
        "transport": options.transport,
        **{
            f"{name}_per_image": round(middle[name], 2)
            for name in ("local_ms", "local_in_chunks_ms", "server_ms", "client_ms")
        },
        "local_images_per_s": round(1000 / middle["local_waited_ms"], 1),
        "served_images_per_s": round(1000 / middle["served_waited_ms"], 1),
        f"served_by_{options.clients}_clients": round(1000 / middle["clients_waited_ms"], 1),
        "share_of_processor_time": ratio("local_ms", "server_ms"),
        "share": ratio("local_waited_ms", "served_waited_ms"),
        "share_of_clients": ratio("local_waited_ms", "clients_waited_ms"),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
