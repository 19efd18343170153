"""The command ``capgen serve``: captioners behind a URL."""

import argparse
import os
import re
import warnings
from pathlib import Path
from typing import Any

from capgen_utils.apps.cli.arguments import (
    INTERRUPTED,
    add_command,
    add_fp32_option,
    add_weights_option,
)
from capgen_utils.common.files import CapGenError

KEY_VARIABLE = "CAPGEN_API_KEY"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def add_serve(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "serve", _serve, "Serve captioners over HTTP, with a page to try them."
    )
    parser.add_argument(
        "--bundle",
        action="append",
        metavar="[NAME=]FOLDER",
        help="a trained captioner; several can be served, the first one is the default (default: the one that ships)",
    )
    add_weights_option(parser)
    add_fp32_option(parser)
    parser.add_argument(
        "--scorer",
        type=Path,
        metavar="FOLDER",
        help="a CLIP that chooses captions (default: its own)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all of this machine's"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    _add_protection(parser)
    _add_limits(parser)


def _add_protection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("protection")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"ask for it (better: {KEY_VARIABLE}, which no list shows)"
    )
    group.add_argument(
        "--cors",
        action="append",
        metavar="ORIGIN",
        help="let pages of this origin call the service",
    )
    group.add_argument(
        "--rate-limit", default="300/minute", metavar="N/TIME", help="for each address, or none"
    )
    group.add_argument(
        "--trusted-proxy",
        action="append",
        metavar="ADDRESS",
        help="believe this proxy who the client is",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-megabytes", type=float, default=20, metavar="X", help="of one request"
    )
    group.add_argument("--max-images", type=int, default=8, metavar="N", help="of one request")
    group.add_argument("--max-megapixels", type=float, default=25, metavar="X", help="of one image")
    group.add_argument(
        "--deadline", type=float, default=30, metavar="SECONDS", help="for one request"
    )
    group.add_argument(
        "--queue", type=int, default=64, metavar="N", help="images that may wait for the model"
    )
    group.add_argument(
        "--batch",
        type=int,
        default=16,
        metavar="N",
        help="images that go through the model together",
    )
    group.add_argument(
        "--wait-ms", type=float, default=5, metavar="X", help="how long an image waits for company"
    )


def _serve(options: argparse.Namespace) -> int:
    import uvicorn

    from capgen_utils.apps.serve.app import create_app
    from capgen_utils.apps.serve.served import Served

    limits, protection = _limits(options), _protection(options)
    served = [
        Served.load(
            name, folder, options.device, options.encoder_weights, options.scorer, options.fp32
        )
        for name, folder in _named(options.bundle)
    ]
    warnings.filterwarnings("ignore", module="PIL")  # about uploads, which are not logged
    config = uvicorn.Config(
        create_app(served, limits, protection),
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
    try:
        listening = config.bind_socket()
        listening.listen(config.backlog)  # whoever reads the address below can connect at once
    except (SystemExit, OSError) as stop:  # uvicorn has said why
        raise CapGenError(
            f"cannot listen at {options.host}:{options.port}", "choose another --port"
        ) from stop
    port = listening.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(
        f"serving {', '.join(each.name for each in served)} at http://{host}:{port} (Ctrl-C ends it)",
        flush=True,
    )
    try:
        uvicorn.Server(config).run([listening])
    except KeyboardInterrupt:  # what was accepted is finished by now
        return INTERRUPTED
    return 0


def _named(given: list[str] | None) -> list[tuple[str, Path | None]]:
    """Return name and folder of each bundle.

    Raises:
        CapGenError: a name that is not possible, or one that comes twice.
    """
    from capgen_utils.captioner import DEFAULT_BUNDLE

    if not given:
        return [(DEFAULT_BUNDLE.name, None)]
    found: dict[str, Path | None] = {}
    for text in given:
        before, equals, after = text.partition("=")
        named = bool(equals) and not Path(text).exists()
        folder = Path(after if named else text)
        absolute = folder.absolute()
        own = (
            absolute.parent.name if absolute.name == "bundle" else absolute.name
        )  # RUN/bundle is what training writes
        name = before if named else own
        if not _NAME.fullmatch(name):
            raise CapGenError(
                f"a captioner cannot be called {name!r}",
                "letters, digits, dot, dash: --bundle NAME=FOLDER",
            )
        if name in found:
            raise CapGenError(
                f"two captioners are called {name}", "name them: --bundle NAME=FOLDER"
            )
        found[name] = folder
    return list(found.items())


def _limits(options: argparse.Namespace) -> Any:
    from capgen_utils.apps.serve.protection import Limits

    bounds = {
        "max_megabytes": (0.01, 1000),
        "max_images": (1, 1000),
        "max_megapixels": (0.01, 100),
        "deadline": (1, 3600),
        "queue": (1, 100_000),
        "batch": (1, 1024),
        "wait_ms": (0, 10_000),
    }
    for name, (low, high) in bounds.items():
        value = getattr(options, name)
        if not low <= value <= high:
            shown = name.replace("_", "-")
            raise CapGenError(
                f"--{shown} {value:g} is not possible",
                f"give {low:g} or more, and at most {high:g}",
            )
    if options.queue < options.max_images:
        raise CapGenError(
            "a request of --max-images would never fit into the queue", "give a longer --queue"
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


def _protection(options: argparse.Namespace) -> Any:
    from capgen_utils.apps.serve.protection import Protection, parse_rate

    rate = None if options.rate_limit.strip().lower() in ("none", "off", "") else options.rate_limit
    parse_rate(rate)
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    return Protection(key, tuple(options.cors or ()), rate)
