"""How much host work reading a request's inputs is, before any of it is done."""

from __future__ import annotations

from itertools import chain

from service.core.host_work import HostAsk, HostKind
from service.core.model_info import ModelInfo
from service.core.request import ForwardRequest
from service.models.inputs.file_headers import audio_ms_of, pixels_of
from service.models.inputs.image import MAX_PIXELS

WINDOW_MS = 30_000
BYTES_PER_MS = 8  # of a file whose header does not say how long it is: coded well
ID_BYTES = 0.02  # a token id takes as long as so many bytes of text


def reading(request: ForwardRequest, info: ModelInfo, deadline_s: float) -> HostAsk:
    """Tokenising texts, decoding images or audio. What occurs twice is read once; `deadline_s` is the engine's."""
    kind, items = HostKind.TEXT, 1
    if request.images:
        kind, files = HostKind.IMAGE, set(request.images)
        # what no header says is refused soon, or as large as images may be
        size, items = sum(min(pixels_of(data) or MAX_PIXELS, MAX_PIXELS) for data in files), len(files)
    elif request.audio:
        kind, items = HostKind.AUDIO, len(request.audio)
        size = sum(_audio_ms(data, is_cut=request.options.truncate == "end") for data in request.audio)
    elif request.features is not None:
        size = int(request.features.nbytes * ID_BYTES)
    elif request.token_ids:
        size = int(sum(map(len, request.token_ids)) * ID_BYTES)
    else:
        texts = set(chain(request.texts, *request.pairs))
        size, items = sum(map(len, texts)), len(texts)
    return HostAsk(kind, size, request.tenant, items, request.options.priority, info.name, deadline_s)


def _audio_ms(data: bytes, *, is_cut: bool) -> int:
    """Milliseconds that are decoded; of a file that is cut only the first window is."""
    known = audio_ms_of(data)
    milliseconds = len(data) // BYTES_PER_MS if known is None else known
    return min(milliseconds, WINDOW_MS) if is_cut else milliseconds
