"""One Answer, as headers (or gRPC parameters) and as a JSON document without its tensors."""

from __future__ import annotations

from typing import Any

from service.core.answer import Answer, cost_usd
from service.core.plan import Plan
from service.engine.engine import Estimate


def headers(answer: Answer) -> dict[str, str]:
    """The `x-` headers of every answer; over gRPC the same names are response parameters."""
    usage, error = answer.usage, answer.error
    measured = {} if usage.joules is None else {"x-energy-joules": f"{usage.joules:.6f}"}
    return {
        "x-request-id": answer.id,
        "x-attention-plan": answer.plan.kind.value,
        "x-attention-error": "exact" if error.kind == "exact" else f"{error.relative_l2_upper:.3e}",
        "x-queue-seconds": f"{answer.timing.queue_s:.6f}",
        "x-device-seconds": f"{usage.device_s:.6f}",
        "x-compute-tokens": str(usage.tokens),
        "x-compute-flops": str(usage.flops),
        "x-cost-usd": f"{usage.cost_usd:.3e}",
        **measured,
    }


def plan_document(plan: Plan, density: float | None = None) -> dict[str, Any]:
    document: dict[str, Any] = {"kind": plan.kind.value, "reason": plan.reason, "predicted_s": plan.predicted_s}
    if plan.kind == "sparse":
        document |= {
            "block_size": plan.block_size,
            "density": density,
            "selection": plan.selection,
            "epsilon": plan.epsilon,
        }
    return document


def layers_document(answer: Answer) -> dict[str, Any]:
    """Attention calls of a forward pass with a sparse plan: how many were sparse, and their errors' limits."""
    sparse = [layer.error.relative_l2_upper for layer in answer.layers if layer.density is not None]
    told: dict[str, Any] = {"calls": len(answer.layers), "sparse": len(sparse)}
    if sparse:
        told |= {"max_relative_l2_upper": max(sparse), "mean_relative_l2_upper": sum(sparse) / len(sparse)}
    if answer.tells_layers:
        told["each"] = [
            {
                "plan": layer.kind.value,
                "density": layer.density,
                "relative_l2": layer.error.relative_l2,
                "relative_l2_upper": layer.error.relative_l2_upper,
                "fallback": layer.error.fallback,
            }
            for layer in answer.layers
        ]
    return told


def document(answer: Answer) -> dict[str, Any]:
    """`plan`, `error`, `usage`, `cost` and `timing` of the answer, as the wire contract names them."""
    usage, error = answer.usage, answer.error
    error_document: dict[str, Any] = {"kind": error.kind, "fallback": error.fallback}
    if error.kind != "exact":
        error_document |= {
            "relative_l2": error.relative_l2,
            "relative_l2_upper": error.relative_l2_upper,
            "row_bound": error.row_bound,
            "rows": error.rows,
            "coverage": error.coverage,
            "confidence": error.confidence,
            "riskiest_row": error.riskiest_row,
            "recall": error.recall,
            "lse_error": error.lse_error,
        }
    for name in ("certified_unread", "rejected_relative_l2_upper"):
        if (told := getattr(error, name)) is not None:
            error_document[name] = told
    if answer.layers:
        error_document["layers"] = layers_document(answer)
    usage_document: dict[str, Any] = {"chunks": usage.chunks} if usage.chunks else {}
    for name in ("joules", "carbon_g"):
        if (measured := getattr(usage, name)) is not None:
            usage_document[name] = measured
    return {
        "id": answer.id,
        "plan": plan_document(answer.plan, answer.density),
        "error": error_document,
        "usage": {
            "tokens": usage.tokens,
            "pairs_scored": usage.pairs_scored,
            "pairs_dense": usage.pairs_dense,
            "flops": usage.flops,
            "flops_dense": usage.flops_dense,
            "device_s": usage.device_s,
            "peak_bytes": usage.peak_bytes,
            "batch_requests": answer.batch_requests,
            "truncated": usage.truncated,
            "dropped_tokens": usage.dropped_tokens,
            **usage_document,
        },
        "cost": {"usd": usage.cost_usd, "saved_usd": usage.saved_usd},
        "timing": {
            "queue_s": answer.timing.queue_s,
            "device_s": answer.timing.device_s,
            "paused_s": answer.timing.paused_s,
            "total_s": answer.timing.total_s,
        },
    }


def estimate_document(estimate: Estimate, hour_usd: float) -> dict[str, Any]:
    """Every plan with its price, which one is chosen, and whether it would be admitted now."""
    plans = {
        kind.value: {
            "flops": _within_json(candidate.cost.flops),
            "bytes": _within_json(candidate.cost.bytes),
            "peak_bytes": _within_json(candidate.cost.peak_bytes),
            "predicted_s": candidate.predicted_s,
            "cost_usd": cost_usd(candidate.predicted_s, hour_usd),
            "fits": candidate.fits,
            "reason": candidate.reason,
        }
        for kind, candidate in estimate.candidates.items()
    }
    chosen = {"kind": estimate.chosen.value if estimate.chosen else None, "reason": estimate.reason}
    admits: dict[str, bool | float] = {"would_admit": estimate.would_admit}
    if estimate.retry_after_s is not None:
        admits["retry_after_s"] = estimate.retry_after_s
    return {**plans, "chosen": chosen, "queue_s": estimate.queue_s, **admits}


def _within_json(count: int) -> int | float:
    """JSON encoders stop at 64 bits; what is beyond is an estimate of the absurd, and a float will do."""
    return count if count < 2**63 else float(count)
