"""Requests into plans, and into estimates of what they would cost. Nothing runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from service.core.host_work import HostUse
from service.core.options import AttentionOptions, ForwardOptions
from service.core.plan import Plan, PlanKind
from service.core.request import AttentionRequest, AttentionShape, ForwardRequest, Request
from service.engine.job import PlannedRequest
from service.engine.workloads.attention import AttentionWorkload
from service.engine.workloads.base import Workload
from service.engine.workloads.forward import ForwardWorkload
from service.errors import FarsightError
from service.planning.correction import PredictionCorrector
from service.planning.planner import Candidates, corrected
from service.telemetry.request_record import Planned, RequestRecord

Admitted = tuple[float, FarsightError | None]  # predicted device seconds ahead, and why it would be refused
Choose = Callable[[Candidates, PredictionCorrector], Plan]
Options = AttentionOptions | ForwardOptions


@dataclass(frozen=True, slots=True)
class Estimate:
    """The price of a request under each plan. `queue_s` are predicted device seconds before it could start."""

    candidates: Candidates
    chosen: PlanKind | None
    reason: str
    queue_s: float
    would_admit: bool
    retry_after_s: float | None = None
    host: HostUse | None = None  # of reading the request, which its price contains; None: nothing was read


class Pricing:
    """Knows the workload of each kind of request, and what was learned of earlier predictions."""

    def __init__(self, attention: AttentionWorkload, forward: ForwardWorkload, clock: Callable[[], float]) -> None:
        self.attention, self.forward, self.clock, self.corrector = attention, forward, clock, PredictionCorrector()
        self.workloads: Mapping[type[Request], Workload[Any, Any]] = {
            AttentionRequest: attention,
            ForwardRequest: forward,
        }

    async def plan(
        self, request: Request, arrived_s: float, deadline_s: float, record: RequestRecord
    ) -> PlannedRequest:
        """Prepare, price and choose. Raises FarsightError. Times are on the engine's clock."""
        workload = self.workloads[type(request)]
        prepared = await workload.prepare(request, deadline_s, record)
        record.tokenized_s = prepared.tokenized_s
        work = workload.choose(prepared, await workload.price(prepared, record), self.corrector)
        now_s = self.clock()
        record.planned = Planned(work.plan, now_s)
        return PlannedRequest(workload, work, workload.label(request), arrived_s, now_s, deadline_s)

    async def estimate(
        self,
        request: Request,
        deadline_s: float,
        record: RequestRecord,
        admits: Callable[[Plan, Options, str], Admitted],
    ) -> Estimate:
        """The price of this request. Its inputs are tokenised; the device is not touched.

        `admits(plan, options, tenant)`: what admission would say now.
        """
        workload = self.workloads[type(request)]
        prepared = await workload.prepare(request, deadline_s, record)
        candidates = await workload.price(prepared, record, everything=True)

        def choose(candidates: Candidates, corrector: PredictionCorrector) -> Plan:
            return workload.choose(prepared, candidates, corrector).plan

        estimate = self._estimate(candidates, choose, lambda plan: admits(plan, request.options, request.tenant))
        return estimate if record.host is None else replace(estimate, host=record.host)

    def estimate_shape(
        self, shape: AttentionShape, options: AttentionOptions, admits: Callable[[Plan], Admitted]
    ) -> Estimate:
        """The price of an attention request of these sizes."""
        candidates = self.attention.price_shape(shape, options)
        return self._estimate(candidates, partial(self.attention.choose_shape, shape, options), admits)

    def _estimate(self, candidates: Candidates, choose: Choose, admits: Callable[[Plan], Admitted]) -> Estimate:
        shown = corrected(candidates, self.corrector)
        try:
            plan = choose(candidates, self.corrector)
        except FarsightError as error:
            return Estimate(shown, None, error.message, 0.0, would_admit=False)
        ahead_s, refusal = admits(plan)
        if refusal is not None:
            return Estimate(shown, plan.kind, refusal.message, ahead_s, False, refusal.retry_after_s)
        return Estimate(shown, plan.kind, plan.reason, ahead_s, would_admit=True)
