"""A ledger with a fake clock, and rows for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.billing.ledger import LocalLedger
from service.billing.row import LedgerRow


class Clock:
    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def ledger_at(directory: Path, clock: Clock, keep_days: float = 30.0) -> LocalLedger:
    return LocalLedger(f"sqlite:///{directory}/ledger.sqlite", keep_days, clock)


def ledger_row(**given: Any) -> LedgerRow:
    """A request that took a second."""
    row: dict[str, Any] = {
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
        "cost_usd": 0.5,
        "charged_usd": 0.5,
        "saved_usd": 0.25,
        "predicted_s": 1.0,
        "total_s": 1.0,
    }
    return LedgerRow(**(row | given))


def row(*, number: int, journal: str = "j", **given: Any) -> dict[str, Any]:
    """The same with its key, as `Ledger.record` takes it."""
    return {"journal": journal, "number": number, **asdict(ledger_row(**given))}
