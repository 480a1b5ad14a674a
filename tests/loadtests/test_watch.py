"""The third process sees cores and metrics, and does not fail where there are none."""

from __future__ import annotations

import math
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from loadtests.watch import Watch, counters

TEXT = """# HELP farsight_batch_requests Requests of one batch.
# TYPE farsight_batch_requests histogram
farsight_batch_requests_bucket{le="1.0"} 3.0
farsight_batch_requests_count 4.0
farsight_batch_requests_sum 10.0
farsight_batch_tokens_sum 2.5e+03
farsight_queue_predicted_seconds 0.125
farsight_resident_memory_bytes 7e+08
"""


class Metrics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(TEXT.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_series_without_labels_are_read() -> None:
    assert counters(TEXT) == {
        "farsight_batch_requests_count": 4.0,
        "farsight_batch_requests_sum": 10.0,
        "farsight_batch_tokens_sum": 2500.0,
        "farsight_queue_predicted_seconds": 0.125,
        "farsight_resident_memory_bytes": 7e8,
    }


def test_a_moment_has_cores_since_the_last_one_and_the_metrics() -> None:
    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        watch = Watch(os.getpid(), os.getsid(0), f"http://127.0.0.1:{server.server_port}/metrics")
        start_s = time.perf_counter()
        watch.look(start_s)
        before = time.process_time()
        while time.process_time() - before < 0.2:  # of this process
            pass
        moment = watch.look(start_s)
        server.shutdown()
        thread.join()
    assert (moment.queue_s, moment.batches, moment.batched_requests) == (0.125, 4.0, 10.0)
    assert moment.client_cores * moment.at_s >= 0.15  # psutil counts in hundredths
    assert moment.service_cores >= 0
    assert moment.replicas == 0


def test_a_remote_service_reports_its_memory() -> None:
    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        moment = Watch(os.getpid(), None, f"http://127.0.0.1:{server.server_port}/metrics").look(time.perf_counter())
        server.shutdown()
        thread.join()
    assert moment.service_bytes == 7e8


def test_a_remote_service_without_metrics_is_unknown() -> None:
    moment = Watch(os.getpid(), None, "http://127.0.0.1:1/metrics").look(time.perf_counter())
    assert all(map(math.isnan, (moment.service_cores, moment.service_bytes, moment.queue_s, moment.batches)))
