"""From a request to the rows that a model computes: checks that the model accepts it, then encodes texts or images."""

from __future__ import annotations

from dataclasses import dataclass

from service.core.options import EmbedOptions, ScoreOptions
from service.core.request import ForwardRequest
from service.errors import invalid, too_large
from service.models.inputs.rows import EncodedInput, Tokenized, score_positions
from service.models.inputs.spec import InputSpec
from service.models.inputs.text import encode_texts

MAX_NAMED_TOKENS = 20_000  # next tokens that one request may ask for: the device thread decodes the text of each


@dataclass(frozen=True, slots=True)
class InputProcessor:
    """Encodes requests for one model. Thread-safe; runs on any thread except the device's."""

    spec: InputSpec

    def encode(self, request: ForwardRequest) -> Tokenized:
        """The rows of one request.

        Raises FarsightError: 422 if the model does not accept the request, 413 if an input or all of them are too
        large, 507 if memory does not suffice to decode an image.
        """
        self._check_kind(request)
        tokenized = self._encode_images(request) if self.spec.image_processor else encode_texts(self.spec, request)
        _check_named_tokens(request, tokenized)
        return tokenized

    def _encode_images(self, request: ForwardRequest) -> Tokenized:
        processor = self.spec.image_processor
        assert processor is not None, "bug: this model does not accept images"
        if request.pixel_values is not None:
            pixels = list(processor.check_pixels(request.pixel_values))
        else:
            pixels = [processor(index, data) for index, data in enumerate(request.images)]
        rows = tuple(EncodedInput(pixels=image, patches=self.spec.patches) for image in pixels)
        return Tokenized(rows, (1,) * len(rows))

    def _check_kind(self, request: ForwardRequest) -> None:
        model = f"model {self.spec.model!r}"
        has_images = bool(request.images) or request.pixel_values is not None
        if self.spec.image_processor is not None and not has_images:
            raise invalid(f"{model} takes images, not text", param="images")
        if self.spec.image_processor is None and has_images:
            raise invalid(f"{model} takes text, not images", param="images")
        if request.task == "score" and self.spec.has_target != bool(request.pairs):
            scored = "a target given its source" if self.spec.has_target else "one input, without source and target"
            raise invalid(f"{model} scores {scored}", param="target")
        if request.task == "rerank" and request.token_ids and not request.token_types and self.spec.has_types:
            raise invalid(
                f"{model} needs token types for query and document: send texts, or token_type_ids", param="input_ids"
            )
        options = request.options
        if isinstance(options, EmbedOptions) and not request.texts and (options.prompt_name or options.input_type):
            raise invalid("prompts go before texts; token ids and images are taken as they are", param="prompt_name")
        if options.truncate == "chunk" and request.task != "embed":
            raise invalid('truncate "chunk" is for embeddings; use "error" or "end"', param="truncate")


def _check_named_tokens(request: ForwardRequest, tokenized: Tokenized) -> None:
    options = request.options
    if not isinstance(options, ScoreOptions) or not options.top_k:
        return
    positions = sum(len(score_positions(options, len(row.target or row.ids))) for row in tokenized.rows)
    if positions * options.top_k > MAX_NAMED_TOKENS:
        raise too_large("top_k", positions * options.top_k, MAX_NAMED_TOKENS, "next tokens", param="top_k")
