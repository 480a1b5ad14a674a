"""What bodies look like, for validation and for the OpenAPI text."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from service.core.options import (
    AttentionOptions,
    ClassifyOptions,
    EmbedOptions,
    ExplainOptions,
    ScoreOptions,
)
from service.errors import invalid

Body = TypeVar("Body", bound=BaseModel)
Images = Annotated[
    list[StrictStr], Field(description="Encoded image files (PNG, JPEG, WebP, ...): base64, or data URLs of it.")
]
TextsOrIds = StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]


def validated(model: type[Body], values: dict[str, Any]) -> Body:
    """`values` as `model`, or 422 naming the first field that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].replace("valid tuple", "list")  # JSON has no tuples
        raise invalid(f"{field}: {message}", param=field) from None


Tensor = Annotated[
    Any,
    Field(
        description='Nested lists of numbers (float32), or {"dtype": "float32|float16|bfloat16|bool", "shape": [...], '
        '"data": "<base64, little endian>"}.'
    ),
]


class AttentionBody(AttentionOptions):
    """`POST /v1/attention` as JSON: three tensors, perhaps a mask, and the options."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="AttentionRequest")

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None


class EmbeddingsBody(EmbedOptions):
    """`POST /v1/embeddings`, OpenAI's fields and ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="EmbeddingsRequest")

    model: str
    input: TextsOrIds | None = None
    images: Images | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = Field(None, description="Taken and not used.")


class ClassifyBody(ClassifyOptions):
    """`POST /v1/classify`: texts or images to labels."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="ClassifyRequest")

    model: str
    input: TextsOrIds | None = None
    images: Images | None = None


class Document(BaseModel):
    """A document to rank, where it is not a plain string."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: StrictStr


class RerankBody(ClassifyOptions):
    """`POST /v1/rerank`: documents by their relevance to a query."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="RerankRequest")

    model: str
    query: StrictStr
    documents: list[StrictStr | Document] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1, description="Only the best; default all.")
    return_documents: bool = False


class ScoreBody(ScoreOptions):
    """`POST /v1/score`: log-probabilities of given tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="ScoreRequest")

    model: str
    input: TextsOrIds | None = Field(None, description="Decoders: what is scored.")
    source: StrictStr | list[StrictStr] | None = Field(None, description="Encoder-decoder models: what is read,")
    target: StrictStr | list[StrictStr] | None = Field(None, description="and what is scored given it.")


class ExplainBody(ExplainOptions):
    """`POST /v1/explain`: which tokens a token attends to."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="ExplainRequest")

    model: str
    text: StrictStr
    query: StrictInt | Annotated[StrictStr, Field(max_length=256)] = Field(
        description="The token that looks: its index (negative from the end), or a part of the text where it begins."
    )


class ShapeBody(BaseModel):
    """The sizes of an attention request, for an estimate without tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="AttentionSizes")

    batch: int = Field(1, ge=1, le=2**16)
    heads: int = Field(ge=1, le=2**16)
    kv_heads: int | None = Field(None, ge=1, le=2**16)
    query_length: int = Field(ge=1, le=2**32)
    key_length: int | None = Field(None, ge=1, le=2**32)
    head_dim: int = Field(ge=1, le=2**16)
    value_dim: int | None = Field(None, ge=1, le=2**16)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    is_causal: bool = False
    window: tuple[int, int] | None = None
    mode: Literal["auto", "dense", "chunked", "sparse"] = "auto"
    max_error: float | None = Field(None, ge=0, le=1)


class EstimateBody(BaseModel):
    """`POST /v1/estimate`: sizes under `attention`, or any real body under `request` with its `endpoint`."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="EstimateRequest")

    attention: ShapeBody | None = None
    endpoint: (
        Literal["/v1/attention", "/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score", "/v1/explain"] | None
    ) = None
    request: dict[str, Any] | None = None
