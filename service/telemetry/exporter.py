"""One scrape per node: whichever replica holds the metrics port serves the merge of all, and another takes over."""

from __future__ import annotations

import logging
import os
import struct
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

logger = logging.getLogger("farsight")

TAKEOVER_INTERVAL_S = 1.0
RETRIES = 5
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def merged(metrics_dir: Path) -> CollectorRegistry:
    """All replicas of this node, the dead ones' counters included and their gauges left out."""
    for file in metrics_dir.glob("gauge_live*.db"):
        if not os.path.exists(f"/proc/{file.stem.rsplit('_', 1)[1]}"):
            file.unlink(missing_ok=True)  # a scrape beside this one may have been quicker
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(metrics_dir))  # type: ignore[no-untyped-call]
    return registry


def text(metrics_dir: Path) -> bytes:
    """Prometheus text of this node; again where a file came or went while it was read."""
    for _ in range(RETRIES):
        try:
            return generate_latest(merged(metrics_dir))
        except (FileNotFoundError, struct.error):  # struct: a file that was made and not yet filled
            time.sleep(0.01)
    return generate_latest(merged(metrics_dir))


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is not worth a log line."""


class Exporter:
    """Tries for the port until it has it; a process that dies frees it for the next."""

    def __init__(self, host: str, port: int, metrics_dir: Path) -> None:
        self._address, self._directory = (host, port), metrics_dir
        self._stopped = threading.Event()
        self._server: WSGIServer | None = None
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._server is not None:
            self._server.shutdown()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._server = make_server(*self._address, self._app, server_class=_Server, handler_class=_Quiet)
            except OSError:
                # another replica of this node has the port and answers for all of us
                self._stopped.wait(TAKEOVER_INTERVAL_S)
                continue
            logger.info("metrics of this node on %s:%d", *self._address)
            with self._server:
                self._server.serve_forever()

    def _app(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        body = text(self._directory)
        start_response("200 OK", [("Content-Type", CONTENT_TYPE)])
        return [body]
