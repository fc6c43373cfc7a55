"""How many images a second a served reward scores, against the same reward in this process.

    OMP_NUM_THREADS=1 python benchmarks/performance/serving_throughput.py   # jpeg, 32 images, 512 px
    OMP_NUM_THREADS=1 python benchmarks/performance/serving_throughput.py --transport float32

Two figures: images a second, which wants free cores, and the server's processor time per image against that of the
reward alone, which is what its machine has left for scoring. The server is a child process on a local socket
(`isolated`), which leaves the network out: what is measured is packing, sending, reading, checking and answering. Calls
are sent one after the other, and `--clients` at a time, as the ranks of a run or the chunks of a batch are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil

from rdm_sdk import Reward, RewardBatch
from rdm_sdk.rewards.evaluate import evaluate_reward
from rdm_sdk.rewards.resolve import resolve_rewards
from rdm_sdk.serving.isolated import Isolated
from rdm_sdk.testing import example_images


def images_per_second(reward: Reward, batch: RewardBatch, clients: int, calls: int, turns: int) -> float:
    """Return the best of some turns of a number of calls, by some clients at a time."""
    best = 0.0
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(turns):
            started = time.perf_counter()
            list(pool.map(lambda _: evaluate_reward(reward, batch), range(calls)))
            best = max(best, calls * len(batch) / (time.perf_counter() - started))
    return best


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
    sizes = options.calls, options.turns
    evaluate_reward(served, batch), evaluate_reward(local, batch)
    server = psutil.Process(served.child.process.pid)
    before = sum(server.cpu_times()[:2])
    for _ in range(options.calls):
        evaluate_reward(served, batch)
    over_there, began = sum(server.cpu_times()[:2]) - before, time.process_time()
    for _ in range(options.calls):
        evaluate_reward(local, batch)
    alone_cpu = time.process_time() - began
    here = images_per_second(local, batch, 1, *sizes)
    alone = images_per_second(served, batch, 1, *sizes)
    together = images_per_second(served, batch, options.clients, *sizes)
    row = {
        "reward": options.reward,
        "transport": options.transport,
        "local_images_per_s": round(here, 1),
        "served_images_per_s": round(alone, 1),
        f"served_by_{options.clients}_clients": round(together, 1),
        "share": round(alone / here, 3),
        "share_of_processor_time": round(alone_cpu / over_there, 3),
        "share_of_clients": round(together / here, 3),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
