"""A service for tests: in this process, or in a process of its own that can be killed."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from helpers import ROOT

from capgen_utils.apps.serve.app import create_app
from capgen_utils.apps.serve.protection import Limits, Protection
from capgen_utils.apps.serve.served import Served

PATIENCE = 120  # seconds to wait for what must come; never what is asserted


def until(condition: Any, what: str) -> None:
    """Wait for ``condition``."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for: {what}"
        time.sleep(0.01)


@contextmanager
def running(
    *served: Served, limits: Limits | None = None, protection: Protection | None = None
) -> Iterator[tuple[httpx.Client, Any]]:
    """Yield a client and the application behind a real server on a free port, when it is ready."""
    app = create_app(served, limits, protection or Protection(rate=None))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=20)
    )
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=PATIENCE) as client:
            until(lambda: server.started, "the server")
            until(lambda: app.state.service.ready, "the warm start")
            yield client, app
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listening.close()


class ServeProcess:
    """``capgen serve`` in a process of its own, on a free port.

    Args:
        arguments: of the command.
        environment: on top of this one's.
    """

    def __init__(self, *arguments: str | Path, **environment: str) -> None:
        env = (
            os.environ
            | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            | environment
        )
        command = [
            sys.executable,
            "-m",
            "capgen_utils",
            "serve",
            "--port",
            "0",
            *map(str, arguments),
        ]
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        found = re.search(r"http://\S+", first)
        if not found:
            self.process.kill()
            raise AssertionError(f"it did not start: {first}{self.process.communicate()[1]}")
        self.address = found[0]

    def __enter__(self) -> "ServeProcess":
        until(self.ready, "capgen serve")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ready(self) -> bool:
        """Whether it says so; it may be slow to answer, but once it has named its address nobody is
        refused."""
        try:
            return httpx.get(f"{self.address}/readyz", timeout=10).status_code == 200
        except httpx.TimeoutException:
            return False
