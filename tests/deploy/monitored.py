"""A replica's worth of metrics on a port: `python -m tests.deploy.monitored <folder> <port>`, until its input ends.

The real engine answers requests of all plans, wrong ones and sparse passes that are audited. What it tells only when
the device is idle, the queue full or money is involved is reported here directly, through the same methods.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from dataclasses import replace
from pathlib import Path

from service.telemetry.metric_files import share_files


async def main(directory: Path, port: int, ended: threading.Event) -> None:
    from service.config import Config, TenantConfig
    from service.engine.engine import Engine
    from service.errors import FarsightError, Kind
    from service.telemetry.exporter import Exporter
    from service.telemetry.metrics import Metrics
    from tests.conftest import MINILM
    from tests.engine.test_engine import attention, embed

    metrics = Metrics()
    own = {"output_audit_share": 1.0, "sparse_min_tokens": 256}  # the model is short, and its errors are followed
    config = Config(models=(MINILM,), cpu_threads=1, tenants=(TenantConfig(name="acme"),), **own)
    engine = Engine.start(config, metrics)
    exporter = Exporter("127.0.0.1", port, directory)
    sparse = {"mode": "sparse", "is_causal": True}
    requests = [
        replace(attention(64), tenant="acme"),
        attention(1024, heads=4, **sparse),
        attention(1024, heads=4, max_error=1e-9, **sparse),  # ends exact
        attention(600, mode="chunked"),
        embed("a short text", "and a second one"),
        embed("many words " * 100, mode="sparse", max_error=1.0),
        replace(embed("of a model that is not there"), model="none"),
    ]
    while not ended.is_set():
        for request in requests:
            try:
                await engine.submit(request)
            except FarsightError as error:
                if error.kind is not Kind.NOT_FOUND:
                    raise
        metrics.refused("attention", Kind.OVERLOADED)
        metrics.idle(0.1)
        metrics.allocated(0.0001)
        metrics.budget_used("acme", "month", 0.4)
        metrics.budget_refused("acme")
        metrics.ledger_pending.set(2)
        await asyncio.sleep(0.2)
    exporter.stop()
    engine.close()


if __name__ == "__main__":
    share_files(Path(sys.argv[1]))  # before the first metric is made
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), ended))
