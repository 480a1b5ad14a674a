"""Replicas, budget leases, write-ahead logs and the ledger as a state machine that crashes at any point."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry

from service.billing import tables, write_ahead_log
from service.billing.ledger import LeaseGrant, LedgerError, LocalLedger
from service.billing.metering import Accepted, UsageMeter
from service.billing.tenants import Tenants
from service.billing.write_ahead_log import recover
from service.config import Budget, Config, TenantConfig
from service.core.plan import Cost, Plan, PlanKind
from service.errors import FarsightError
from service.telemetry.metrics import Metrics
from tests.billing.common import Clock

BUDGET = Budget(device_s=20, per="day")  # a few requests
TENANT = TenantConfig(name="a", budgets=(BUDGET,))
CONFIG = Config(tenants=(TENANT,), lease_share=0.2)
METRICS = Metrics(CollectorRegistry())

replicas = st.integers(0, 1)
predictions_s = st.sampled_from([0.5, 2.0, 6.0])
used_shares = st.sampled_from([None, 0.2, 1.0])  # of the prediction; None: still running


class FailingLedger(LocalLedger):
    """The next call of `fails[0]` raises, "before" or "after" the database changes: then only the answer is lost."""

    fails: tuple[str, str] = "", ""
    returned_twice_s = 0.0  # given back, and kept by a replica that got no answer

    @contextmanager
    def _failing(self, call: str) -> Iterator[None]:
        when = self.fails[1] if self.fails[0] == call else ""
        if when:
            self.fails = "", ""
        if when == "before":
            raise LedgerError("no connection")
        yield
        if when == "after":
            raise LedgerError("no answer")

    def lease(self, tenant: str, budget: Budget, least: float, most: float) -> LeaseGrant:
        with self._failing("lease"):
            return super().lease(tenant, budget, least, most)

    def give_back(self, tenant: str, budget: Budget, amount: float) -> None:
        if self.fails == ("give_back", "after"):
            self.returned_twice_s += max(0.0, amount)
        with self._failing("give_back"):
            super().give_back(tenant, budget, amount)

    def record(self, requests: Sequence[Mapping[str, Any]], capacity: Sequence[Mapping[str, Any]]) -> None:
        with self._failing("record"):
            super().record(requests, capacity)


class Crashes(RuleBasedStateMachine):
    """Two replicas share a budget. Every accepted request is recorded exactly once, and the budget is not overspent,
    except by what was given back twice because an answer was lost."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(write_ahead_log, "SEGMENT_BYTES", 4096)  # a few lines
        self.config = CONFIG.model_copy(update={"state_dir": Path(tempfile.mkdtemp())})
        self.clock = Clock()
        self.begin_s = self.clock.now_s
        self.loop = asyncio.new_event_loop()
        self.ledger = FailingLedger(self.config.ledger, clock=self.clock)
        self.meters = [self._start(), self._start()]
        self.running: list[list[Accepted]] = [[], []]  # by replica
        self.outcomes: dict[str, str] = {}  # expected in the ledger, by request id
        self.spent_s = 0.0

    @rule(replica=replicas, requests=st.lists(st.tuples(predictions_s, used_shares), min_size=1, max_size=8))
    def serve(self, replica: int, requests: list[tuple[float, float | None]]) -> None:
        for predicted_s, used_share in requests:
            plan = Plan(PlanKind.DENSE, Cost(0, 0, 0, 0), predicted_s, "")
            request_id = f"r{len(self.outcomes)}"
            accept = self.meters[replica].accept(TENANT, request_id, "attention", "attention", plan)
            try:
                accepted = self.loop.run_until_complete(accept)
            except FarsightError:  # over budget, or the ledger is unavailable
                continue
            self.outcomes[request_id] = "lost"  # unless it is settled
            if used_share is None:
                self.running[replica].append(accepted)
            else:
                self._settle(replica, accepted, used_share)

    @rule(replica=replicas, used_share=st.sampled_from([0.0, 1.0]))
    def settle(self, replica: int, used_share: float) -> None:
        while self.running[replica]:
            self._settle(replica, self.running[replica].pop(), used_share)

    @rule(replica=replicas, seconds=st.sampled_from([1, 31]))
    def tick(self, replica: int, seconds: int) -> None:
        """Ship the log and rebalance the leases; a new replica also recovers the logs of dead ones."""
        self.clock.now_s += seconds
        self.meters[replica].tick()

    @rule(replica=replicas, is_writing=st.booleans())
    def crash(self, replica: int, is_writing: bool) -> None:
        log = self.meters[replica]._log
        os.close(log._lock)  # as the kernel does when the process dies
        if is_writing:  # half of a line
            path = max(self.config.write_ahead_dir.glob(f"{log.id}-*.jsonl"))
            size = len(path.read_bytes().rstrip(b"\0"))
            with path.open("r+b") as file:
                file.seek(size)
                file.write(b'["a",1000,{"at_s":1')
        self._replace(replica)

    @rule(replica=replicas)
    def stop(self, replica: int) -> None:
        """A graceful stop, which fails like a crash if the ledger does."""
        meter = self.meters[replica]
        try:
            meter.close()
        except LedgerError:
            if meter._log._lock is not None:  # leases were not given back, and all else is done
                os.close(meter._log._lock)
        self._replace(replica)

    @rule(call=st.sampled_from(["lease", "give_back", "record"]), when=st.sampled_from(["before", "after"]))
    def fail(self, call: str, when: str) -> None:
        self.ledger.fails = call, when

    @rule()
    def recover(self) -> None:
        with suppress(LedgerError):
            recover(self.config.write_ahead_dir, self.ledger)

    @invariant()
    def accepted_requests_are_in_the_ledger_or_a_log(self) -> None:
        recorded = self._recorded()
        known, settled = set(recorded), _settled(recorded)
        for kind, request_id in self._lines():
            known.add(request_id)
            if kind == "s":
                settled.add(request_id)
        assert known == set(self.outcomes)
        assert settled == _settled(self.outcomes)

    @invariant()
    def the_budget_is_not_overspent(self) -> None:
        refilled_s = (self.clock.now_s - self.begin_s) * BUDGET.amount / BUDGET.period_s
        assert self.spent_s <= BUDGET.capacity + refilled_s + self.ledger.returned_twice_s + 1e-6

    def teardown(self) -> None:
        try:
            self.ledger.fails = "", ""
            for meter in self.meters:
                meter.close()
            recover(self.config.write_ahead_dir, self.ledger)
            assert self._recorded() == self.outcomes
            assert not list(self.config.write_ahead_dir.iterdir())
        finally:
            self.patch.undo()
            self.ledger.close()
            self.loop.close()
            shutil.rmtree(self.config.state_dir)

    def _start(self) -> UsageMeter:
        clocks = {"clock": self.clock, "lease_clock": self.clock}
        return UsageMeter(self.config, Tenants(self.config), self.ledger, METRICS, hour_usd=0.1, **clocks)

    def _replace(self, replica: int) -> None:
        self.meters[replica] = self._start()
        self.running[replica] = []

    def _settle(self, replica: int, accepted: Accepted, used_share: float) -> None:
        row = accepted.row
        used_s = row.predicted_s * used_share
        self.meters[replica].settle(accepted, None, {"device_s": used_s, "cost_usd": row.cost_usd})
        self.outcomes[row.request_id] = "ok"
        self.spent_s += used_s

    def _recorded(self) -> dict[str, str]:
        """Outcomes in the ledger by request id."""
        with self.ledger._transaction(is_read_only=True) as connection:
            query = sa.select(tables.requests.c.request_id, tables.requests.c.outcome)
            rows = [(row.request_id, row.outcome) for row in connection.execute(query)]
        assert len(dict(rows)) == len(rows)
        return dict(rows)

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Kind and request id of the complete lines in all logs."""
        for path in self.config.write_ahead_dir.glob("*.jsonl"):
            for line in path.read_bytes().rstrip(b"\0").splitlines():
                with suppress(orjson.JSONDecodeError):
                    kind, _, row = orjson.loads(line)
                    if kind != "c":
                        yield kind, row["request_id"]


def _settled(outcomes: Mapping[str, str]) -> set[str]:
    return {request_id for request_id, outcome in outcomes.items() if outcome == "ok"}


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
