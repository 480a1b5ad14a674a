"""Encoded images -> pixels for a model: decoding is ours and distrustful, the arithmetic is Transformers' own."""

from __future__ import annotations

import ctypes
import io
import logging
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base as Tag
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from transformers import AutoImageProcessor, PretrainedConfig, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.utils import logging as transformers_logging

from service.errors import FarsightError, Kind, invalid, too_large

MAX_BYTES = 32 * 1024**2  # of one file: a header of nothing but tiny parts takes ~40x its bytes to read
MAX_PIXELS = 64 * 1024**2  # 64 megapixels; decoded and resized they take ~1 GB for a moment
MAX_ASPECT = 100  # processors resize the shorter side first: 2 x 30 000 000 would become 224 x 3 360 000 000
MAX_SCANS = 100  # of a JPEG, and its blocks of EXIF; encoders write about ten, and one
MAX_VALUES = 100_000  # of one tag of a TIFF: each costs ~60 times its bytes, before its size is known
MAX_COPIES = 8  # how often a TIFF may store each pixel; 6 planes are the most that are read
MAX_EXIF_BYTES = 1024**2  # beyond, the orientation is not looked for

# not Image.open: its limit is the whole process's, and it warns; two magic numbers of TIFF are BigTIFF's
FORMATS: dict[bytes, Callable[[io.BytesIO], ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,
    b"MM\0+": TiffImageFile,
}

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # followed by a length, but for the end, FF D9
TIFF_BYTES = (1, 2, 7)  # BYTE, ASCII, UNDEFINED
QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

_invalid = partial(invalid, param="images")
_too_large = partial(too_large, param="images")

Mode = Literal["RGB", "L"]


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Bytes of an image file -> pixels as this model was trained on (its preprocessor_config.json)."""

    size: tuple[int, int]  # height, width of what the model takes
    channels: int
    processor: Any  # Transformers' PIL image processor: only read, so threads may share it

    def __call__(self, index: int, data: bytes) -> torch.Tensor:
        """[C, H, W] float32 of one encoded image. FarsightError: 422 it is not a right image, 413 it is too large."""
        return _pixels(self.processor, decode(index, data, _mode(self.channels)))


def read_processor(directory: Path, hf_config: PretrainedConfig) -> ImageProcessor:
    """From preprocessor_config.json (missing: ViT's defaults: resize to the config's image_size, mean=std=0.5)."""
    _hush_libraries()
    vision_config = getattr(hf_config, "vision_config", hf_config)
    channels = int(getattr(vision_config, "num_channels", 3))
    if channels not in (1, 3):
        raise ValueError(f"{directory}: the model takes {channels} channels; images have 1 or 3")
    settings = get_image_processor_config(directory, local_files_only=True)
    processor = _load(directory, hf_config, settings) if settings else _default(vision_config, channels)
    # tried, not read: crop, resize and padding decide together, each class in its own way
    shapes = {_pixels(processor, Image.new(_mode(channels), size)).shape for size in ((96, 64), (64, 96))}
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != channels:
        raise ValueError(f"{directory}: its preprocessor does not make [{channels}, H, W] of one size from every image")
    return ImageProcessor((shape[1], shape[2]), channels, processor)


def decode(index: int, data: bytes, mode: Mode) -> Image.Image:
    """One image in `mode`, upright. Raises FarsightError naming `image {index}`, never a word of what is in it.

    Refused by its header before a pixel is decoded. Of several frames or pages the first. As `transformers.pipeline`
    does: turned as its EXIF says, alpha dropped (`convert("RGB")`, so the colour under a transparent pixel shows), ICC
    profiles ignored. Unlike it, 16-bit grey keeps its high byte; `convert` would clip nearly all of it to white.
    """
    format_ = _format(index, data)
    name = format_.__name__.removesuffix("ImageFile").upper()
    _hush_warnings()
    try:
        _check_parts(index, format_, data)
        image = format_(io.BytesIO(data))
        _check_header(index, image)
        image.load()
        image.info.pop("transparency", None)  # a colour that means alpha: it is dropped like any other alpha
        pixels = _eight_bits(index, image)
        turn = _turn(image)
        pixels = pixels if turn is None else pixels.transpose(turn)
        return pixels if pixels.mode == mode else pixels.convert(mode)
    except FarsightError:
        raise
    except Image.DecompressionBombError:  # the two whose header Pillow itself refuses: WebP and GIF over 178 megapixels
        message = f"image {index} is over the limit of {MAX_PIXELS} pixels"
        raise FarsightError(Kind.TOO_LARGE, message, param="images") from None
    except MemoryError:
        message = f"image {index}: there is no memory to decode it now"
        raise FarsightError(Kind.OUT_OF_MEMORY, message, param="images") from None
    except Exception:  # noqa: BLE001 (on a damaged file Pillow raises anything, and cites the file)
        raise _invalid(f"image {index}: the {name} file is truncated, damaged or of an unsupported kind") from None


def _format(index: int, data: bytes) -> Callable[[io.BytesIO], ImageFile]:
    if not data:
        raise _invalid(f"image {index} is empty")
    if len(data) > MAX_BYTES:
        raise _too_large(f"image {index}", len(data), MAX_BYTES, "bytes")
    for magic, format_ in FORMATS.items():
        if data.startswith(magic):
            return format_
    raise _invalid(f"image {index} is not a PNG, JPEG, WebP, GIF, BMP or TIFF file")


def _check_parts(index: int, format_: Callable[[io.BytesIO], ImageFile], data: bytes) -> None:
    """Refuse what is dear even to open, or dear to decode in a way that its header does not show."""
    if format_ is JpegImageFile and _jpeg_parts(data) > MAX_SCANS:
        raise _invalid(f"image {index}: the JPEG file has over {MAX_SCANS} scans or blocks of EXIF")
    if format_ is TiffImageFile and _tiff_values(data) > MAX_VALUES:
        raise _invalid(f"image {index}: the TIFF file has a tag of over {MAX_VALUES} values")


def _jpeg_parts(data: bytes) -> int:
    """Scans (each a pass over all pixels, though a few bytes are enough for one) and blocks of EXIF, to the end."""
    parts, position = 0, 2
    while (found := JPEG_MARKER.search(data, position)) and found[0] != b"\xff\xd9" and parts <= MAX_SCANS:
        at = found.end()
        parts += found[0] == b"\xff\xda" or (found[0] == b"\xff\xe1" and data[at + 2 : at + 6] == b"Exif")
        position = at + int.from_bytes(data[at : at + 2], "big")
    return parts


def _tiff_values(data: bytes) -> int:
    """Most values of one tag of the first page; text and bytes, which stay bytes, aside."""
    order, big = "<" if data[:1] == b"I" else ">", b"+" in data[2:4]
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (tags,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    entry = struct.Struct(order + ("HHQ8x" if big else "HHI4x"))
    start += 8 if big else 2
    tags = min(tags, (len(data) - start) // entry.size)
    entries = entry.iter_unpack(data[start : start + tags * entry.size])
    return max((count for _, kind, count in entries if kind not in TIFF_BYTES), default=0)


def _check_header(index: int, image: ImageFile) -> None:
    """Refuse by size, by shape, and by what a TIFF needs for pixels that it does not show."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(f"image {index}", width * height, MAX_PIXELS, "pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _invalid(f"image {index}: of {width} x {height} pixels one side is over {MAX_ASPECT} times the other")
    if isinstance(image, TiffImageFile):
        # libtiff holds a whole tile, however little of it the image shows
        tile_pixels = int(image.tag_v2.get(Tag.TileWidth, 1)) * int(image.tag_v2.get(Tag.TileLength, 1))
        if tile_pixels > MAX_PIXELS:
            raise _too_large(f"image {index}: a tile of the TIFF file", tile_pixels, MAX_PIXELS, "pixels")
        boxes = (tile.extents or (0, 0, width, height) for tile in image.tile)
        stored = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        if stored > MAX_COPIES * width * height:
            raise _invalid(f"image {index}: the TIFF file stores its pixels over {MAX_COPIES} times")


def _eight_bits(index: int, image: Image.Image) -> Image.Image:
    """Modes of more than 8 bits in one channel, of which only grey exists in Pillow."""
    if image.mode in ("I", "F"):
        raise _invalid(f"image {index} has 32-bit or signed pixels, whose range is not known; send 8 or 16 bits")
    if not image.mode.startswith("I;16"):
        return image
    bits = image.tag_v2.get(Tag.BitsPerSample, (16,))[0] if isinstance(image, TiffImageFile) else 16
    return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, by its EXIF."""
    if any(len(image.info.get(key, b"")) > MAX_EXIF_BYTES for key in ("exif", "Raw profile type exif")):
        return None
    try:
        return UPRIGHT.get(image.getexif().get(Tag.Orientation, 1))
    except Exception:  # noqa: BLE001 (EXIF that cannot be read says nothing; the pixels are good)
        return None


def _hush_warnings() -> None:
    """Pillow warns of strange tags in files that it then reads well; nobody can act on that.

    catch_warnings would swap the filters of the process under its other threads; one more filter is safe.
    """
    if warnings.filters[:1] != [QUIET]:
        warnings.filterwarnings("ignore", module=QUIET[3].pattern)


def _hush_libraries() -> None:
    """A damaged file is answered, not logged; libtiff would print a line for each bad row of it."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    for library in Path(Image.__file__).parents[1].glob("pillow.libs/libtiff-*"):  # the one that Pillow's wheel loads
        ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


def _mode(channels: int) -> Mode:
    return "L" if channels == 1 else "RGB"


def _pixels(processor: Any, image: Image.Image) -> torch.Tensor:
    """What the model takes of one image: [C, H, W] float32 where the processor is one that this service can serve."""
    pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels.float()


def _load(directory: Path, hf_config: PretrainedConfig, settings: dict[str, Any]) -> Any:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # it may warn that torchvision, not asked for, is missing
    try:
        processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            directory, config=hf_config, backend="pil", local_files_only=True, trust_remote_code=False
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    # Transformers takes the model type's own class for one that it does not know
    declared = (settings.get("image_processor_type") or "").removesuffix("Fast").removesuffix("Pil")
    if declared and declared != type(processor).__name__.removesuffix("Pil"):
        raise ValueError(f"{directory}: image processor {declared!r} is not one of Transformers'")
    return processor


def _default(vision_config: PretrainedConfig, channels: int) -> Any:
    size = vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    half = [0.5] * channels
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)
