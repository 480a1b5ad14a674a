"""The values that travel. Each stage adds a new frozen one: AttentionRequest -> Plan -> Answer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

LOGITS_BYTES = 64 * 1024**2  # of one block of next-token logits


class PlanKind(StrEnum):
    """How attention is computed."""

    DENSE = "dense"
    CHUNKED = "chunked"
    SPARSE = "sparse"


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
Side = Literal["source", "target"]
Stage = Literal["raw", "capped", "masked", "softmax"]


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
    stage: Stage = Field(
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


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], validated and finite, on the CPU."""

    id: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: AttentionOptions
    attn_mask: torch.Tensor | None = None
    rank: int = 4  # 3: the caller left the batch axis out, and gets its answer without it
    tenant: str = "default"

    @property
    def shape(self) -> AttentionShape:
        """Made anew at each call; callers keep it."""
        batch, heads, query_length, head_dim = self.query.shape
        return AttentionShape(
            batch=batch,
            heads=heads,
            kv_heads=self.key.shape[1],
            query_length=query_length,
            key_length=self.key.shape[2],
            head_dim=head_dim,
            value_dim=self.value.shape[3],
            dtype=str(self.query.dtype).removeprefix("torch."),
        )


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The sizes that decide what attention costs."""

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    dtype: str = "float32"


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


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """Inputs for one task of one model: texts, token ids, pairs of texts (query and document, or source and target),
    or encoded images."""

    id: str
    model: str
    task: Task
    options: ForwardOptions
    texts: tuple[str, ...] = ()
    token_ids: tuple[tuple[int, ...], ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    images: tuple[bytes, ...] = ()
    pixel_values: torch.Tensor | None = None  # [n, C, H, W] float32: images as the model takes them
    query: int | str | None = None  # explain: the token that looks, by index or as a part of the text
    tenant: str = "default"


Request = AttentionRequest | ForwardRequest


@dataclass(frozen=True, slots=True)
class Work:
    """What a computation costs in closed form, before any device is named."""

    pairs: int  # query-key pairs scored, causal counted as causal, summed over heads
    flops: int
    bytes: int  # read and written once each
    peak_bytes: int  # inputs + output + scratch alive together


@dataclass(frozen=True, slots=True)
class Plan:
    """Decided before the queue: how a request will be computed, what that costs, and why."""

    kind: PlanKind
    work: Work
    predicted_s: float
    reason: str
    block_size: int = 128  # tokens per key block
    selection: str | None = None  # how sparse blocks are chosen
    epsilon: float | None = None  # risk that a row may leave in a block that is not read
    shared_s: float = 0.0  # the part of predicted_s that a batch pays once
    path: tuple[Hashable, ...] = ()  # the kind of work, from the general to the special
    pace: float = 1.0  # learned of that kind, and contained in both seconds


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """How far an output may be from the exact one, and how that is known.

    `relative_l2` = sqrt(sum ||o - o'||^2 / sum ||o||^2) over `rows` rows drawn after selection; `relative_l2_upper`
    is its one-sided upper confidence limit. At least `coverage` of all rows err by `row_bound` or less, with
    `confidence`. `riskiest_row` is the largest error among rows that the selector itself rated worst. `recall` is
    the mean share of softmax mass that was read; moments stand for the rest. `lse_error` is the root mean square
    error of the log-sum-exp, in nats, over the same rows. `fallback`: a sparse answer was over the
    bound and this exact one replaced it.
    """

    kind: Literal["exact", "measured"] = "exact"
    relative_l2: float = 0.0
    relative_l2_upper: float = 0.0
    row_bound: float = 0.0
    rows: int = 0
    coverage: float = 1.0
    confidence: float = 1.0
    riskiest_row: float = 0.0
    recall: float = 1.0
    lse_error: float = 0.0
    fallback: bool = False
    rejected_relative_l2_upper: float | None = None  # what the replaced sparse answer measured
    certified_unread: float | None = None  # proven: no row leaves a larger share of its mass unread; absent: unproven


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One attention call inside a forward pass."""

    kind: PlanKind
    error: ErrorReport
    density: float | None
    pairs_scored: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What one request used; body, headers, gRPC parameters, metrics and the log line all read this."""

    tokens: int
    pairs_scored: int
    pairs_dense: int
    flops: int
    flops_dense: int
    device_s: float
    peak_bytes: int
    cost_usd: float
    saved_usd: float
    truncated: int = 0  # inputs that were cut
    dropped_tokens: int = 0
    chunks: int = 0  # that inputs over the model's length were cut into
    joules: float | None = None  # None: this device has no counter that can be read
    carbon_g: float | None = None  # of CO2 equivalent, where `carbon_g_per_kwh` is configured


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time went, in seconds. `paused_s`: after it had begun, others had the device."""

    queue_s: float
    device_s: float
    total_s: float
    paused_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """The one answer of one request. `plan` is what produced the output; `density` is measured, sparse only."""

    id: str
    tensors: Mapping[str, torch.Tensor]
    plan: Plan
    error: ErrorReport
    usage: Usage
    timing: Timing
    density: float | None = None
    model: str = "attention"
    batch_requests: int = 1
    batch_tokens: int = 0
    layers: tuple[LayerReport, ...] = ()  # forward passes with a sparse plan: every attention call
    tells_layers: bool = False  # the caller asked for each of them
    details: Any = None  # what the task tells beside tensors, as JSON


def cost_usd(device_s: float, hour_usd: float) -> float:
    return device_s * hour_usd / 3600


@dataclass(frozen=True, slots=True)
class Capacity:
    """Seconds of one device since its replica started: for requests, and for nobody; joules of the latter."""

    used_s: float
    idle_s: float
    idle_j: float | None = None


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Attention layers of one kind: how many there are, and who sees whom in them."""

    count: int
    is_causal: bool
    window: tuple[int, int] | None = None
    queries: Side = "source"
    keys: Side = "source"


@dataclass(frozen=True, slots=True)
class Weights:
    """How many numbers of its matrices a model multiplies with each token of the source and of the target (encoder-
    decoder models), with each sequence, and once in every pass."""

    source: int
    target: int = 0
    sequence: int = 0
    once: int = 0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a caller may know about a loaded model."""

    name: str
    task: ModelTask
    architecture: str
    dtype: str
    max_length: int  # tokens per input
    dimensions: int  # of one embedding or hidden state
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    parameters: int
    hidden_size: int
    intermediate_size: int
    weights: Weights  # of hidden states
    task_weights: Weights  # of what the model is for: hidden states and its head
    attention: tuple[LayerKind, ...]
    packed: bool  # concurrent requests share one forward pass without padding; else only inputs of equal length do
    inputs: Literal["text", "source and target", "image"] = "text"
    labels: tuple[str, ...] = ()
    task_attention: tuple[LayerKind, ...] | None = None  # of what the model is for; None: `attention`
    position_bias: bool = False  # a number for every pair of positions: its memory is quadratic (T5)
    smallest_pass_s: float = 0.0  # a few tokens through all layers, measured at load
