"""Models of the JSON bodies, for validation and for the OpenAPI text."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBytes, StrictInt, StrictStr, ValidationError
from pydantic.json_schema import SkipJsonSchema

from service.core.options import (
    AttentionOptions,
    ClassifyOptions,
    EmbedOptions,
    ExplainOptions,
    ForwardOptions,
    ScoreOptions,
)
from service.errors import invalid

Body = TypeVar("Body", bound=BaseModel)
Options = TypeVar("Options", bound=ForwardOptions)


def validated(model: type[Body], values: Any) -> Body:
    """`values` as `model`. Raises INVALID, naming the first wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        field, message = first_error(error, model)
        raise invalid(message, param=field or None) from None


def first_error(error: ValidationError, model: type[BaseModel]) -> tuple[str, str]:
    """(path of the first wrong field, for example `window.0`; a message that names it), without the wrong value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].replace("valid tuple", "list")  # JSON has no tuples
    if first["type"] == "extra_forbidden":
        message = "unknown field"
        if len(first["loc"]) == 1:
            message += f"; expected {', '.join(model.model_fields)}"
    return field, f"{field or 'body'}: {message}"


def options_of(body: Options, options: type[Options]) -> Options:
    """The options that a validated body contains. They are not validated again."""
    return cast(Options, options.model_construct(**{name: getattr(body, name) for name in options.model_fields}))


File = StrictStr | SkipJsonSchema[StrictBytes]  # bytes: a file of a multipart body
_FORMS = "as base64 or as base64 data URLs, or as files of a multipart body"
_ONE_OR_MORE = BeforeValidator(lambda given: [given] if isinstance(given, str | bytes) else given)
Images = Annotated[
    list[File], _ONE_OR_MORE, Field(description=f"Encoded image files (JPEG, PNG or WebP), or one, {_FORMS}.")
]
Audio = Annotated[list[File], _ONE_OR_MORE, Field(description=f"Audio files (WAV or FLAC), or one, {_FORMS}.")]
TextsOrIds = StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
Tensor = Annotated[
    Any,
    Field(
        description='Nested lists of numbers (float32), or {"dtype": "float32|float16|bfloat16|bool", "shape": [...], '
        '"data": "<base64, little endian>"}.'
    ),
]


class AttentionBody(AttentionOptions):
    """`POST /v1/attention` as JSON: three tensors, an optional mask, and the options."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="AttentionRequest")

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None


class EmbeddingsBody(EmbedOptions):
    """`POST /v1/embeddings`: OpenAI's fields and the options of embeddings."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="EmbeddingsRequest")

    model: str
    input: TextsOrIds | None = None
    images: Images | None = None
    audio: Audio | None = None
    encoding_format: Literal["float", "base64"] | None = Field("float", description="`null` is `float`.")
    user: str | None = Field(None, description="Accepted and ignored.")


class ClassifyBody(ClassifyOptions):
    """`POST /v1/classify`: labels of texts or images."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="ClassifyRequest")

    model: str
    input: TextsOrIds | None = None
    images: Images | None = None


class Document(BaseModel):
    """A document to rank; a plain string is accepted as well. Other fields of it are the caller's own, and ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    text: StrictStr


class RerankBody(ClassifyOptions):
    """`POST /v1/rerank`: documents ranked by their relevance to a query."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="RerankRequest")

    model: str
    query: StrictStr
    documents: list[StrictStr | Document] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1, description="How many of the best to return; default all.")
    return_documents: bool = False


class ScoreBody(ScoreOptions):
    """`POST /v1/score`: log-probabilities of given tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="ScoreRequest")

    model: str
    input: TextsOrIds | None = Field(None, description="Decoders: the text to score.")
    source: StrictStr | list[StrictStr] | None = Field(
        None, description="Encoder-decoder models: the text that the encoder reads."
    )
    target: StrictStr | list[StrictStr] | None = Field(
        None, description="Encoder-decoder models: the text to score, given `source`."
    )


class ExplainBody(ExplainOptions):
    """`POST /v1/explain`: which tokens a token attends to."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="ExplainRequest")

    model: str
    text: StrictStr
    query: StrictInt | Annotated[StrictStr, Field(max_length=256)] = Field(
        description="The query token: its index (negative from the end), or the part of the text where it begins."
    )


class ShapeBody(BaseModel):
    """Sizes of an attention request, to estimate it without tensors."""

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
    """`POST /v1/estimate`: sizes under `attention`, or a complete body under `request` with its `endpoint`."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="EstimateRequest")

    attention: ShapeBody | None = None
    endpoint: (
        Literal["/v1/attention", "/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score", "/v1/explain"] | None
    ) = None
    request: dict[str, Any] | None = None
