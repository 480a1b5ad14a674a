"""What a caller may set, by kind of request; the same on every transport."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Priority(StrEnum):
    """Interactive work goes before batch work; batch work ages and does not starve."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


# what a model is for; every text model also gives hidden states and explains itself
ModelTask = Literal["embed", "classify", "rerank", "score"]


Task = Literal["embed", "classify", "rerank", "score", "hidden", "explain"]


Truncate = Literal["error", "end", "chunk"]


Returned = Literal["output", "lse", "weights", "top_weights"]


Alignment = Literal["bottom_right", "top_left"]


ScoreStage = Literal["raw", "capped", "masked", "softmax"]


class AttentionOptions(BaseModel):
    """Everything of an attention request but its tensors; the same on every transport."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_causal: bool = Field(False, description="Query i sees keys up to its own position.")
    causal_alignment: Alignment | int = Field(
        "bottom_right",
        description="Where query 0 stands among the keys: `bottom_right` (the last query sees the last valid key), "
        "`top_left`, or an integer offset o (query i sees keys <= i + o). Windows are placed by the same rule.",
    )
    window: tuple[Annotated[int, Field(ge=-1)], Annotated[int, Field(ge=-1)]] | None = Field(
        None, description="[left, right] tokens around the query's position; -1 = unlimited."
    )
    kv_lengths: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="[B]: how many keys of each sequence are valid; the rest are never read."
    )
    scale: float | None = Field(None, gt=0, allow_inf_nan=False, description="Default 1/sqrt(head_dim).")
    softcap: float | None = Field(None, gt=0, allow_inf_nan=False, description="Scores become c*tanh(score/c).")
    mode: Literal["auto", "dense", "chunked", "sparse"] = Field(
        "auto", description="A forced mode never falls back silently: `error.fallback` says when it did."
    )
    max_error: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Largest relative L2 error of the output allowed (upper confidence limit of the audit); "
        "0 = exact only; default from the service's configuration.",
    )
    audit_rows: Literal[59, 459] | None = Field(
        None,
        description="Rows per head that the audit of a sparse answer computes exactly: 59 (95 % of rows at 95 % "
        "confidence) or 459 (99 % at 99 %); default from the service's configuration. Exact answers have no audit.",
    )
    returns: tuple[Returned, ...] = Field(("output",), min_length=1, description="What the answer carries.")
    rows: tuple[int, ...] | None = Field(None, description="Query rows of `weights` and `top_weights`; default all.")
    top_k: int = Field(10, ge=1, le=1024, description="Keys per row of `top_weights`.")
    stage: ScoreStage = Field(
        "softmax",
        description="What `weights` and `top_weights` are: `raw` (scale * q·k, natural units), `capped` (after "
        "`softcap`), `masked` (capped + float `attn_mask`, -inf where a query may not see the key) or `softmax`. `raw` "
        "and `capped` hide nothing but the keys past `kv_lengths`, which are never read: -inf. In nested JSON lists "
        "-inf is null. `top_weights` ranks by the same numbers; places without a key have index -1 and value -inf (0 "
        "for `softmax`).",
    )
    priority: Priority = Priority.INTERACTIVE
    timeout_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="The whole time the caller waits, in seconds."
    )


class ForwardOptions(BaseModel):
    """What every forward request may set; the same on every transport."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    truncate: Truncate = Field(
        "error",
        description="Inputs over the model's length: `error` refuses (413), `end` cuts and counts `dropped_tokens`, "
        "`chunk` (embeddings) embeds overlapping pieces and merges them weighted by their tokens.",
    )
    chunk_overlap: int = Field(32, ge=0, le=4096, description="Tokens that neighbouring chunks share.")
    mode: Literal["auto", "dense", "chunked", "sparse"] = Field(
        "auto", description="How the model's attention is computed. A forced sparse layer that had to go exact says so."
    )
    max_error: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Largest relative L2 error allowed of any layer's attention output (upper confidence limit of its "
        "audit); 0 = exact only; default from the service's configuration.",
    )
    layer_errors: bool = Field(False, description="Tell plan, density and error of every layer.")
    priority: Priority = Priority.INTERACTIVE
    timeout_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="The whole time the caller waits, in seconds."
    )


class EmbedOptions(ForwardOptions):
    """Of embeddings."""

    dimensions: int | None = Field(None, ge=1, description="Cut each embedding to its first numbers, then normalise.")


class ClassifyOptions(ForwardOptions):
    """Of classification and reranking."""

    raw_scores: bool = Field(False, description="The head's logits instead of probabilities.")


class ScoreOptions(ForwardOptions):
    """Of log-probabilities."""

    top_k: int = Field(0, ge=0, le=100, description="Most probable next tokens to tell at each of `positions`.")
    positions: tuple[int, ...] | None = Field(
        None,
        max_length=4096,
        description="Where `top_k` is told: after that token (negative: from the end); default the last.",
    )
    token_logprobs: bool = Field(True, description="Tell the log-probability of every token, not only their sum.")


class HiddenOptions(ForwardOptions):
    """Of hidden states."""

    layer: int = Field(-1, description="0 = embeddings, k = after layer k; negative from the end.")


class ExplainOptions(ForwardOptions):
    """Of explanations."""

    top_k: int = Field(5, ge=1, le=100, description="Tokens told for each layer, head and average.")
    layers: tuple[int, ...] | None = Field(None, max_length=256, description="Layers told head by head; default all.")
    rollout: bool = Field(
        False, description="Attention followed through all layers, residual connections counted (n^2 work per layer)."
    )
