"""Options of a request, by kind of request; the same on every transport."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Priority(StrEnum):
    """Interactive work runs before batch work, which ages and does not starve."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


# every text model also serves `hidden` and `explain`
ModelTask = Literal["embed", "classify", "rerank", "score"]
Task = Literal["embed", "classify", "rerank", "score", "hidden", "explain"]
Truncate = Literal["error", "end", "chunk"]
Returned = Literal["output", "lse", "weights", "top_weights", "certificate", "block_map"]
Alignment = Literal["bottom_right", "top_left"]
ScoreStage = Literal["raw", "capped", "masked", "softmax"]


class AttentionOptions(BaseModel):
    """Options of an attention request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_causal: bool = Field(False, description="Each query attends only to keys up to its own position.")
    causal_alignment: Alignment | int = Field(
        "bottom_right",
        description="Position of query 0 among the keys: `bottom_right` (the last query is at the last valid key), "
        "`top_left` (query 0 is at key 0), or an integer offset o (query i attends to keys <= i + o). Windows follow "
        "the same positions.",
    )
    window: tuple[Annotated[int, Field(ge=-1)], Annotated[int, Field(ge=-1)]] | None = Field(
        None, description="[left, right]: keys attended to on each side of the query's position; -1 = unlimited."
    )
    kv_lengths: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="[B]: number of valid keys of each sequence; the rest are never read."
    )
    scale: float | None = Field(None, gt=0, allow_inf_nan=False, description="Softmax scale; default 1/sqrt(head_dim).")
    softcap: float | None = Field(None, gt=0, allow_inf_nan=False, description="Caps scores to c*tanh(score/c).")
    mode: Literal["auto", "dense", "chunked", "sparse"] = Field(
        "auto",
        description="How attention is computed: `auto` chooses the fastest plan within memory and `max_error`. A "
        "forced mode never falls back silently: `error.fallback` reports it.",
    )
    max_error: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Largest allowed relative L2 error of the output (upper confidence limit of the audit); "
        "0 = exact only; default from the service's configuration.",
    )
    audit_rows: Literal[59, 459] | None = Field(
        None,
        description="Rows per head that the audit of a sparse answer computes exactly: 59 (95% of rows at 95% "
        "confidence) or 459 (99% at 99%); default from the service's configuration. Exact answers have no audit.",
    )
    returns: tuple[Returned, ...] = Field(
        ("output",),
        min_length=1,
        description="What the answer contains. `certificate` adds `error.certified_unread` to a sparse answer: the "
        "largest share of softmax mass that any row left unread, if it is proven to be less than half. `block_map` is "
        "[B, Hq, r, c] uint8, at most 256 tiles a side, each of 128 tokens or a power of two more: 0 where no key is "
        "seen, else 1 + 254 * the share of the tile's pairs that were scored; the others were estimated.",
    )
    rows: tuple[int, ...] | None = Field(None, description="Query rows of `weights` and `top_weights`; default all.")
    top_k: int = Field(10, ge=1, le=1024, description="Keys per row of `top_weights`.")
    stage: ScoreStage = Field(
        "softmax",
        description="Stage of the scores in `weights` and `top_weights`: `raw` (scale * q·k, natural units), `capped` "
        "(after `softcap`), `masked` (capped + float `attn_mask`, -inf for masked keys) or `softmax`. `raw` and "
        "`capped` are unmasked, except for keys past `kv_lengths`, which are never read: -inf. In nested JSON lists "
        "-inf is null. `top_weights` ranks by the same numbers; entries without a key have index -1 and value -inf (0 "
        "for `softmax`).",
    )
    priority: Priority = Priority.INTERACTIVE
    timeout_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Time limit of the whole request, in seconds."
    )


class ForwardOptions(BaseModel):
    """Options of every forward request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    truncate: Truncate = Field(
        "error",
        description="Inputs over the model's length: `error` refuses them (413), `end` cuts them and counts "
        "`dropped_tokens`, `chunk` (embeddings only) embeds overlapping chunks and averages them, weighted by tokens. "
        "Audio is cut into windows of 30 s.",
    )
    chunk_overlap: int = Field(
        32,
        ge=0,
        le=4096,
        description="Tokens shared by neighbouring chunks of a text; windows of audio do not overlap.",
    )
    mode: Literal["auto", "dense", "chunked", "sparse"] = Field(
        "auto",
        description="How the model's attention is computed. `error.fallback` reports sparse layers that had to be "
        "computed exactly.",
    )
    max_error: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Largest allowed relative L2 error of the model's last hidden state: the upper limit that follows "
        "from the audits of its attention layers and from how far their errors reach, as measured at load (for models "
        "without that measurement: of any layer's attention output). 0 = exact only; default from the service's "
        "configuration.",
    )
    layer_errors: bool = Field(False, description="Report plan, density and error of every layer.")
    priority: Priority = Priority.INTERACTIVE
    timeout_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Time limit of the whole request, in seconds."
    )


class EmbedOptions(ForwardOptions):
    """Options of embeddings."""

    dimensions: int | None = Field(
        None, ge=1, description="Cut each embedding to its first `dimensions` numbers, then normalise it."
    )
    prompt_name: str | None = Field(
        None,
        description="The model's prompt that is put before every text, by its name (`GET /v1/models` lists them); "
        "default: the model's own default, if it has one.",
    )
    input_type: Literal["query", "document"] | None = Field(
        None,
        description="The model's prompt for queries or for documents (`document`, `passage` or `corpus`), by kind "
        "instead of by name; none if the model has no such prompt.",
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> EmbedOptions:
        if self.prompt_name is not None and self.input_type is not None:
            raise ValueError("expected at most one of prompt_name and input_type")
        return self


class ClassifyOptions(ForwardOptions):
    """Options of classification and reranking."""

    raw_scores: bool = Field(False, description="Return the head's logits instead of probabilities.")


class ScoreOptions(ForwardOptions):
    """Options of log-probabilities."""

    top_k: int = Field(0, ge=0, le=100, description="Most probable next tokens to return at each of `positions`.")
    positions: tuple[int, ...] | None = Field(
        None,
        max_length=4096,
        description="Tokens after which `top_k` is returned (negative: from the end); default the last.",
    )
    token_logprobs: bool = Field(True, description="Return the log-probability of every token, not only the sum.")


class HiddenOptions(ForwardOptions):
    """Options of hidden states."""

    layer: int = Field(-1, description="0 = embeddings, k = output of layer k; negative from the end.")


class ExplainOptions(ForwardOptions):
    """Options of explanations."""

    top_k: int = Field(5, ge=1, le=100, description="Tokens returned for each layer, each head and the average.")
    layers: tuple[int, ...] | None = Field(
        None, max_length=256, description="Layers to return head by head; default all."
    )
    rollout: bool = Field(
        False,
        description="Attention rollout through all layers, residual connections included (n^2 work per layer).",
    )
    block_map: bool = Field(
        False,
        description="For each returned layer and head, where its attention reads: at most 64 x 64 tiles, one byte "
        "each, in base64, coded like `block_map` of `/v1/attention`. Of interest with `mode` sparse.",
    )
