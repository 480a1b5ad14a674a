"""From a request to the rows that a model computes: checks that the model accepts it, then encodes its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.attention.output import Checkpoint, no_checkpoint
from service.core.options import EmbedOptions, ScoreOptions
from service.core.request import ForwardRequest
from service.errors import invalid, too_large
from service.models.inputs.rows import EncodedInput, Tokenized, score_positions
from service.models.inputs.spec import InputSpec
from service.models.inputs.text import encode_texts

if TYPE_CHECKING:
    import torch

    from service.models.inputs.audio import AudioProcessor
    from service.models.inputs.image import ImageProcessor

MAX_NAMED_TOKENS = 20_000  # next tokens that one request may ask for: the device thread decodes the text of each


@dataclass(frozen=True, slots=True)
class InputProcessor:
    """Encodes requests for one model. Thread-safe; runs on any thread except the device's."""

    spec: InputSpec
    max_windows: int  # of audio in one request

    def encode(self, request: ForwardRequest, checkpoint: Checkpoint = no_checkpoint) -> Tokenized:
        """The rows of one request. `checkpoint`: called while audio is decoded; raises to stop that.

        Raises FarsightError: 422 if the model does not accept the request, 413 if an input or all of them are too
        large, 507 if memory does not suffice to decode an image.
        """
        self._check_kind(request)
        if self.spec.image_processor is not None:
            tokenized = self._encode_images(request, self.spec.image_processor, checkpoint)
        elif self.spec.audio_processor is not None:
            tokenized = self._encode_audio(request, self.spec.audio_processor, checkpoint)
        else:
            tokenized = encode_texts(self.spec, request, checkpoint)
        _check_named_tokens(request, tokenized)
        return tokenized

    def _encode_images(self, request: ForwardRequest, processor: ImageProcessor, checkpoint: Checkpoint) -> Tokenized:
        """An image that occurs more than once is decoded once."""
        if request.features is not None:
            return self._one_each(list(processor.check_pixels(request.features)))
        decoded: dict[bytes, torch.Tensor] = {}
        for index, data in enumerate(request.images):
            if data not in decoded:
                checkpoint()
                decoded[data] = processor(index, data)
        return self._one_each([decoded[data] for data in request.images])

    def _encode_audio(self, request: ForwardRequest, processor: AudioProcessor, checkpoint: Checkpoint) -> Tokenized:
        """Each file as its windows. What of a window is silence after the end of its file is not in the result."""
        count = len(request.audio) if request.features is None else len(request.features)
        if count > self.max_windows:
            name = "audio" if request.features is None else "input_features"
            raise too_large(name, count, self.max_windows, "windows", param=name)
        if request.features is not None:
            return self._one_each(list(processor.check_features(request.features)))
        rows: list[EncodedInput] = []
        counts, dropped, cut = [], 0, 0
        for index, data in enumerate(request.audio):
            left = self.max_windows - len(rows) - (len(request.audio) - index - 1)
            windows, excess = processor.windows(index, data, request.options.truncate, left, checkpoint)
            rows += [EncodedInput(features=one.features, states=self.spec.states, kept=one.states) for one in windows]
            counts.append(len(windows))
            dropped, cut = dropped + excess, cut + bool(excess)
        return Tokenized(tuple(rows), tuple(counts), cut, dropped)

    def _one_each(self, features: list[torch.Tensor]) -> Tokenized:
        rows = tuple(EncodedInput(features=each, states=self.spec.states) for each in features)
        return Tokenized(rows, (1,) * len(rows))

    def _check_kind(self, request: ForwardRequest) -> None:
        model = f"model {self.spec.model!r}"
        taken = "images" if self.spec.image_processor else "audio" if self.spec.audio_processor else "text"
        given = "images" if request.images else "audio" if request.audio else "text"
        if request.features is not None:  # whether they fit, their processor says
            given = "images or audio" if taken == "text" else taken
        if given != taken:
            raise invalid(f"{model} takes {taken}, not {given}", param=taken if taken != "text" else "input")
        if request.task == "score" and self.spec.has_target != bool(request.pairs):
            scored = "a target given its source" if self.spec.has_target else "one input, without source and target"
            raise invalid(f"{model} scores {scored}", param="target")
        if request.task == "rerank" and request.token_ids and not request.token_types and self.spec.has_types:
            raise invalid(
                f"{model} needs token types for query and document: send texts, or token_type_ids", param="input_ids"
            )
        options = request.options
        if isinstance(options, EmbedOptions) and not request.texts and (options.prompt_name or options.input_type):
            message = "prompts go before texts; token ids, images and audio are taken as they are"
            raise invalid(message, param="prompt_name")
        if options.truncate == "chunk" and request.task != "embed":
            raise invalid('truncate "chunk" is for embeddings; use "error" or "end"', param="truncate")


def _check_named_tokens(request: ForwardRequest, tokenized: Tokenized) -> None:
    options = request.options
    if not isinstance(options, ScoreOptions) or not options.top_k:
        return
    positions = sum(len(score_positions(options, len(row.target or row.ids))) for row in tokenized.rows)
    if positions * options.top_k > MAX_NAMED_TOKENS:
        raise too_large("top_k", positions * options.top_k, MAX_NAMED_TOKENS, "next tokens", param="top_k")
