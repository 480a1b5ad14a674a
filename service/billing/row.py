"""Rows of the ledger: one for each accepted request, one for each stretch of device time. No database here.

Their fields are the columns: the tables are derived from these classes, and a line of the write-ahead log is the JSON
of a row. A renamed field is therefore a migration.
"""

from __future__ import annotations

from dataclasses import dataclass

OUTCOME_OK = "ok"
OUTCOME_PRICED = "priced"  # read for its price, and not run
OUTCOME_LOST = "lost"  # accepted, and its replica died before it was settled


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """A request from acceptance to settlement. The defaults hold until it is settled.

    A request that was refused or only priced has a row if reading it took host work.
    """

    at_s: float  # seconds since 1970, when it was accepted
    request_id: str
    tenant: str
    endpoint: str
    model: str
    plan: str
    outcome: str = OUTCOME_LOST  # "ok", a kind of error, or "lost"
    tokens: int = 0
    flops: float = 0.0
    flops_dense: float = 0.0
    device_s: float = 0.0
    host_s: float = 0.0  # of one core: reading the request
    joules: float | None = None  # None: not measured
    host_usd: float = 0.0
    cost_usd: float = 0.0  # of the device time used, and of host_usd
    charged_usd: float = 0.0  # to the budget: zero if the service failed
    saved_usd: float = 0.0
    predicted_s: float
    queue_s: float = 0.0
    total_s: float = 0.0
    error_upper: float | None = None  # upper bound of the relative L2 error; None: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityRow:
    """What a device did in a stretch of time: used and idle add up to the time that was paid for."""

    at_s: float  # seconds since 1970, end of the stretch
    used_s: float
    idle_s: float
    usd: float  # at the configured price, for used and idle time
