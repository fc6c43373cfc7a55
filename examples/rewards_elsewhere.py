"""Rewards outside the run's process: one behind HTTP, on this or another machine, and one in a Python of its own.

pip install 'rdm-sdk[serve]' rdm-reward-jpeg
python examples/rewards_elsewhere.py --output outputs/elsewhere --steps 150

On two machines, `rdm-sdk serve jpeg --host 0.0.0.0` runs on the other one, with RDM_SERVE_TOKEN set, and the spec has
`token_env=`. For the second reward, `rdm-sdk isolate` makes an environment whose packages do not go with the run's.
"""

import socket
import subprocess
import sys
import time

from shared import digits_settings, flags

from rdm_sdk import RDMTrainer, digits


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server listens, for a minute at most; raises `RuntimeError` if it ends or does not come."""
    for _ in range(600):
        if server.poll() is not None:
            break
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("the reward server did not start; what it printed says why")


def main() -> None:
    parser = flags(__doc__, steps=150)
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    server = subprocess.Popen([sys.executable, "-m", "rdm_sdk.cli.main", "serve", "jpeg", "--port", str(options.port)])
    try:
        wait_for(options.port, server)
        trainer = RDMTrainer(
            digits.teacher_path(),
            f'dm + 0.2*remote[url="http://127.0.0.1:{options.port}",reward=jpeg]'
            f' + 0.1*isolated[python="{sys.executable}",reward=legibility]',
            digits_settings(options, "run", reward_timeout=60),
            digits.prompts(),
        )
        trainer.train()
        trainer.save_model(str(options.output / "student"))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
