"""Audio: files as a Whisper encoder hears them, equal to Transformers; what is refused, before it takes memory."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
import transformers as hf

from service.config import ModelConfig
from service.errors import FarsightError, Kind
from service.models.files import directory_of
from service.models.inputs import audio
from service.models.model import Model
from tests.models import zoo
from tests.models.common import asked, loaded, run

RATE, WINDOW_S, STATES = 16_000, 2, 100  # of zoo's Whisper


def sound(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """A sweep with noise: [samples] float32 whose numbers 16 bits hold exactly."""
    time_s = np.arange(round(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * (200 + 300 * seed + 900 * time_s) * time_s)
    noise = np.random.default_rng(seed).standard_normal(len(time_s))
    return (np.round((wave + 0.05 * noise).clip(-1, 1) * 32767) / 32768).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("whisper")
    zoo.save("whisper", hf.AutoModel, root)
    return root


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    model = loaded(directory)
    return replace(model, inputs=replace(model.inputs, max_windows=4))


@pytest.fixture(scope="module")
def encoder(directory: Path) -> Any:
    return hf.WhisperModel.from_pretrained(directory, attn_implementation="eager").get_encoder().eval()


def expected(directory: Path, encoder: Any, samples: np.ndarray) -> torch.Tensor:
    """States [L, H] of one window by Transformers, without those that hear only the silence after the end."""
    extractor = hf.WhisperFeatureExtractor.from_pretrained(directory)
    features = extractor(samples, sampling_rate=RATE, return_tensors="pt")["input_features"]
    with torch.inference_mode():
        states: torch.Tensor = encoder(features).last_hidden_state[0]
    return states[: -(-len(samples) * STATES // (WINDOW_S * RATE))]


def unit(states: torch.Tensor) -> torch.Tensor:
    """The mean of states [L, H], of unit norm."""
    mean = states.mean(0)
    return mean / mean.norm()


def refused(model: Model, *files: bytes, task: Any = "embed", **options: Any) -> FarsightError:
    with pytest.raises(FarsightError) as caught:
        model.tokenize(asked(task, audio=files, **options))
    return caught.value


def test_what_is_said_of_the_model(model: Model) -> None:
    info = model.info
    assert (info.inputs, info.task, info.max_length, info.dimensions, info.packed) == ("audio", "embed", 100, 32, False)
    assert sum(kind.count for kind in info.attention) == 3
    # two convolutions, then three layers of four projections and two linear layers, over 200 and 100 positions
    convolutions = 200 * 16 * 32 * 3 + 100 * 32 * 32 * 3
    assert info.weights.sequence == convolutions + 3 * 100 * (4 * 32 * 32 + 2 * 32 * 64)


@pytest.mark.parametrize(
    "file",
    [
        encoded(sound(1.234)),
        encoded(sound(1.234), kind="FLAC"),
        encoded(sound(1.234), kind="FLAC", subtype="PCM_24"),
        encoded(sound(1.234), subtype="FLOAT"),
        encoded(np.stack([sound(1.234), sound(1.234)], 1)),
    ],
    ids=["wav", "flac", "flac24", "float", "stereo"],
)
def test_states_and_embedding_are_transformers_own(model: Model, directory: Path, encoder: Any, file: bytes) -> None:
    wanted = expected(directory, encoder, sound(1.234))
    (hidden,) = run(model, asked("hidden", audio=(file,)))
    assert hidden.tensors["lengths"].tolist() == [62]
    torch.testing.assert_close(hidden.tensors["hidden_states"], wanted, atol=1e-4, rtol=1e-4)
    (embedded,) = run(model, asked("embed", audio=(file,)))
    torch.testing.assert_close(embedded.tensors["embedding"][0], unit(wanted), atol=1e-4, rtol=1e-4)


def test_other_sampling_rates_are_resampled_whole(model: Model, directory: Path, encoder: Any) -> None:
    samples = sound(1.5, 8_000)
    wanted = expected(directory, encoder, soxr.resample(samples, 8_000, RATE))
    (found,) = run(model, asked("embed", audio=(encoded(samples, 8_000),)))
    assert (found.tensors["embedding"][0] - unit(wanted)).norm() < 1e-3
    for rate in (8_000, 22_050, 44_100, 96_000):  # longer than one block
        decoded = audio.decode(0, encoded(sound(9.0, rate), rate), RATE, 10)
        assert len(decoded.samples) == pytest.approx(9 * RATE, abs=1)
        assert (decoded.is_cut, decoded.declared_s) == (False, pytest.approx(9, abs=1e-3))


def test_files_of_different_lengths_share_a_pass(model: Model, directory: Path, encoder: Any) -> None:
    parts = [sound(0.3, seed=1), sound(2.0, seed=2), sound(1.1, seed=3)]
    (found,) = run(model, asked("embed", audio=tuple(map(encoded, parts))))
    for vector, samples in zip(found.tensors["embedding"], parts, strict=True):
        wanted = unit(expected(directory, encoder, samples))
        torch.testing.assert_close(vector, wanted, atol=1e-4, rtol=1e-4)


def test_a_long_file_window_by_window(model: Model, directory: Path, encoder: Any) -> None:
    samples = sound(5.0)
    windows = [samples[start : start + WINDOW_S * RATE] for start in range(0, len(samples), WINDOW_S * RATE)]
    states = [expected(directory, encoder, window) for window in windows]
    request = asked("embed", audio=(encoded(samples),), truncate="chunk")
    tokenized = model.tokenize(request)
    assert (tokenized.rows_per_input, [row.length for row in tokenized.rows]) == ((3,), [100, 100, 50])
    assert sum(map(len, tokenized.rows)) == 300  # what is computed, and paid
    (found,) = run(model, request)
    # each window's embedding has unit norm before they are averaged, as with chunks of texts
    mean = sum(len(window) * unit(window) for window in states)
    torch.testing.assert_close(found.tensors["embedding"][0], mean / mean.norm(), atol=1e-4, rtol=1e-4)
    cut = asked("embed", audio=(encoded(samples),), truncate="end")
    tokenized = model.tokenize(cut)
    assert (len(tokenized.rows), tokenized.truncated, tokenized.dropped_tokens) == (1, 1, 150)
    torch.testing.assert_close(run(model, cut)[0].tensors["embedding"][0], unit(states[0]), atol=1e-4, rtol=1e-4)


def test_a_file_that_is_too_long_is_refused_with_both_numbers(model: Model) -> None:
    error = refused(model, encoded(sound(1)), encoded(sound(2.5)))
    assert error.kind is Kind.TOO_LARGE
    assert 'audio 1: expected at most 2 s, got 2.5 s; use truncate "chunk" or "end"' in error.message
    error = refused(model, encoded(sound(1)), encoded(sound(6.1)), encoded(sound(1)), truncate="chunk")
    assert (error.kind, error.message) == (Kind.TOO_LARGE, "audio 1: expected at most 4 s, got 6.1 s")
    error = refused(model, *[encoded(sound(0.1))] * 5)
    assert (error.kind, error.message) == (Kind.TOO_LARGE, "audio: 5 windows is over the limit of 4 windows")


def test_a_long_file_is_read_no_further_than_it_is_used(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    whole = audio._Stream.read
    monkeypatch.setattr(audio._Stream, "read", lambda self, *a, **k: read.append(1) or whole(self, *a, **k))
    file = encoded(np.zeros(600 * RATE, np.float32), kind="FLAC")  # ten minutes of silence
    assert len(file) < 100_000
    (row,) = model.tokenize(asked("embed", audio=(file,), truncate="end")).rows
    assert row.length == STATES
    assert len(read) <= 1 + WINDOW_S * RATE // audio.BLOCK + 1
    tokenized = model.tokenize(asked("embed", audio=(file,) * 4, truncate="end"))  # each has its one window
    assert (len(tokenized.rows), tokenized.dropped_tokens) == (4, 4 * 299 * STATES)
    read.clear()
    assert refused(model, file).message.startswith("audio 0: expected at most 2 s, got 600.0 s")
    assert refused(model, file, truncate="chunk").message == "audio 0: expected at most 8 s, got 600.0 s"
    assert len(read) <= 2 * (1 + 8 * RATE // audio.BLOCK + 1)
    unknown = flac_of(0, samples=sound(2.5))
    assert model.tokenize(asked("embed", audio=(unknown,), truncate="end")).dropped_tokens == 1
    assert "got more" in refused(model, unknown).message


def test_a_header_does_not_decide_what_is_read(model: Model) -> None:
    file = bytearray(encoded(sound(0.5)))
    at = file.index(b"data") + 4
    file[at : at + 4] = struct.pack("<I", 0x7FFFFFF0)  # promises 18 hours
    (row,) = model.tokenize(asked("embed", audio=(bytes(file),))).rows
    assert row.length == 25


def flac_of(declared: int, samples: np.ndarray | None = None) -> bytes:
    """A FLAC file, of half a second if no samples are given, whose header declares so many samples (36 bits)."""
    file = bytearray(encoded(sound(0.5) if samples is None else samples, kind="FLAC"))
    word = int.from_bytes(file[18:26], "big") & ~((1 << 36) - 1)
    file[18:26] = (word | declared).to_bytes(8, "big")
    return bytes(file)


def test_a_flac_header_that_promises_more_is_not_believed(model: Model) -> None:
    (row,) = model.tokenize(asked("embed", audio=(flac_of(0),))).rows  # 0: unknown, as written into a pipe
    assert row.length == 25
    error = refused(model, flac_of((1 << 36) - 1))
    assert (error.kind, error.message) == (
        Kind.INVALID,
        "audio 0: the FLAC file is incomplete: 8000 of 68719476735 samples",
    )
    cut = flac_of((1 << 36) - 1, samples=sound(2.5))
    dropped = model.tokenize(asked("embed", audio=(cut,), truncate="end")).dropped_tokens
    assert dropped == (24 * 3600 - WINDOW_S) * STATES // WINDOW_S  # as the header says, but for a day at most


def test_a_file_that_ends_early_is_refused(model: Model) -> None:
    whole = encoded(sound(1.9), kind="FLAC")
    frames = [at for at in range(100, len(whole) - 1) if whole[at] == 0xFF and whole[at + 1] & 0xFE == 0xF8]
    assert len(frames) > 3
    for at in frames:  # where a frame begins: what is before is complete
        error = refused(model, whole[:at])
        assert error.kind is Kind.INVALID
    assert refused(model, encoded(sound(1.9))[:20_000]).message == (
        "audio 0: the WAV file is incomplete: 19956 of 60800 bytes of samples"
    )


def test_decoding_ends_when_nobody_waits_for_it(model: Model) -> None:
    asked_for, file = [], encoded(sound(7.9))

    def checkpoint() -> None:
        asked_for.append(1)
        if len(asked_for) > 2:
            raise FarsightError(Kind.CANCELLED, "the caller left")

    with pytest.raises(FarsightError, match="the caller left"):
        model.tokenize(asked("embed", audio=(file,), truncate="chunk"), checkpoint)
    assert len(asked_for) == 3


ADPCM = encoded(sound(0.5), subtype="MS_ADPCM")
MP3 = encoded(sound(0.5)).replace(b"fmt \x10\0\0\0\x01\0", b"fmt \x10\0\0\0\x55\0")


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        (b"", Kind.INVALID, "audio 0 is empty"),
        (b"ID3\x04 not served", Kind.INVALID, "audio 0: expected a WAV or FLAC file"),
        (b"RIFF\x00\x00\x00\x00WEBP", Kind.INVALID, "audio 0: expected a WAV or FLAC file"),
        (b"RIFF\x00\x00\x00\x00WAVE", Kind.INVALID, "damaged"),
        (b"fLaC" + bytes(64), Kind.INVALID, "damaged"),
        (encoded(sound(0.5), kind="FLAC")[:300], Kind.INVALID, "audio 0"),
        (encoded(np.empty(0, np.float32)), Kind.INVALID, "no samples"),
        (encoded(np.ones(1, np.float32), rate=96_000), Kind.INVALID, "no samples at 16000 per second"),
        (encoded(np.zeros((800, 8), np.float32), rate=96_000), Kind.TOO_LARGE, "768000 per second is over the limit"),
        (encoded(np.full(800, 1e18, np.float32), subtype="FLOAT"), Kind.INVALID, "not finite or over 1e+06"),
        (ADPCM, Kind.INVALID, "format 2 inside WAV is not supported"),
        (MP3, Kind.INVALID, "format 85 inside WAV is not supported"),
        (b"RIFF\0\0\0\0WAVE" + 2000 * b"junk\0\0\0\0", Kind.INVALID, "damaged"),
        (encoded(sound(0.5), rate=1_000), Kind.INVALID, "expected 4000 to 96000 samples per second, got 1000"),
        (encoded(np.zeros((800, 9), np.float32)), Kind.INVALID, "expected at most 8 channels, got 9"),
        (encoded(np.full(800, np.nan, np.float32), subtype="FLOAT"), Kind.INVALID, "not finite"),
        (encoded(np.full((800, 2), [np.inf, -np.inf], np.float32), subtype="FLOAT"), Kind.INVALID, "not finite"),
        (b"RIFF" + bytes(audio.MAX_BYTES), Kind.TOO_LARGE, "audio 0"),
    ],
)
def test_refused_files(model: Model, file: bytes, kind: Kind, message: str) -> None:
    error = refused(model, file)
    assert error.kind is kind
    assert message in error.message
    assert error.param == "audio"


def read_or_refused(model: Model, file: bytes) -> tuple[set[int], set[Kind]]:
    """States that hear the file, or the kind of its refusal."""
    try:
        return {row.length for row in model.tokenize(asked("embed", audio=(file,))).rows}, set()
    except FarsightError as error:
        return set(), {error.kind}


def test_every_cut_of_a_file_is_read_or_refused(model: Model) -> None:
    for kind in ("WAV", "FLAC"):
        whole = encoded(sound(0.05), kind=kind)
        for size in range(0, len(whole), 7):
            lengths, kinds = read_or_refused(model, whole[:size])
            assert lengths <= {1, 2, 3}
            assert kinds <= {Kind.INVALID}


def test_prepared_spectrograms(model: Model, directory: Path, encoder: Any) -> None:
    extractor = hf.WhisperFeatureExtractor.from_pretrained(directory)
    features = extractor([sound(1), sound(2)], sampling_rate=RATE, return_tensors="pt")["input_features"]
    (found,) = run(model, asked("hidden", features=features))
    with torch.inference_mode():
        wanted = encoder(features).last_hidden_state
    torch.testing.assert_close(found.tensors["hidden_states"], wanted.flatten(0, 1), atol=1e-4, rtol=1e-4)
    for wrong in (features[:, :8], features[:1, 0], features.long(), torch.full_like(features, torch.nan)):
        with pytest.raises(FarsightError, match="input_features: expected"):
            model.tokenize(asked("hidden", features=wrong))


def test_directories_that_are_refused_by_a_sentence(directory: Path, tmp_path: Path) -> None:
    zoo.save("whisper", hf.AutoModel, tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "feature_size": 80}))
    with pytest.raises(ValueError, match="takes 16 mel bands and 200 frames, its preprocessor makes 80 and 200"):
        loaded(tmp_path)
    with pytest.raises(ValueError, match="the encoder of whisper is served, for embed, not for score"):
        loaded(tmp_path, task="score")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="expected WhisperFeatureExtractor in preprocessor_config"):
        loaded(tmp_path)
    hf.Wav2Vec2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="wav2vec2 takes audio; of such models Whisper's encoder is served"):
        directory_of(ModelConfig(name="m", path=str(tmp_path)))
