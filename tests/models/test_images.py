"""Real encoded images: the pixels are the HF processor's, and no file costs more than its header allows."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from PIL.ImageFile import ImageFile
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, ViTConfig, ViTImageProcessorPil

from service.errors import FarsightError, Kind
from service.models.inputs import image as images
from service.models.inputs.file_headers import pixels_of
from service.models.inputs.image import ImageProcessor, decode, read_processor

DRAW = np.random.default_rng(0)
NOISE = Image.fromarray(DRAW.integers(0, 256, (40, 56, 3), dtype=np.uint8))
GREY16 = DRAW.integers(0, 65536, (40, 56), dtype=np.uint16)
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 36}, "crop_size": 32}


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


FILES = {
    "png": encoded(NOISE, "PNG"),
    "jpeg": encoded(NOISE, "JPEG"),
    "progressive jpeg": encoded(NOISE, "JPEG", progressive=True),
    "webp": encoded(NOISE, "WEBP"),
    "lossless webp": encoded(NOISE, "WEBP", lossless=True),
}

REFUSED = {
    "gif": encoded(NOISE.quantize(16), "GIF"),
    "animated gif": encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(180)]),
    "bmp": encoded(NOISE, "BMP"),
    "tiff": encoded(NOISE, "TIFF"),
    "deflate tiff": encoded(NOISE, "TIFF", compression="tiff_deflate"),
    "big tiff": encoded(NOISE, "TIFF", big_tiff=True),
    "group 4 tiff": encoded(NOISE.convert("1"), "TIFF", compression="group4"),
    "CMYK tiff": encoded(NOISE.convert("CMYK"), "TIFF"),
    "16-bit tiff": encoded(Image.fromarray(GREY16), "TIFF"),
    "32-bit tiff": encoded(Image.new("I", (4, 4)), "TIFF"),
    "float tiff": encoded(Image.new("F", (4, 4)), "TIFF"),
    "ppm": encoded(NOISE, "PPM"),
    "ico": encoded(NOISE, "ICO"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ImageProcessor:
    return read_processor(directory(tmp_path_factory.mktemp("clip"), CLIP), CLIPVisionConfig(image_size=32))


def directory(path: Path, settings: dict[str, Any]) -> Path:
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def refusal(data: bytes, mode: images.Mode = "RGB") -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        decode(3, data, mode)
    assert caught.value.message.startswith("image 3")
    assert caught.value.param == "images"
    return caught.value


def png(width: int, height: int, *more: bytes) -> bytes:
    """A header that claims a size, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, *more, b"IDAT" + zlib.compress(b"\0"), b"IEND")
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# the right answer


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_the_processor_on_the_rgb_image(clip: ImageProcessor, name: str) -> None:
    rgb = Image.open(io.BytesIO(FILES[name])).convert("RGB")
    own = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
    expected = own(images=rgb, return_tensors="pt")["pixel_values"][0]
    pixels = clip(0, FILES[name])
    assert pixels.dtype == torch.float32
    assert pixels.shape == (clip.channels, *clip.size) == (3, 32, 32)
    assert torch.equal(pixels, expected)


ALPHA = Image.merge("RGBA", (*NOISE.split(), NOISE.getchannel(0)))
CLEAR = NOISE.quantize(16)
CMYK = NOISE.convert("CMYK")
MODES = {
    "RGBA png": (encoded(ALPHA, "PNG"), NOISE),
    "RGBA webp": (encoded(ALPHA, "WEBP", lossless=True, exact=True), NOISE),
    "RGB png with a transparent colour": (encoded(NOISE, "PNG", transparency=(1, 2, 3)), NOISE),
    "LA png": (encoded(ALPHA.convert("LA"), "PNG"), NOISE.convert("L").convert("RGB")),
    "L jpeg": (encoded(Image.new("L", (9, 9), 77), "JPEG"), Image.new("RGB", (9, 9), (77, 77, 77))),
    "P png": (encoded(CLEAR, "PNG"), CLEAR.convert("RGB")),
    "P png with one transparent entry": (encoded(CLEAR, "PNG", transparency=3), CLEAR.convert("RGB")),
    "P png with alpha": (encoded(CLEAR, "PNG", transparency=bytes(range(16))), CLEAR.convert("RGB")),
    "1 png": (encoded(NOISE.convert("1"), "PNG"), NOISE.convert("1").convert("RGB")),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_its_rgb_with_alpha_dropped(clip: ImageProcessor, name: str) -> None:
    data, expected = MODES[name]
    image = decode(0, data, "RGB")
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    # a left-over "transparency" would make the processor paste the image on white
    assert torch.equal(clip(0, data), clip(0, encoded(expected, "PNG")))


def test_cmyk_jpeg_is_as_pillow_reads_it() -> None:
    data = encoded(CMYK, "JPEG")
    assert np.array_equal(np.asarray(decode(0, data, "RGB")), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_keeps_its_high_byte(order: str) -> None:
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, (56, 40), GREY16.astype(order).tobytes())
    expected = np.repeat((GREY16 >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert np.array_equal(np.asarray(decode(0, encoded(image, "PNG"), "RGB")), expected)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_the_image_upright_once(name: str, turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    data = encoded(NOISE, name, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((56, 40) if turn < 5 else (40, 56))
    assert np.array_equal(np.asarray(decode(0, data, "RGB")), np.asarray(expected))


def test_16_bit_grey_is_turned_too() -> None:
    exif = Image.Exif()
    exif[274] = 3
    data = encoded(Image.fromarray(GREY16), "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(0, data, "L")), (GREY16 >> 8)[::-1, ::-1])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0\xff\xff\xff\xff"]
)
def test_exif_that_cannot_be_read_says_nothing(exif: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("PNG", "JPEG", "WEBP"):
        expected = decode(0, encoded(NOISE, name), "RGB")
        assert np.array_equal(np.asarray(decode(0, encoded(NOISE, name, exif=exif), "RGB")), np.asarray(expected))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["WEBP", "PNG"])
def test_of_several_frames_the_first_is_taken(name: str) -> None:
    first, second = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    data = encoded(first, name, save_all=True, append_images=[second])
    assert decode(0, data, "RGB").getpixel((5, 5)) == pytest.approx((255, 0, 0), abs=2)


def test_threads_do_not_disturb_each_other(clip: ImageProcessor) -> None:
    expected = {name: clip(0, data) for name, data in FILES.items()}
    with ThreadPoolExecutor(4) as pool:
        for name, pixels in pool.map(lambda name: (name, clip(0, FILES[name])), list(FILES) * 8):
            assert torch.equal(pixels, expected[name])


# refused


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        pytest.fail("pixels were decoded")

    for kind in (Image.Image, ImageFile, *images.FORMATS.values()):
        monkeypatch.setattr(kind, "load", load)


@pytest.mark.usefixtures("no_decoding")
def test_a_header_that_claims_too_many_pixels_is_refused_undecoded() -> None:
    error = refusal(png(50_000, 50_000))
    assert error.kind is Kind.TOO_LARGE
    assert error.message == "image 3: 2500000000 pixels is over the limit of 67108864 pixels"


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(
    "data",
    [
        b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff" + b"VP8L\0\0\0\0",
        png(60_000, 60_000),
        FILES["jpeg"].replace(struct.pack(">HH", 40, 56), struct.pack(">HH", 60_000, 60_000), 1),
    ],
)
def test_every_format_is_measured_by_its_header(data: bytes) -> None:
    error = refusal(data)
    assert error.kind is Kind.TOO_LARGE
    assert "over the limit of 67108864 pixels" in error.message


def test_the_limit_itself_is_allowed_and_one_pixel_row_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 1000 * 1000)
    assert decode(0, encoded(Image.new("RGB", (1000, 1000)), "PNG"), "RGB").size == (1000, 1000)
    data = encoded(Image.new("RGB", (1000, 1001)), "PNG")
    assert len(data) < 10_000
    monkeypatch.setattr(ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    assert refusal(data).message == "image 3: 1001000 pixels is over the limit of 1000000 pixels"


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(101, 1), "of 101 x 1 pixels one side is over 100 times the other"),
        (
            FILES["progressive jpeg"][:-2]
            + FILES["progressive jpeg"][FILES["progressive jpeg"].rfind(b"\xff\xda") : -2] * 100
            + b"\xff\xd9",
            "the JPEG file has over 100 scans or blocks of EXIF",
        ),
        (
            FILES["jpeg"][:2] + b"\xff\xe1\0\x08Exif\0\0" * 101 + FILES["jpeg"][2:],
            "the JPEG file has over 100 scans or blocks of EXIF",
        ),
        (b"\x89PNG" + bytes(images.MAX_BYTES - 3), "33554433 bytes is over the limit of 33554432 bytes"),
    ],
)
def test_what_is_expensive_to_decode_is_refused_undecoded(data: bytes, message: str) -> None:
    assert message in refusal(data).message


def test_a_bomb_of_compressed_text_is_refused() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 4_000_000, zip=True)
    assert refusal(encoded(NOISE, "PNG", pnginfo=text)).kind is Kind.INVALID


def test_exif_tags_that_all_claim_the_same_bytes_take_no_memory() -> None:
    claims = b"".join(struct.pack("<HHII", 40_000 + tag, 7, 1_000_000, 3614) for tag in range(300))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 300) + claims + bytes(4 + 1_000_000)
    data = encoded(NOISE, "PNG", exif=exif)
    tracemalloc.start()
    try:
        assert decode(0, data, "RGB").size == (56, 40)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
def test_truncated_files_are_refused(name: str, part: float) -> None:
    data = FILES[name][: int(len(FILES[name]) * part)]
    error = refusal(data)
    assert error.kind is Kind.INVALID
    assert error.message.endswith("file is truncated, damaged or of an unsupported kind")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image 3 is empty"),
        (b"my secret diary", "image 3: expected a JPEG, PNG or WebP file"),
        (b"BMy secret diary", "image 3: expected a JPEG, PNG or WebP file"),
        (b"RIFF....WAVEfmt secret", "image 3: expected a JPEG, PNG or WebP file"),
        (b"RIFF....WEBPVP8 secret", "image 3: the WEBP file is truncated, damaged or of an unsupported kind"),
        (png(0, 10), "image 3: the PNG file is truncated, damaged or of an unsupported kind"),
        (png(10, 10), "image 3: the PNG file is truncated, damaged or of an unsupported kind"),
        (png(10, 10, b"SEcr"), "image 3: the PNG file is truncated, damaged or of an unsupported kind"),
    ],
)
def test_other_bytes_are_refused_without_quoting_them(data: bytes, message: str) -> None:
    error = refusal(data)
    assert (error.kind, error.message) == (Kind.INVALID, message)
    assert error.__context__ is None or error.__suppress_context__


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused_with_the_accepted_ones(name: str) -> None:
    error = refusal(REFUSED[name])
    assert (error.kind, error.message) == (Kind.INVALID, "image 3: expected a JPEG, PNG or WebP file")


def test_missing_memory_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile, "load", load)
    assert refusal(FILES["png"]).kind is Kind.OUT_OF_MEMORY


def test_damaged_bytes_give_an_image_or_a_refusal_and_print_nothing(
    clip: ImageProcessor, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(1)
    files = [*FILES.values(), *(data for data, _ in MODES.values())]
    for _ in range(1500):
        data = bytearray(files[draw.integers(len(files))])
        for at in draw.integers(min(len(data), 10 ** draw.integers(1, 5)), size=draw.integers(1, 8)):
            data[at] = draw.integers(256)
        try:
            assert decode(0, bytes(data), "RGB").mode == "RGB"
        except FarsightError as error:
            assert error.kind in (Kind.INVALID, Kind.TOO_LARGE)  # noqa: PT017
    assert capfd.readouterr() == ("", "")


def test_an_odd_exif_tag_neither_refuses_nor_warns(capfd: pytest.CaptureFixture[str]) -> None:
    tags = struct.pack("<HHII", 274, 3, 1, 3) + struct.pack("<HHII", 700, 4, 3000, 38)  # the second runs past the end
    data = encoded(NOISE, "PNG", exif=b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + tags + bytes(4))
    expected = np.asarray(NOISE)[::-1, ::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert np.array_equal(np.asarray(decode(0, data, "RGB")), expected)
    assert np.array_equal(np.asarray(decode(0, data, "RGB")), expected)
    assert capfd.readouterr() == ("", "")


# reading the processor


def test_without_a_file_vits_defaults_are_used(tmp_path: Path) -> None:
    processor = read_processor(tmp_path, ViTConfig(image_size=48))
    expected = ViTImageProcessorPil(size={"height": 48, "width": 48})(images=NOISE, return_tensors="pt")
    assert (processor.size, processor.channels) == ((48, 48), 3)
    assert torch.equal(processor(0, FILES["png"]), expected["pixel_values"][0])
    assert read_processor(tmp_path, ViTConfig(image_size=(32, 64))).size == (32, 64)


def test_a_model_of_grey_images_gets_one_channel(tmp_path: Path) -> None:
    processor = read_processor(tmp_path, ViTConfig(image_size=28, num_channels=1))
    assert processor(0, FILES["png"]).shape == (1, 28, 28)
    assert processor(0, FILES["png"]).min() >= -1


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
        {"image_processor_type": "ViTImageProcessorFast", "size": 32},
        {"do_resize": True, "size": 32},
    ],
)
def test_older_files_are_read_without_a_word(
    tmp_path: Path, settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert read_processor(directory(tmp_path, settings), ViTConfig()).size == (32, 32)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_processor_type": "OursImageProcessor"}, "'OursImageProcessor' is not one of Transformers'"),
        (
            {"image_processor_type": "Ours", "auto_map": {"AutoImageProcessor": "ours.Ours"}},
            "'Ours' is not one of Transformers'",
        ),
        (
            {"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 40, "longest_edge": 90}},
            "of one size from every image",
        ),
    ],
)
def test_a_processor_that_cannot_be_served_is_refused_at_load(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_processor(directory(tmp_path, settings), ViTConfig())


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(30_000)}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0" + bytes(100)}),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (640, 480), (3, 2000)])
def test_pixels_are_read_from_the_header(form: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, form, **options)
    data = buffer.getvalue()
    assert pixels_of(data) == size[0] * size[1]
    assert all(pixels_of(data[:cut]) in (None, size[0] * size[1]) for cut in range(0, len(data), 7))


def test_a_header_that_cannot_be_read_has_no_pixels() -> None:
    assert pixels_of(b"") is None
    assert pixels_of(b"GIF89a" + bytes(100)) is None
    assert pixels_of(b"\xff\xd8" + b"\xff\xe1\x00\x02" * 10_000) is None  # no frame in so many parts
    assert pixels_of(b"\xff\xd8" + bytes(1000)) is None
