"""The web server: `python -m pipeline.web`, configured by the environment or by flags (`--help`).

It runs Granian with `WEB_CONCURRENCY` processes of `WEB_THREADS` threads: threads, because requests wait for the broker
rather than compute, and because requests that wait together share one publish. SIGTERM lets the requests under way end,
for at most 20 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

from pipeline.extras import MissingExtra, require

try:
    require("server")
except MissingExtra as error:
    sys.exit(f"pipeline: {error}")

from granian import Granian
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels

from pipeline.observability.logs import configure_logs, logger
from pipeline.settings import SettingsError, load_settings
from pipeline.web.serving import Serving

log = logger(__name__)

_HEAD_BYTES = 32 * 1024
_STOP_SECONDS = 20  # for requests under way after SIGTERM; a hand-over takes under five even if the broker is away
_CONNECTIONS = 20_000  # of a process at a time; one that waits costs a few kilobytes
_TO_OUR_LOG = {"level": "INFO", "handlers": [], "propagate": True}  # which masks


def main() -> None:
    """Serve until SIGTERM."""
    given = _arguments()
    try:
        settings = load_settings()
    except SettingsError as error:
        sys.exit(f"pipeline: {error}")
    address = _address(given.host, given.port)
    configure_logs(settings)
    _allow_connections()
    with tempfile.TemporaryDirectory(prefix="pipeline-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)  # see pipeline.web.metrics
        failed = Path(folder, "failed")
        load = partial(_load, given.app, failed, threads=given.threads, access_log=given.access_log)
        while True:
            server = Granian(
                given.app,
                address=address,
                port=given.port,
                workers=given.processes,
                interface=Interfaces.RSGI,
                http=HTTPModes.http1,  # a silent connection ends in time only where no HTTP/2 is expected
                http1_settings=HTTP1Settings(
                    header_read_timeout=given.head_seconds * 1000, max_buffer_size=_HEAD_BYTES
                ),
                websockets=False,
                backpressure=_CONNECTIONS,
                backlog=2048,
                respawn_failed_workers=True,
                respawn_interval=0.1,
                workers_kill_timeout=_STOP_SECONDS,
                log_level=LogLevels(settings.log_level.lower()),
                log_dictconfig={"loggers": {"_granian": _TO_OUR_LOG}, "handlers": {}, "formatters": {}},
            )
            with contextlib.suppress(SystemExit):
                server.serve(target_loader=load, wrap_loader=False)  # type: ignore[arg-type]  # RSGI takes objects too
            if failed.exists():
                sys.exit("pipeline: the processes of the web server do not start; the reason is above")
            if server.interrupt_signal:
                return
            log.error("web processes died repeatedly; the web server starts again")


def _arguments() -> argparse.Namespace:
    environment = os.environ.get
    parser = argparse.ArgumentParser(prog="python -m pipeline.web", description="Serve the web process.")
    parser.add_argument("app", nargs="?", default="pipeline.web.wsgi:app", help="the WSGI app (%(default)s)")
    parser.add_argument("--host", default=environment("HOST") or "0.0.0.0", help="HOST (%(default)s)")  # noqa: S104 - inside its container
    for name, variable, default, text in (
        ("--port", "PORT", 8000, "%(default)s"),
        ("--processes", "WEB_CONCURRENCY", 2, "%(default)s"),
        ("--threads", "WEB_THREADS", 16, "in each process; %(default)s"),
        ("--head-seconds", "", 30, "for a request's head, and between two requests on a connection; %(default)s"),
    ):
        parser.add_argument(name, type=int, default=environment(variable) or default, help=f"{variable} ({text})")
    parser.add_argument(
        "--access-log", action="store_true", default=bool(environment("WEB_ACCESS_LOG")),
        help="WEB_ACCESS_LOG: log each request, without tokens and numbers",
    )  # fmt: skip
    return parser.parse_args()


def _address(host: str, port: int) -> str:
    """The IP address to listen on; an IPv6 address may have its brackets, and a name is resolved."""
    try:
        found = socket.getaddrinfo(host.strip().removeprefix("[").removesuffix("]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, OverflowError) as error:
        sys.exit(f"pipeline: HOST and PORT: nothing can listen on {host!r}, port {port}: {error}")
    return str(found[0][4][0])


def _load(app: str, failed: Path, *, threads: int, access_log: bool) -> Serving:
    """The application that each process of the server runs; an app that cannot be loaded ends the server."""
    in_child = multiprocessing.parent_process() is not None
    if in_child:  # Granian sets its own handler later; until then this process has its parent's, which does not end it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    module, _, name = app.partition(":")
    try:
        found = getattr(import_module(module), name)
    except BaseException as error:
        # At once: the parent, told to end, ends this process before Python prints the exception.
        log.error("the web app cannot be loaded", error=f"{type(error).__name__}: {error}")  # noqa: TRY400 - it follows
        failed.touch()
        if in_child:
            os.kill(os.getppid(), signal.SIGTERM)
        raise
    if "PIPELINE" in getattr(found, "config", {}):
        from pipeline.web.app import keep_heartbeat

        keep_heartbeat(found)
    return Serving(found, threads=threads, access_log=access_log)


def _allow_connections() -> None:
    """Raise the limit of open files to what this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
