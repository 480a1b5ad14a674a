"""Audio files into what Whisper's encoder takes: windows of 30 seconds, each as a log-mel spectrogram.

Files are decoded here, with limits, because they come from callers; the spectrogram is Transformers' own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from transformers import PretrainedConfig, WhisperFeatureExtractor

from service.attention.output import Checkpoint, no_checkpoint
from service.core.options import Truncate
from service.errors import FarsightError, Kind, invalid, too_large
from service.models.files import read_json

MAX_BYTES = 64 * 1024**2  # of one file
RATES = 4_000, 96_000  # samples per second; a lower rate would make a long signal of a small file
MAX_CHANNELS = 8  # as many as FLAC can have
MAX_NUMBERS_PER_S = 400_000  # of all channels: eight at 48 kHz. Silence compresses so well that bytes are no limit
LARGEST_SAMPLE = 1e6  # of floats; full scale is 1
MAGIC = {b"fLaC": "FLAC", b"RIFF": "WAV"}
ENCODED_MAGIC = (b"ZkxhQ", b"UklGR")  # the same in base64
# of WAV: PCM, floats, A-law and mu-law; no compressed speech (ADPCM, GSM, MP3), whose decoders callers could attack.
# Looked at before libsndfile is: it starts the decoder to read the header
WAV_FORMATS = {1, 3, 6, 7}
EXTENSIBLE = 0xFFFE  # the format follows in the chunk
STREAMED = 0x7FFFFF00  # a size of at least that, or 0, is what writers of streams put: they do not know it
MAX_CHUNKS = 1000
UNKNOWN_FRAMES = 1 << 40  # libsndfile says that there are more if a header does not say how many
LONGEST_DECLARED_S = 24 * 3600.0  # a header that says more is not believed when the rest is counted
BLOCK = 65_536  # samples of each channel that are decoded at a time

_invalid = partial(invalid, param="audio")
_too_large = partial(too_large, param="audio")


@dataclass(frozen=True, slots=True)
class AudioWindow:
    """A part of an audio file as a model takes it."""

    features: torch.Tensor  # [mel bands, frames] float32
    states: int  # of the model's, the ones that hear the file; the others hear the silence after it


@dataclass(frozen=True, slots=True)
class AudioProcessor:
    """Turns an audio file into spectrograms that a Whisper model was trained on."""

    extractor: Any  # Transformers' WhisperFeatureExtractor: calls do not change it, so threads may share it
    states: int  # of the encoder, for each window

    @property
    def shape(self) -> tuple[int, int]:
        """Mel bands and frames of a window."""
        return int(self.extractor.feature_size), int(self.extractor.nb_max_frames)

    @property
    def window_s(self) -> float:
        seconds: float = self.extractor.n_samples / self.extractor.sampling_rate
        return seconds

    def windows(
        self, index: int, data: bytes, truncate: Truncate, most: int, checkpoint: Checkpoint = no_checkpoint
    ) -> tuple[list[AudioWindow], int]:
        """A WAV or FLAC file -> (its windows, the states that were cut off its end).

        Args:
            index: of the file in its request, for messages.
            data: the file.
            truncate: what becomes of a file that is longer than one window: refused, cut, or read window by window.
            most: windows that the request may still have.
            checkpoint: called between blocks of work; raises to stop it.

        Raises FarsightError that names `audio {index}` but no content of the file: 422 if it is not such a file, is
        damaged or has nothing in it; 413 if it is too long.
        """
        rate, size = self.extractor.sampling_rate, self.extractor.n_samples
        decoded = decode(index, data, rate, self.window_s * (most if truncate == "chunk" else 1), checkpoint)
        if decoded.is_cut and truncate != "end":
            raise _too_long(index, decoded, truncate)
        samples = decoded.samples
        windows = []
        for start in range(0, len(samples), size):
            checkpoint()
            windows.append(self._window(samples[start : start + size]))
        left_s = min(decoded.declared_s, LONGEST_DECLARED_S) - self.window_s
        return windows, max(1, math.ceil(left_s * self.states / self.window_s)) if decoded.is_cut else 0

    def check_features(self, features: torch.Tensor) -> torch.Tensor:
        """features [n, mel bands, frames] that the caller has prepared, as float32. Raises FarsightError (422)."""
        if features.ndim != 3 or tuple(features.shape[1:]) != self.shape or not len(features):
            expected = f"[n, {self.shape[0]}, {self.shape[1]}]"
            raise invalid(f"input_features: expected {expected}, got {list(features.shape)}", param="input_features")
        if not features.is_floating_point() or not bool(features.isfinite().all()):
            raise invalid("input_features: expected finite floating-point numbers", param="input_features")
        return features.float()

    def _window(self, samples: np.ndarray) -> AudioWindow:
        rate = self.extractor.sampling_rate
        features: torch.Tensor = self.extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"][0]
        return AudioWindow(features.float(), self._states(samples))

    def _states(self, samples: np.ndarray) -> int:
        """States that hear these samples of a window, at least one."""
        return max(1, math.ceil(len(samples) * self.states / int(self.extractor.n_samples)))


def read_processor(directory: Path, hf_config: PretrainedConfig) -> AudioProcessor:
    """Read preprocessor_config.json. Raises ValueError if it is missing or does not fit a Whisper model."""
    declared = read_json(directory / "preprocessor_config.json").get("feature_extractor_type")
    if declared != "WhisperFeatureExtractor":
        raise ValueError(f"{directory}: expected WhisperFeatureExtractor in preprocessor_config.json, got {declared!r}")
    extractor = WhisperFeatureExtractor.from_pretrained(directory, local_files_only=True)
    bands, frames = extractor.feature_size, extractor.nb_max_frames
    if bands != hf_config.num_mel_bins or frames != 2 * hf_config.max_source_positions:
        expected = f"{hf_config.num_mel_bins} mel bands and {2 * hf_config.max_source_positions} frames"
        raise ValueError(f"{directory}: the model takes {expected}, its preprocessor makes {bands} and {frames}")
    return AudioProcessor(extractor, hf_config.max_source_positions)


class _Stream(soundfile.SoundFile):  # type: ignore[misc]
    """Read from the beginning to the end. Otherwise a position is set after each block, which fails at the end of FLAC
    files whose header does not say how long they are, as encoders write into a pipe."""

    read_frames = 0  # samples of each channel so far

    def seekable(self) -> bool:
        return False

    def blocks_of(self, size: int) -> Iterator[np.ndarray]:
        """[n, channels] float32, n <= size."""
        while len(block := self.read(size, dtype="float32", always_2d=True)):
            self.read_frames += len(block)
            yield block


@dataclass(frozen=True, slots=True)
class DecodedAudio:
    """The beginning of an audio file."""

    samples: np.ndarray  # [n] float32, all channels averaged
    is_cut: bool  # there is more in the file
    declared_s: float  # length of the file as its header says, which may be wrong; 0: it does not say
    limit_s: float  # of `samples`


def decode(index: int, data: bytes, rate: int, limit_s: float, checkpoint: Checkpoint = no_checkpoint) -> DecodedAudio:
    """At most `limit_s` seconds of a WAV or FLAC file, at `rate` samples per second; no more are read.

    Raises FarsightError as `AudioProcessor.windows` does.
    """
    format_ = _format(index, data)
    if format_ == "WAV":
        _check_wav(index, data)
    limit, count, parts = math.floor(limit_s * rate), 0, []
    try:
        with _Stream(io.BytesIO(data)) as file:
            _check_header(index, file)
            declared = file.frames if file.frames < UNKNOWN_FRAMES else 0
            declared_s = declared / file.samplerate
            for part in _resampled(file, rate):
                checkpoint()
                parts.append(part)
                count += len(part)
                if count > limit:
                    break
            else:
                if declared and declared != file.read_frames:  # FLAC ends in silence where frames are missing
                    raise _incomplete(index, format_, file.read_frames, declared, "samples")
    except soundfile.LibsndfileError:
        raise _invalid(f"audio {index}: the {format_} file is damaged or of an unsupported kind") from None
    samples = np.concatenate(parts)[:limit] if parts else np.empty(0, np.float32)
    if not len(samples):
        raise _invalid(f"audio {index}: the {format_} file has no samples at {rate} per second")
    if not np.abs(samples).max() <= LARGEST_SAMPLE:  # NaN is not
        raise _invalid(f"audio {index}: the {format_} file has samples that are not finite or over {LARGEST_SAMPLE:g}")
    return DecodedAudio(samples, count > limit, declared_s, limit_s)


def _format(index: int, data: bytes) -> str:
    if not data:
        raise _invalid(f"audio {index} is empty")
    if len(data) > MAX_BYTES:
        raise _too_large(f"audio {index}", len(data), MAX_BYTES, "bytes")
    format_ = MAGIC.get(bytes(data[:4]))
    if format_ is None or (format_ == "WAV" and data[8:12] != b"WAVE"):
        hint = "; this is base64 of one, expected its bytes" if data[:5] in ENCODED_MAGIC else ""
        raise _invalid(f"audio {index}: expected a WAV or FLAC file{hint}")
    return format_


def _check_wav(index: int, data: bytes) -> None:
    """Walks the chunks of a WAV file, up to its samples: its format, and whether they are all there."""
    at, format_ = 12, 0
    for _ in range(MAX_CHUNKS):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8
        if name == b"fmt ":
            format_ = int.from_bytes(data[at : at + 2], "little")
            if format_ == EXTENSIBLE:
                format_ = int.from_bytes(data[at + 24 : at + 26], "little")
            if format_ not in WAV_FORMATS:
                raise _invalid(f"audio {index}: format {format_} inside WAV is not supported; expected PCM samples")
        if name == b"data" and format_:
            if len(data) - at < size < STREAMED:
                raise _incomplete(index, "WAV", len(data) - at, size, "bytes of samples")
            return
        at += size + size % 2
        if at > len(data):
            break
    raise _invalid(f"audio {index}: the WAV file is damaged or of an unsupported kind")


def _check_header(index: int, file: soundfile.SoundFile) -> None:
    low, high = RATES
    if not low <= file.samplerate <= high:
        raise _invalid(f"audio {index}: expected {low} to {high} samples per second, got {file.samplerate}")
    if file.channels > MAX_CHANNELS:
        raise _invalid(f"audio {index}: expected at most {MAX_CHANNELS} channels, got {file.channels}")
    numbers = file.channels * file.samplerate
    if numbers > MAX_NUMBERS_PER_S:
        raise _too_large(f"audio {index}: samples of all channels", numbers, MAX_NUMBERS_PER_S, "per second")


def _resampled(file: _Stream, rate: int) -> Iterator[np.ndarray]:
    """Blocks of samples at `rate`: memory does not grow with what a header promises."""
    resampler = None if file.samplerate == rate else soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32")
    for block in file.blocks_of(BLOCK):
        with np.errstate(all="ignore"):  # `decode` refuses sums that are not finite
            mono = block.mean(axis=1, dtype=np.float32)
        yield mono if resampler is None else resampler.resample_chunk(mono)
    if resampler is not None:
        yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def _incomplete(index: int, format_: str, found: int, declared: int, unit: str) -> FarsightError:
    return _invalid(f"audio {index}: the {format_} file is incomplete: {found} of {declared} {unit}")


def _too_long(index: int, decoded: DecodedAudio, truncate: Truncate) -> FarsightError:
    got = f"{decoded.declared_s:.1f} s" if decoded.declared_s > decoded.limit_s else "more"
    advice = '; use truncate "chunk" or "end"' if truncate == "error" else ""
    message = f"audio {index}: expected at most {decoded.limit_s:g} s, got {got}{advice}"
    return FarsightError(Kind.TOO_LARGE, message, param="audio")
