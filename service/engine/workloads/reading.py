"""How much host work reading a request's inputs is, before any of it is done."""

from __future__ import annotations

from itertools import chain

from service.core.host_work import HostAsk, HostKind
from service.core.model_info import ModelInfo
from service.core.request import ForwardRequest
from service.models.inputs.image import MAX_PIXELS
from service.models.inputs.image_header import pixels_of

ENDS = 64  # characters of a text by which it is compared with others
ID_BYTES = 0.02  # a token id takes as long as so many bytes of text


def reading(request: ForwardRequest, info: ModelInfo, deadline_s: float) -> HostAsk:
    """Tokenising texts, decoding images or audio. What occurs twice is read once; `deadline_s` is the engine's."""
    kind, items = HostKind.TEXT, 1
    if request.images:
        kind, files = HostKind.IMAGE, set(request.images)
        # what no header says is refused soon, or as large as images may be
        size, items = sum(min(pixels_of(data) or MAX_PIXELS, MAX_PIXELS) for data in files), len(files)
    elif request.audio:
        kind, size, items = HostKind.AUDIO, sum(map(len, request.audio)), len(request.audio)
    elif request.features is not None:
        size = int(request.features.nbytes * ID_BYTES)
    elif request.token_ids:
        size = int(sum(map(len, request.token_ids)) * ID_BYTES)
    else:
        texts = chain(request.texts, *request.pairs)
        # equal texts, almost certainly, and without reading megabytes on the event loop
        different = {(len(text), text[:ENDS], text[-ENDS:]) for text in texts}
        size, items = sum(length for length, _, _ in different), len(different)
    return HostAsk(kind, size, request.tenant, items, request.options.priority, info.name, deadline_s)
