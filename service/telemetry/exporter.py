"""Metrics of one node on one port: the replica that holds it serves the merge of all; another takes over if it ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import Metric, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from service.telemetry import metric_files as files

if TYPE_CHECKING:
    from wsgiref.types import StartResponse

logger = logging.getLogger("farsight")

TAKEOVER_INTERVAL_S = 1.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Node(Collector):
    """Metrics of all replicas of this node: counters of ended processes are included, their gauges are not."""

    def __init__(self, metrics_dir: Path) -> None:
        self._directory = metrics_dir

    def collect(self) -> Iterable[Metric]:
        with files.locked(self._directory):
            found = files.folded(self._directory)
            merged: Iterable[Metric] = MultiProcessCollector.merge(found)  # type: ignore[no-untyped-call]
            return merged


def text(metrics_dir: Path) -> bytes:
    """Prometheus text of this node; empty before any process could write, as on a disk that was full at the start."""
    return generate_latest(_Node(metrics_dir)) if files.is_used(metrics_dir) else b""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log nothing: scrapes come every few seconds."""


class Exporter:
    """Serves `metrics_dir` on `host`:`port`. Retries until the port is free: a process that ends frees it."""

    def __init__(self, host: str, port: int, metrics_dir: Path) -> None:
        self._address, self._directory = (host, port), metrics_dir
        self._stopped = threading.Event()
        self._server: WSGIServer | None = None
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Free the port and join the thread."""
        self._stopped.set()
        if self._server is not None:
            self._server.shutdown()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._server = make_server(*self._address, self._app, server_class=_Server, handler_class=_Quiet)
            except OSError:
                # another replica of this node has the port and serves the metrics of all
                self._stopped.wait(TAKEOVER_INTERVAL_S)
                continue
            logger.info("metrics of this node on %s:%d", *self._address)
            with self._server:
                self._server.serve_forever()

    def _app(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        body = text(self._directory)
        start_response("200 OK", [("Content-Type", CONTENT_TYPE)])
        return [body]
