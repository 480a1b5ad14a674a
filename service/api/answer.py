"""Answers and estimates as headers (or gRPC parameters) and as JSON documents, without tensors."""

from __future__ import annotations

from typing import Any

from service.core.answer import Answer, cost_usd, error_fields, usage_fields
from service.core.plan import Plan
from service.engine.pricing import Estimate


def headers(answer: Answer) -> dict[str, str]:
    """The `x-` headers of an answer; over gRPC they are response parameters of the same names."""
    usage, error = answer.usage, answer.error
    energy = {} if usage.joules is None else {"x-energy-joules": f"{usage.joules:.6f}"}
    return {
        "x-request-id": answer.id,
        "x-attention-plan": answer.plan.kind.value,
        "x-attention-error": "exact" if error.kind == "exact" else f"{error.relative_l2_upper:.3e}",
        "x-queue-seconds": f"{answer.timing.queue_s:.6f}",
        "x-device-seconds": f"{usage.device_s:.6f}",
        "x-host-seconds": f"{usage.host_s:.6f}",
        "x-compute-tokens": str(usage.tokens),
        "x-compute-flops": str(usage.flops),
        "x-cost-usd": f"{usage.cost_usd:.3e}",
        **energy,
    }


def document(answer: Answer) -> dict[str, Any]:
    """`plan`, `error`, `usage`, `cost` and `timing` of the answer, as the wire contract names them."""
    error = error_fields(answer.error)
    if answer.layers:
        error["layers"] = _layers_document(answer)
    return {
        "id": answer.id,
        "plan": _plan_document(answer.plan, answer.density),
        "error": error,
        "usage": _usage_document(answer),
        "cost": {"usd": answer.usage.cost_usd, "saved_usd": answer.usage.saved_usd},
        "timing": {
            "queue_s": answer.timing.queue_s,
            "device_s": answer.timing.device_s,
            "paused_s": answer.timing.paused_s,
            "total_s": answer.timing.total_s,
        },
    }


def _plan_document(plan: Plan, density: float | None) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": plan.kind.value, "reason": plan.reason, "predicted_s": plan.predicted_s}
    if plan.kind == "sparse":
        document |= {
            "block_size": plan.block_size,
            "density": density,
            "selection": plan.selection,
            "epsilon": plan.epsilon,
        }
    return document


def _layers_document(answer: Answer) -> dict[str, Any]:
    """Attention calls of a forward pass with a sparse plan: how many were sparse, and the limits of their errors."""
    upper = [layer.error.relative_l2_upper for layer in answer.layers if layer.density is not None]
    document: dict[str, Any] = {"calls": len(answer.layers), "sparse": len(upper)}
    if upper:
        document |= {"max_relative_l2_upper": max(upper), "mean_relative_l2_upper": sum(upper) / len(upper)}
    if answer.shows_layers:
        document["each"] = [
            {
                "plan": layer.kind.value,
                "density": layer.density,
                "relative_l2": layer.error.relative_l2,
                "relative_l2_upper": layer.error.relative_l2_upper,
                "fallback": layer.error.fallback,
            }
            for layer in answer.layers
        ]
    return document


def _usage_document(answer: Answer) -> dict[str, int | float]:
    """Usage without its prices, which are under `cost`; `batch_requests` stands where clients know it."""
    document: dict[str, int | float] = {}
    for name, value in usage_fields(answer.usage).items():
        if name not in ("cost_usd", "saved_usd"):
            document[name] = value
        if name == "peak_bytes":
            document["batch_requests"] = answer.batch_requests
    return document


def estimate_document(estimate: Estimate, hour_usd: float) -> dict[str, Any]:
    """Every plan with its price, the chosen one, and whether it would be admitted now."""
    host_usd = 0.0 if estimate.host is None else estimate.host.usd
    plans = {
        kind.value: {
            "flops": _within_json(candidate.cost.flops),
            "bytes": _within_json(candidate.cost.bytes),
            "peak_bytes": _within_json(candidate.cost.peak_bytes),
            "predicted_s": candidate.predicted_s,
            "cost_usd": cost_usd(candidate.predicted_s, hour_usd) + host_usd,
            "fits": candidate.fits,
            "reason": candidate.reason,
        }
        for kind, candidate in estimate.candidates.items()
    }
    chosen = {"kind": estimate.chosen.value if estimate.chosen else None, "reason": estimate.reason}
    admits: dict[str, bool | float] = {"would_admit": estimate.would_admit}
    if estimate.retry_after_s is not None:
        admits["retry_after_s"] = estimate.retry_after_s
    host_s = 0.0 if estimate.host is None else estimate.host.seconds
    return {**plans, "chosen": chosen, "host_s": host_s, "queue_s": estimate.queue_s, **admits}


def _within_json(count: int) -> int | float:
    """A float beyond 63 bits, where orjson stops; only estimates of absurd sizes are that large."""
    return count if count < 2**63 else float(count)
