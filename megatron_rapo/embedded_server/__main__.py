"""`python -m megatron_rapo.embedded_server`: serves a Hugging Face model over SGLang's HTTP contract."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.wire.access import API_KEY_VARIABLE, api_key_from_environment, is_loopback

_PR_SET_PDEATHSIG = 1
logger = logging.getLogger("megatron_rapo.embedded_server")


def main() -> int:
    """Serves until a signal ends it. Returns 1 where it cannot begin."""
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if arguments.parent_pid is not None:
        _die_with_parent()
        threading.Thread(target=_end_with_parent, args=(arguments.parent_pid,), daemon=True).start()
    try:
        _refuse_open_host(arguments.host, arguments.api_key)
        listening = _listen(arguments)
        _refuse_open_host(listening.getsockname()[0], arguments.api_key)  # an inherited one may be anywhere
        _serve(arguments, listening)
    except RapoError as error:
        logger.error("%s", error)
        return 1
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megatron_rapo.embedded_server", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="HF folder: config, safetensors, tokenizer")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, told on stdout")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the computation")
    parser.add_argument(
        "--api-key",
        default=api_key_from_environment(),
        help=f"demanded of every request; default: {API_KEY_VARIABLE}, which does not show in `ps`",
    )
    parser.add_argument(
        "--socket-fd", type=int, help="listen on this inherited socket, in place of --host and --port"
    )
    parser.add_argument("--parent-pid", type=int, help="end when this process, the parent, is gone")
    return parser.parse_args()


def _refuse_open_host(host: str, api_key: str | None) -> None:
    """Who reaches the server can replace the model: beyond this machine that takes a key."""
    if not is_loopback(host) and not api_key:
        raise RapoError(
            f"--host {host} can be reached from other machines; set {API_KEY_VARIABLE} (or --api-key), "
            "or listen on 127.0.0.1"
        )


def _listen(arguments: argparse.Namespace) -> socket.socket:
    if arguments.socket_fd is not None:
        return socket.socket(fileno=arguments.socket_fd)
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    try:
        return socket.create_server((arguments.host, arguments.port), family=family)
    except OSError as error:
        raise RapoError(
            f"cannot listen on {arguments.host} port {arguments.port}: {error}; choose another, or --port 0"
        ) from error


def _serve(arguments: argparse.Namespace, listening: socket.socket) -> None:
    import torch  # here, since what is refused is refused at once
    import uvicorn

    from megatron_rapo.embedded_server.app import create_app
    from megatron_rapo.embedded_server.engine import Engine
    from megatron_rapo.embedded_server.service import Service

    torch.set_num_threads(arguments.threads)
    service = Service()
    app = create_app(service, arguments.api_key)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    loading = service.load(lambda: Engine(arguments.model, arguments.device, arguments.dtype))

    def on_loaded(_: object) -> None:
        failed = loading.exception() is not None
        server.should_exit |= failed
        logger.info("loading failed" if failed else "ready")

    loading.add_done_callback(on_loaded)
    host, port = listening.getsockname()[:2]
    print(f"serving {arguments.model} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    server.run(sockets=[listening])
    loading.result()


def _die_with_parent() -> None:
    """Has the kernel kill this process as well, since one that is stopped, or hangs, does not look."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end_with_parent(parent_pid: int) -> None:
    """Ends this process once its parent is gone, however that ended: a server must not outlive its run."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    logger.error("the parent process %d is gone: ending", parent_pid)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
