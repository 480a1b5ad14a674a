"""Bodies of multipart/form-data: fields as texts, files as bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, MultipartState, parse_options_header

from service.api.codec import Body
from service.errors import malformed, too_large

MULTIPART = "multipart/form-data"
MAX_PARTS = 256
MAX_FILE_BYTES = 64 * 1024**2  # audio may have so much, images less
MAX_HEADER_BYTES = 512  # the library reads a header in time that grows with its square
SLICE_BYTES = 1024**2  # of the body that are parsed at a time: each is copied

# its warnings quote what the caller sent
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def parse_form(body: Body, content_type: str, max_field_bytes: int) -> dict[str, Any]:
    """A body -> the text of each field, and the files of each name as a list.

    Args:
        body: held in memory, and so are its parts.
        content_type: the header, with the boundary.
        max_field_bytes: of all fields that are not files.

    Raises FarsightError: 400 if the body is not such a form, a field is not UTF-8 or occurs twice; 413 if there are too
    many parts, or too large ones.
    """
    options = parse_options_header(content_type)[1] if len(content_type) <= MAX_HEADER_BYTES else {}
    if not options.get(b"boundary"):
        raise malformed(f"content-type: expected {MULTIPART} with a boundary")
    form = _Form(max_field_bytes)
    callbacks: Any = {
        "on_part_begin": form.begin,
        "on_header_field": form.header_field,
        "on_header_value": form.header_value,
        "on_header_end": form.header_end,
        "on_headers_finished": form.headers_finished,
        "on_part_data": form.data,
        "on_part_end": form.end,
    }
    view = memoryview(body)
    try:
        parser = MultipartParser(options[b"boundary"], callbacks, max_header_size=MAX_HEADER_BYTES)
        for start in range(0, len(view), SLICE_BYTES):
            parser.write(bytes(view[start : start + SLICE_BYTES]))
    except FormParserError:  # its message quotes the body
        raise malformed(f"the body is not {MULTIPART}: a boundary or header in it is malformed") from None
    if parser.state != MultipartState.END:  # else its last part would be missing in silence
        raise malformed(f"the body is not {MULTIPART}: it has no closing boundary")
    return form.values


def form_schema(fields: Iterable[str], files: Sequence[str]) -> dict[str, Any]:
    """The OpenAPI text of a form with these fields, some of them files; `model` is required."""
    binary = {"type": "array", "items": {"type": "string", "format": "binary"}}
    properties = {name: binary if name in files else {"type": "string"} for name in fields}
    return {"schema": {"type": "object", "properties": properties, "required": ["model"]}}


class _Form:
    """Collects the parts of one body."""

    def __init__(self, max_field_bytes: int) -> None:
        self.values: dict[str, Any] = {}
        self._max_field_bytes = max_field_bytes
        self._parts = self._field_bytes = 0

    def begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise too_large("multipart body", self._parts, MAX_PARTS, "parts")
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value = bytearray(), bytearray()
        self._content = bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise malformed("multipart body: a part has no name")
        self._name, self._is_file = _decoded(options[b"name"], "a name"), b"filename" in options
        encoding = self._headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if encoding not in (b"binary", b"8bit", b"7bit"):
            raise malformed(f"{self._name[:64]}: expected no content-transfer-encoding", param=self._name[:64])
        is_new = self._name not in self.values
        if not is_new and not (self._is_file and isinstance(self.values[self._name], list)):
            raise malformed(f"{self._name[:64]}: is given twice", param=self._name[:64])

    def data(self, data: bytes, start: int, end: int) -> None:
        size = len(self._content) + end - start
        if self._is_file and size > MAX_FILE_BYTES:
            raise too_large(f"{self._name[:64]}: a file", size, MAX_FILE_BYTES, "bytes", param=self._name[:64])
        if not self._is_file and self._field_bytes + size > self._max_field_bytes:
            size += self._field_bytes
            raise too_large("fields of a multipart body", size, self._max_field_bytes, "bytes")
        self._content += memoryview(data)[start:end]

    def end(self) -> None:
        content, self._content = bytes(self._content), bytearray()
        if self._is_file:
            self.values.setdefault(self._name, []).append(content)
        else:
            self._field_bytes += len(content)
            self.values[self._name] = _decoded(content, self._name)


def _decoded(text: bytes, name: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise malformed(f"multipart body: {name[:64]} is not valid UTF-8") from None
