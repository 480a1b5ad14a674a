"""How much work a file is by its header, without decoding: what to expect of it, never whether it is valid."""

from __future__ import annotations

MOST_PARTS = 256  # of a JPEG before its frame header


def pixels_of(data: bytes) -> int | None:
    """Width times height as the file states them; None if its header cannot be read that far."""
    size = None
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        size = _pair(data[16:24], 4, "big")
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = _webp(data)
    elif data.startswith(b"\xff\xd8"):
        size = _jpeg(data)
    return None if size is None else size[0] * size[1]


def audio_ms_of(data: bytes) -> int | None:
    """Milliseconds of a FLAC or WAV file as its header states them; None if it does not."""
    if data.startswith(b"fLaC") and len(data) >= 26:
        bits = int.from_bytes(data[18:26], "big")  # 20 of the rate, 8 of channels and width, 36 of the samples
        rate, samples = bits >> 44, bits & (1 << 36) - 1
        return 1000 * samples // rate if rate and samples else None
    if data.startswith(b"RIFF") and data[12:16] == b"fmt " and len(data) > 44:
        byte_rate = int.from_bytes(data[28:32], "little")
        return 1000 * len(data) // byte_rate if byte_rate else None
    return None


def _webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X" and (size := _pair(data[24:30], 3, "little")):  # stored less one
        return size[0] + 1, size[1] + 1
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and (size := _pair(data[26:30], 2, "little")):
        return size[0] & 0x3FFF, size[1] & 0x3FFF
    return None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    position = 2
    for _ in range(MOST_PARTS):
        if data[position : position + 1] != b"\xff" or position + 9 > len(data):
            return None
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _pair(data[position + 5 : position + 9], 2, "big")
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _pair(data: bytes, width: int, order: str) -> tuple[int, int] | None:
    if len(data) < 2 * width:
        return None
    first, second = data[:width], data[width:]
    return int.from_bytes(first, order), int.from_bytes(second, order)  # type: ignore[arg-type]
