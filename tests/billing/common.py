"""A bank with a clock that is turned by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.billing.ledger import LocalLedger


class Clock:
    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def bank_at(directory: Path, clock: Clock, keep_days: float = 30.0) -> LocalLedger:
    return LocalLedger(f"sqlite:///{directory}/ledger.sqlite", keep_days, clock)


def row(**given: Any) -> dict[str, Any]:
    """Of the ledger: a request that took a second."""
    return {
        "at_s": 1_000_000.0,
        "request_id": "r",
        "tenant": "a",
        "endpoint": "attention",
        "model": "attention",
        "plan": "dense",
        "outcome": "ok",
        "tokens": 10,
        "flops": 100.0,
        "flops_dense": 200.0,
        "device_s": 1.0,
        "joules": None,
        "cost_usd": 0.5,
        "charged_usd": 0.5,
        "saved_usd": 0.25,
        "predicted_s": 1.0,
        "queue_s": 0.0,
        "total_s": 1.0,
        "error_upper": None,
        **given,
    }
