"""Turns the entries of a trace into arrivals, with the seconds that the planner predicts for a measured device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from service.config import Config
from service.core.model_info import ModelInfo
from service.core.options import AttentionOptions, EmbedOptions
from service.core.plan import Plan
from service.core.request import AttentionShape, ForwardRequest
from service.errors import FarsightError
from service.planning.attention_plan import plan_attention
from service.planning.device_profile import DeviceProfile
from service.planning.forward_plan import plan_forward
from service.simulate.cluster import Arrival
from service.simulate.traces import Entry

HEADS, HEAD_DIM = 8, 64


def arrivals(
    trace: Iterable[Entry], profile: DeviceProfile, models: Mapping[str, ModelInfo], config: Config
) -> Iterator[Arrival]:
    """The arrival of each entry, as the engine would queue it: refused if no plan fits the device.

    Raises ValueError if a model of the trace is not in `models`.
    """

    @lru_cache(100_000)
    def plan(model: str, tokens: int) -> Plan:
        if not model:
            shape = AttentionShape(1, HEADS, HEADS, tokens, tokens, HEAD_DIM, HEAD_DIM)
            return plan_attention(shape, AttentionOptions(is_causal=True), profile, config)
        if model not in models:
            raise ValueError(f"model: expected a configured model ({', '.join(models) or 'none'}), got {model!r}")
        request = ForwardRequest("", model, models[model].task, EmbedOptions(), token_ids=())
        return plan_forward(models[model], [(tokens, 0)], request, profile, config)

    for number, entry in enumerate(trace):
        try:
            chosen = plan(entry.model, entry.tokens)
        except FarsightError as error:
            yield Arrival(entry.at_s, 0.0, priority=entry.priority, tenant=entry.tenant, refused=error.kind)
            continue
        yield Arrival(
            entry.at_s,
            chosen.predicted_s,
            key=entry.model or number,  # attention requests of different lengths never share a batch
            shared_s=chosen.shared_s,
            priority=entry.priority,
            tenant=entry.tenant,
            peak_bytes=chosen.cost.peak_bytes,
        )
