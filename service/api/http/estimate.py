"""`POST /v1/estimate`: what a request would cost."""

from __future__ import annotations

from service.api.schema import ShapeBody, validated
from service.core.options import AttentionOptions
from service.core.request import AttentionShape
from service.errors import invalid


def shape_of(body: ShapeBody) -> tuple[AttentionShape, AttentionOptions]:
    kv_heads = body.kv_heads or body.heads
    if body.heads % kv_heads:
        raise invalid(f"heads: expected a multiple of kv_heads {kv_heads}, got {body.heads}", param="heads")
    shape = AttentionShape(
        batch=body.batch,
        heads=body.heads,
        kv_heads=kv_heads,
        query_length=body.query_length,
        key_length=body.key_length or body.query_length,
        head_dim=body.head_dim,
        value_dim=body.value_dim or body.head_dim,
        dtype=body.dtype,
    )
    options = body.model_dump(include={"is_causal", "window", "mode", "max_error"})
    return shape, validated(AttentionOptions, options)
