"""The command ``capgen serve``: captioners behind a URL."""

import argparse
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import DEVICE, FP32, INTERRUPTED, WEIGHTS, Command
from capgen_utils.common.files import CapGenError

KEY_VARIABLE = "CAPGEN_API_KEY"

# Option -> default, smallest and largest value, metavar, help.
LIMITS: dict[str, tuple[float, float, float, str, str]] = {
    "max_megabytes": (20.0, 0.01, 1000, "X", "largest request"),
    "max_images": (8, 1, 1000, "N", "images per request"),
    "max_megapixels": (25.0, 0.01, 100, "X", "largest image"),
    "deadline": (30.0, 1, 3600, "SECONDS", "time per request"),
    "queue": (64, 1, 100_000, "N", "images that may wait for the model"),
    "batch": (16, 1, 1024, "N", "images that go through the model together"),
    "wait_ms": (5.0, 0, 10_000, "X", "how long an image waits for others to share its batch"),
}


@contextmanager
def serve_extra(command: str) -> Iterator[None]:
    """Explain a failed import of the packages that only the extra ``serve`` installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CapGenError(
            f"capgen {command} needs the package {error.name}, which is not installed",
            "run: pip install -e '.[serve]'",
        ) from error


def run_serve(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        CapGenError: an option is out of bounds, a bundle cannot be loaded, or the port is taken.
    """
    with serve_extra("serve"):
        import uvicorn

        from capgen_utils.apps.serve.app import create_app
        from capgen_utils.apps.serve.served import Served

    limits, protection = read_limits(options), read_protection(options)
    captioners = [
        Served.load(
            name, folder, options.device, options.encoder_weights, options.scorer, options.fp32
        )
        for name, folder in name_bundles(options.bundle)
    ]
    warnings.filterwarnings("ignore", module="PIL")  # they would quote uploads
    config = uvicorn.Config(
        create_app(captioners, limits, protection),
        options.host,
        options.port,
        log_level="warning",
        proxy_headers=bool(options.trusted_proxy),
        forwarded_allow_ips=options.trusted_proxy or [],
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(options.deadline) + 5,
        limit_concurrency=1024,
        ws="none",
    )
    listening = listen(config)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{listening.getsockname()[1]}"
    names = ", ".join(served.name for served in captioners)
    print(f"serving {names} at {address} (Ctrl-C to stop)", flush=True)
    try:
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:  # accepted requests have been answered
        return INTERRUPTED
    return 0


def listen(config: Any) -> Any:
    """Return the bound socket of a uvicorn ``Config``.

    Raises:
        CapGenError: the port is taken, or the address is not this machine's.
    """
    try:
        listening = config.bind_socket()
        listening.listen(config.backlog)  # a client can connect as soon as it reads the address
    except (SystemExit, OSError) as stop:  # uvicorn has logged the reason
        raise CapGenError(
            f"cannot listen on {config.host}:{config.port}", "choose another --port"
        ) from stop
    return listening


def name_bundles(bundles: list[str] | None) -> list[tuple[str, Path | None]]:
    """Return name and folder of each ``[NAME=]FOLDER``; ``None`` stands for the one that ships.

    Raises:
        CapGenError: a name is invalid or occurs twice.
    """
    from capgen_utils.captioner import DEFAULT_BUNDLE

    if not bundles:
        return [(DEFAULT_BUNDLE.name, None)]
    folders: dict[str, Path | None] = {}
    for text in bundles:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            folder, path = text, Path(text).absolute()
            # Training writes RUN/bundle: the run names the captioner.
            name = path.parent.name if path.name == "bundle" else path.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise CapGenError(
                f"a captioner cannot be called {name!r}",
                "use letters, digits, dots and dashes: --bundle NAME=FOLDER",
            )
        if name in folders:
            raise CapGenError(
                f"two captioners are called {name}", "name them: --bundle NAME=FOLDER"
            )
        folders[name] = Path(folder)
    return list(folders.items())


def read_limits(options: argparse.Namespace) -> Any:
    """Return the service's ``Limits``.

    Raises:
        CapGenError: a value is out of bounds.
    """
    from capgen_utils.apps.serve.protection import Limits

    for name, (_, low, high, _, _) in LIMITS.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise CapGenError(
                f"--{name.replace('_', '-')} {value:g} is not possible",
                f"use a value from {low:g} to {high:g}",
            )
    if options.queue < options.max_images:
        raise CapGenError(
            "a request of --max-images would never fit into the queue", "use a larger --queue"
        )
    body = int(options.max_megabytes * 1e6)
    return Limits(
        body_bytes=body,
        images=options.max_images,
        pixels=int(options.max_megapixels * 1e6),
        seconds=options.deadline,
        upload_bytes=max(200_000_000, 2 * body),
        queue=options.queue,
        batch=options.batch,
        window=options.wait_ms / 1000,
    )


def read_protection(options: argparse.Namespace) -> Any:
    """Return the service's ``Protection``.

    Raises:
        CapGenError: the rate limit is malformed.
    """
    from capgen_utils.apps.serve.protection import Protection, parse_rate

    rate = None if options.rate_limit.strip().lower() in ("none", "off", "") else options.rate_limit
    parse_rate(rate)
    return Protection(
        options.api_key or os.environ.get(KEY_VARIABLE) or None, tuple(options.cors or ()), rate
    )


COMMAND = Command(
    "serve",
    run_serve,
    "Serve captioners over HTTP, with a web page to try them.",
    {
        "--bundle": dict(
            action="append",
            metavar="[NAME=]FOLDER",
            help="a trained captioner; repeat for several, the first one is the default "
            "(default: the one that ships)",
        ),
        **WEIGHTS,
        **FP32,
        "--scorer": dict(
            type=Path, metavar="FOLDER", help="a CLIP for re-ranking (default: the bundle's)"
        ),
        **DEVICE,
        "--host": dict(
            default="127.0.0.1", help="address to listen on; 0.0.0.0 is every interface"
        ),
        "--port": dict(type=int, default=8000, help="0 picks a free port"),
    },
    {
        "protection": (
            None,
            {
                "--api-key": dict(
                    metavar="KEY",
                    help=f"key that clients must send (better: {KEY_VARIABLE}, which process "
                    "lists hide)",
                ),
                "--cors": dict(
                    action="append",
                    metavar="ORIGIN",
                    help="allow web pages of this origin",
                ),
                "--rate-limit": dict(
                    default="300/minute",
                    metavar="N/TIME",
                    help="requests per address, or none",
                ),
                "--trusted-proxy": dict(
                    action="append",
                    metavar="ADDRESS",
                    help="proxy whose forwarded client address is believed",
                ),
            },
        ),
        "limits": (
            None,
            {
                f"--{name.replace('_', '-')}": dict(
                    type=type(default), default=default, metavar=metavar, help=text
                )
                for name, (default, _, _, metavar, text) in LIMITS.items()
            },
        ),
    },
)
