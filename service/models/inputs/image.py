"""Encoded images into pixels for a model.

Files are decoded here, with limits, because they come from callers; resizing and normalising are Transformers' own.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base as Tag
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from transformers import AutoImageProcessor, PretrainedConfig, ViTImageProcessorPil
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.utils import logging as transformers_logging

from service.errors import FarsightError, Kind, invalid, too_large

MAX_BYTES = 32 * 1024**2  # of one file: a header of nothing but tiny parts takes ~40x its bytes to read
MAX_PIXELS = 64 * 1024**2  # 64 megapixels; decoded and resized they take ~1 GB for a moment
MAX_ASPECT = 100  # processors resize the shorter side first: 2 x 30 000 000 would become 224 x 3 360 000 000
MAX_JPEG_PARTS = 100  # scans and EXIF blocks of one JPEG; encoders write about ten scans and one EXIF block
MAX_EXIF_BYTES = 1024**2  # the orientation in a larger EXIF block is ignored

# not Image.open: its limit holds for the whole process, and it only warns
FORMATS: dict[bytes, Callable[[io.BytesIO], ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"RIFF": WebPImageFile,
}

# EXIF orientation: the transposition that makes the image upright
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")  # a length follows each, except the end marker FF D9
IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # a filter as the warnings module keeps it

_invalid = partial(invalid, param="images")
_too_large = partial(too_large, param="images")

Mode = Literal["RGB", "L"]


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Turns an image file into the pixels that a model was trained on, as its preprocessor_config.json says."""

    size: tuple[int, int]  # height and width that the model takes
    channels: int
    processor: Any  # Transformers' PIL image processor: calls do not change it, so threads may share it

    def __call__(self, index: int, data: bytes) -> torch.Tensor:
        """Encoded image -> [C, H, W] float32. Raises FarsightError like `decode`."""
        return _pixels(self.processor, decode(index, data, _mode(self.channels)))

    def check_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [n, C, H, W] that the caller has prepared, as float32. Raises FarsightError (422)."""
        expected = (self.channels, *self.size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or not len(pixels):
            raise invalid(f"pixel_values: expected [n, {', '.join(map(str, expected))}], got {list(pixels.shape)}")
        if not pixels.is_floating_point() or not bool(pixels.isfinite().all()):
            raise invalid("pixel_values: expected finite floating-point numbers", param="pixel_values")
        return pixels.float()


def read_processor(directory: Path, hf_config: PretrainedConfig) -> ImageProcessor:
    """Read preprocessor_config.json. Without one: ViT's defaults (resized to the model's image_size, mean = std = 0.5).

    Raises ValueError if the model does not take 1 or 3 channels, or the processor is unknown or makes images of
    different sizes.
    """
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # a damaged file is the caller's error: reported, not logged
    vision_config = getattr(hf_config, "vision_config", hf_config)
    channels = int(getattr(vision_config, "num_channels", 3))
    if channels not in (1, 3):
        raise ValueError(f"{directory}: expected a model of 1 or 3 channels, got {channels}")
    settings = get_image_processor_config(directory, local_files_only=True)
    processor = _load(directory, hf_config, settings) if settings else _default(vision_config, channels)
    # tried, not read from the settings: crop, resize and padding decide together, in each class differently
    shapes = {_pixels(processor, Image.new(_mode(channels), size)).shape for size in ((96, 64), (64, 96))}
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != channels:
        raise ValueError(f"{directory}: its preprocessor does not make [{channels}, H, W] of one size from every image")
    return ImageProcessor((shape[1], shape[2]), channels, processor)


def decode(index: int, data: bytes, mode: Mode) -> Image.Image:
    """Decode a JPEG, PNG or WebP file: upright, in `mode`, the first of several frames.

    As in `transformers.pipeline`, the image is turned as its EXIF says, alpha is dropped (`convert("RGB")`: the colour
    under a transparent pixel shows) and ICC profiles are ignored. Unlike there, 16-bit grey keeps its high byte;
    `convert` would clip nearly all of it to white.

    Raises FarsightError that names `image {index}` but no content of the file: 422 if it is not such a file, is damaged
    or too narrow; 413 if it has too many bytes or pixels (refused by its header, before a pixel is decoded); 507 if
    memory does not suffice to decode it.
    """
    format_ = _format(index, data)
    name = format_.__name__.removesuffix("ImageFile").upper()
    _ignore_warnings()
    try:
        if format_ is JpegImageFile and _jpeg_parts(data) > MAX_JPEG_PARTS:
            raise _invalid(f"image {index}: the JPEG file has over {MAX_JPEG_PARTS} scans or blocks of EXIF")
        image = format_(io.BytesIO(data))
        _check_size(index, *image.size)
        image.load()
        image.info.pop("transparency", None)  # a colour that means alpha: dropped like any other alpha
        pixels = _eight_bits(image)
        turn = _turn(image)
        pixels = pixels if turn is None else pixels.transpose(turn)
        return pixels if pixels.mode == mode else pixels.convert(mode)
    except FarsightError:
        raise
    except Image.DecompressionBombError:  # raised while Pillow reads a WebP header of over 178 megapixels
        message = f"image {index} is over the limit of {MAX_PIXELS} pixels"
        raise FarsightError(Kind.TOO_LARGE, message, param="images") from None
    except MemoryError:
        message = f"image {index}: not enough memory to decode it now"
        raise FarsightError(Kind.OUT_OF_MEMORY, message, param="images") from None
    except Exception:  # noqa: BLE001 (Pillow raises any class for a damaged file, and its message quotes the file)
        raise _invalid(f"image {index}: the {name} file is truncated, damaged or of an unsupported kind") from None


def _format(index: int, data: bytes) -> Callable[[io.BytesIO], ImageFile]:
    if not data:
        raise _invalid(f"image {index} is empty")
    if len(data) > MAX_BYTES:
        raise _too_large(f"image {index}", len(data), MAX_BYTES, "bytes")
    for magic, format_ in FORMATS.items():
        if data.startswith(magic) and (format_ is not WebPImageFile or data[8:12] in b"WEBP"):
            return format_
    raise _invalid(f"image {index}: expected a JPEG, PNG or WebP file")


def _jpeg_parts(data: bytes) -> int:
    """Scans plus EXIF blocks. Each scan is a pass over all pixels, but may take only a few bytes of the file."""
    parts, position = 0, 2
    while (found := JPEG_MARKER.search(data, position)) and found[0] != b"\xff\xd9" and parts <= MAX_JPEG_PARTS:
        at = found.end()
        parts += found[0] == b"\xff\xda" or (found[0] == b"\xff\xe1" and data[at + 2 : at + 6] == b"Exif")
        position = at + int.from_bytes(data[at : at + 2], "big")
    return parts


def _check_size(index: int, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large(f"image {index}", width * height, MAX_PIXELS, "pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _invalid(f"image {index}: of {width} x {height} pixels one side is over {MAX_ASPECT} times the other")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to its high byte. Pillow itself reduces 16-bit colour to 8 bits."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes the image upright, by its EXIF; None if there is nothing to do."""
    if any(len(image.info.get(key, b"")) > MAX_EXIF_BYTES for key in ("exif", "Raw profile type exif")):
        return None
    try:
        return UPRIGHT.get(image.getexif().get(Tag.Orientation, 1))
    except Exception:  # noqa: BLE001 (unreadable EXIF says nothing about the pixels)
        return None


def _ignore_warnings() -> None:
    """Ignore Pillow's warnings about odd EXIF tags: it reads such files well, and an operator cannot act on them.

    One more filter, not `catch_warnings`, which would swap the filters of the process under its other threads.
    """
    if warnings.filters[:1] != [IGNORE_PILLOW]:
        warnings.filterwarnings("ignore", module=IGNORE_PILLOW[3].pattern)


def _mode(channels: int) -> Mode:
    return "L" if channels == 1 else "RGB"


def _pixels(processor: Any, image: Image.Image) -> torch.Tensor:
    """image -> [C, H, W] float32, unless the processor is one that `read_processor` refuses."""
    pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels.float()


def _load(directory: Path, hf_config: PretrainedConfig, settings: dict[str, Any]) -> Any:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)  # it may warn that torchvision is missing, which is not needed
    try:
        processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            directory, config=hf_config, backend="pil", local_files_only=True, trust_remote_code=False
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    # for an unknown class Transformers takes the one of the model type
    declared = (settings.get("image_processor_type") or "").removesuffix("Fast").removesuffix("Pil")
    if declared and declared != type(processor).__name__.removesuffix("Pil"):
        raise ValueError(f"{directory}: image processor {declared!r} is not one of Transformers'")
    return processor


def _default(vision_config: PretrainedConfig, channels: int) -> Any:
    size = vision_config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    half = [0.5] * channels
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)
