"""What one model takes: its limits, and the encoded inputs of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.core.options import ScoreOptions
from service.core.request import ForwardRequest
from service.errors import invalid, too_large
from service.models.inputs.rows import MAX_TOLD, TOTAL_TEXTS, EncodedInput, Tokenized, score_positions
from service.models.inputs.spec import InputSpec
from service.models.inputs.text import EncodedInputBuilder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Inputs(InputSpec):
    """Requests into encoded inputs. Thread-safe: runs on any thread, never on the device's."""

    def rows(self, request: ForwardRequest) -> Tokenized:
        """The rows of one request. Raises FarsightError: 422 for what the model does not take, 413 for too much."""
        self._check_kind(request)
        tokenized = self._rows(request)
        if isinstance(request.options, ScoreOptions) and request.options.top_k:
            told = sum(len(score_positions(request.options, len(row.target or row.ids))) for row in tokenized.rows)
            if told * request.options.top_k > MAX_TOLD:
                raise too_large("top_k", told * request.options.top_k, MAX_TOLD, "next tokens", param="top_k")
        return tokenized

    def _rows(self, request: ForwardRequest) -> Tokenized:
        if self.images is not None:
            pixels = [self.images(at, data) for at, data in enumerate(request.images)]
            if request.pixel_values is not None:
                pixels = list(self._checked_pixels(request.pixel_values))
            return Tokenized(
                tuple(EncodedInput(pixels=one, patches=self.patches) for one in pixels), (1,) * len(pixels)
            )
        collected = EncodedInputBuilder(self, request)
        if request.token_ids:
            for row in request.token_ids:
                collected.add_ids(row)
        elif request.pairs:
            self._check_sizes([text for pair in request.pairs for text in pair])
            collected.add_pairs(request.pairs)
        else:
            self._check_sizes(request.texts)
            collected.add_texts(request.texts)
        return collected.done()

    def _check_kind(self, request: ForwardRequest) -> None:
        has_images = bool(request.images) or request.pixel_values is not None
        if self.images is not None and not has_images:
            raise invalid(f"model {self.model!r} takes images", param="images")
        if self.images is None and has_images:
            raise invalid(f"model {self.model!r} takes text, not images", param="images")
        if request.task == "score" and self.has_target != bool(request.pairs):
            kind = "a target given its source" if self.has_target else "an input, without source and target"
            raise invalid(f"model {self.model!r} scores {kind}", param="target")
        if request.task == "rerank" and request.token_ids and self.has_types:
            raise invalid(f"model {self.model!r} tells query and document apart: give their texts", param="input_ids")
        if request.options.truncate == "chunk" and request.task != "embed":
            raise invalid('truncate "chunk" is for embeddings; use "error" or "end"', param="truncate")

    def _checked_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        assert self.images is not None, "bug: a model of text has no pixels"
        expected = (self.images.channels, *self.images.size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or not len(pixels):
            raise invalid(f"pixel_values: expected [n, {', '.join(map(str, expected))}], got {list(pixels.shape)}")
        if not pixels.is_floating_point() or not bool(pixels.isfinite().all()):
            raise invalid("pixel_values: expected finite floating-point numbers", param="pixel_values")
        return pixels.float()

    def _check_sizes(self, texts: Sequence[str]) -> None:
        """Before anything is tokenised. A text that occurs more than once counts once."""
        total = 0
        for index, text in enumerate(dict.fromkeys(texts)):
            size = len(text.encode(errors="surrogatepass"))
            total += size
            if size > self.max_text_bytes:
                raise too_large(f"input {index}", size, self.max_text_bytes, "bytes", param="input")
        if total > TOTAL_TEXTS * self.max_text_bytes:
            raise too_large("all texts together", total, TOTAL_TEXTS * self.max_text_bytes, "bytes", param="input")
