"""`rdm-sdk serve`: rewards behind HTTP, for `remote[...]` and for programs in other languages."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence

from rdm_sdk.cli.console import Parser, find_device, whole_number
from rdm_sdk.errors import ConfigError

HELP = "serve rewards over HTTP, for remote[...] in a run elsewhere"
TOKEN = "RDM_SERVE_TOKEN"


def run(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    parser = Parser(prog="rdm-sdk serve", description=HELP)
    parser.add_argument("rewards", help="a spec such as 'legibility + jpeg'; weights mean nothing here")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 is all of this machine's"
    )
    parser.add_argument("--port", type=whole_number(0, 65535), default=8000, help="0 takes any that is free")
    parser.add_argument("--token", help=f"what clients must show; better in the environment variable {TOKEN}")
    parser.add_argument("--device", help="where the rewards' models run; by default the GPU if there is one")
    parser.add_argument("--batch-size", type=whole_number(1), default=64, help="images judged at a time")
    parser.add_argument("--max-images", type=whole_number(1), default=512, help="images in a request")
    parser.add_argument("--max-side", type=whole_number(1), default=4096, help="pixels on a side of an image")
    parser.add_argument("--max-megabytes", type=whole_number(1), default=256, help="size of a request (2^20 bytes)")
    options = parser.parse_args(arguments)
    token = os.environ.get(TOKEN) if options.token is None else options.token
    _check_token(token, options.host)
    _check_packages()
    find_device(options.device)  # before anything is loaded
    from rdm_sdk.serving.requests import Limits
    from rdm_sdk.serving.server import serve

    with _listening(options.host, options.port) as listening:
        host, port = listening.getsockname()[:2]

        def ready(labels: list[str]) -> None:
            where = f"[{host}]" if ":" in host else host
            print(f"serving {', '.join(labels)} at http://{where}:{port} (its pages: /docs)", flush=True)

        serve(
            options.rewards,
            listening,
            token=token,
            device=options.device,
            batch_size=options.batch_size,
            limits=Limits(options.max_megabytes * 2**20, options.max_images, options.max_side),
            ready=ready,
        )
    return 0


def _check_token(token: str | None, host: str) -> None:
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("--token must be printable ASCII without spaces, at least one character")
    if token is None and not _is_local(host):
        raise ConfigError(
            f"--host {host} can be reached from elsewhere, and there is no token: set {TOKEN}, for example to the "
            "output of 'openssl rand -hex 32', or listen at 127.0.0.1"
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_packages() -> None:
    try:
        import fastapi as fastapi
        import uvicorn as uvicorn
    except ImportError as error:
        raise ConfigError(f"serving rewards needs {error.name}: pip install 'rdm-sdk[serve]'") from error


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
