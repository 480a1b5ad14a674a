"""Bodies of multipart/form-data: fields as texts, files as bytes."""

from __future__ import annotations

from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

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
    values: dict[str, Any] = {}
    parts, field_bytes = 0, 0

    def count(size: int) -> None:
        nonlocal parts, field_bytes
        parts, field_bytes = parts + 1, field_bytes + size
        if parts > MAX_PARTS:
            raise too_large("multipart body", parts, MAX_PARTS, "parts")
        if field_bytes > max_field_bytes:
            raise too_large("fields of a multipart body", field_bytes, max_field_bytes, "bytes")

    def on_field(field: Field) -> None:
        text = field.value or b""
        count(len(text))
        name = _decoded(field.field_name, "a name")
        if name in values:
            raise malformed(f"{name[:64]}: is given twice", param=name[:64])
        values[name] = _decoded(text, name)

    def on_file(file: File) -> None:
        count(0)
        name = _decoded(file.field_name, "a name")
        files = values.setdefault(name, [])
        if not isinstance(files, list):
            raise malformed(f"{name[:64]}: is given twice", param=name[:64])
        file.file_object.seek(0)
        files.append(file.file_object.read())

    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # nothing is written to the disk
    parser = FormParser(MULTIPART, on_field, on_file, boundary=options[b"boundary"], config=config)
    try:
        parser.write(bytes(body))
        parser.finalize()
    except FormParserError as error:
        raise malformed(f"the body is not {MULTIPART}: {error}") from None
    if not parts:
        raise malformed(f"the body is not {MULTIPART}: no complete part in it")
    return values


def _decoded(text: bytes | None, name: str) -> str:
    try:
        return (text or b"").decode()
    except UnicodeDecodeError:
        raise malformed(f"multipart body: {name[:64]} is not valid UTF-8") from None
