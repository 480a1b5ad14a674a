"""Traces to arrivals with predicted seconds, by the planner and the measured speed of a device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from service.config import Config
from service.core.model_info import ModelInfo
from service.core.options import AttentionOptions, EmbedOptions
from service.core.plan import Plan
from service.core.request import AttentionShape, ForwardRequest
from service.errors import FarsightError
from service.planning import forward_plan, planner
from service.planning.device_profile import DeviceProfile
from service.simulate.cluster import Arrival
from service.simulate.traces import Entry

HEADS, HEAD_DIM = 8, 64


def arrivals(
    trace: Iterable[Entry], profile: DeviceProfile, models: Mapping[str, ModelInfo], config: Config
) -> Iterator[Arrival]:
    """Every entry as the engine would queue it. Raises ValueError for a model that is not there."""

    @lru_cache(100_000)
    def plan(model: str, tokens: int) -> Plan:
        if not model:
            shape = AttentionShape(1, HEADS, HEADS, tokens, tokens, HEAD_DIM, HEAD_DIM)
            return planner.plan_attention(shape, AttentionOptions(is_causal=True), profile, config)
        if model not in models:
            raise ValueError(
                f"model {model!r} of the trace is not configured; there are: {', '.join(models) or 'none'}"
            )
        request = ForwardRequest("", model, models[model].task, EmbedOptions(), token_ids=())
        return forward_plan.plan_forward(models[model], [(tokens, 0)], request, profile, config)

    for number, one in enumerate(trace):
        try:
            chosen = plan(one.model, one.tokens)
        except FarsightError as error:
            yield Arrival(one.at_s, 0.0, priority=one.priority, tenant=one.tenant, refused=error.kind)
            continue
        yield Arrival(
            one.at_s,
            chosen.predicted_s,
            key=one.model or number,  # attention requests of different lengths share no batch
            shared_s=chosen.shared_s,
            priority=one.priority,
            tenant=one.tenant,
            peak_bytes=chosen.cost.peak_bytes,
        )
