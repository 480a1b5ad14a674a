"""Bodies of multipart/form-data: fields as texts, files as bytes."""

from __future__ import annotations

from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, MultipartState, parse_options_header

from service.api.codec import Body
from service.errors import malformed, too_large

MULTIPART = "multipart/form-data"
MAX_PARTS = 1024  # each is an object of a few hundred bytes, however short its text


def parse_form(body: Body, content_type: str, max_field_bytes: int) -> dict[str, Any]:
    """A body -> the text of each field, and the files of each name as a list.

    Args:
        body: held in memory, and so are its parts.
        content_type: the header, with the boundary.
        max_field_bytes: of all fields that are not files.

    Raises FarsightError: 400 if the body is not such a form, a field is not UTF-8 or occurs twice; 413 if there are too
    many parts or too long fields.
    """
    _, options = parse_options_header(content_type)
    if not options.get(b"boundary"):
        raise malformed(f"content-type: expected {MULTIPART} with a boundary")
    form = _Form(max_field_bytes)
    # nothing is written to the disk; an unknown encoding is an error, not a line of the log with what the caller sent
    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True}
    try:
        parser = FormParser(MULTIPART, form.add_field, form.add_file, boundary=options[b"boundary"], config=config)
        parser.write(bytes(body))
        parser.finalize()
    except FormParserError:  # its message quotes the body
        raise malformed(f"the body is not {MULTIPART}: a boundary, header or encoding in it is malformed") from None
    if getattr(parser.parser, "state", None) != MultipartState.END:  # else its last part would be missing in silence
        raise malformed(f"the body is not {MULTIPART}: it has no closing boundary")
    return form.values


class _Form:
    """Collects the parts of one body."""

    def __init__(self, max_field_bytes: int) -> None:
        self.values: dict[str, Any] = {}
        self._max_field_bytes = max_field_bytes
        self._parts = self._field_bytes = 0

    def add_field(self, field: Field) -> None:
        text = field.value or b""
        self._count(len(text))
        name = _decoded(field.field_name, "a name")
        if name in self.values:
            raise malformed(f"{name[:64]}: is given twice", param=name[:64])
        self.values[name] = _decoded(text, name)

    def add_file(self, file: File) -> None:
        self._count(0)
        name = _decoded(file.field_name, "a name")
        files = self.values.setdefault(name, [])
        if not isinstance(files, list):
            raise malformed(f"{name[:64]}: is given twice", param=name[:64])
        file.file_object.seek(0)
        files.append(file.file_object.read())

    def _count(self, field_bytes: int) -> None:
        self._parts, self._field_bytes = self._parts + 1, self._field_bytes + field_bytes
        if self._parts > MAX_PARTS:
            raise too_large("multipart body", self._parts, MAX_PARTS, "parts")
        if self._field_bytes > self._max_field_bytes:
            raise too_large("fields of a multipart body", self._field_bytes, self._max_field_bytes, "bytes")


def _decoded(text: bytes | None, name: str) -> str:
    try:
        return (text or b"").decode()
    except UnicodeDecodeError:
        raise malformed(f"multipart body: {name[:64]} is not valid UTF-8") from None
