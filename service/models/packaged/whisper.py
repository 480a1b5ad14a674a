"""Whisper from CTranslate2's model.bin, as a Hugging Face directory with float32 weights: its encoder and decoder.

The file is a list of named arrays; CTranslate2 itself is only needed to prove that the converted model answers like it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from service.models.packaged.extra import require

FORMAT, SPECIFICATION = 6, "WhisperSpec"
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
FLOATS = (0, 4)  # integers have scales, which are not read
ROUNDING = 1e-4  # of the norm of the encoder's states, and of the largest score of a next token
SAMPLING_RATE = 16_000
TRANSCRIBED = 8  # tokens
ENGLISH_VOCABULARY, ENGLISH_END = 51864, 50256  # the others have one token more; the next id begins a transcript


def convert(source: Path, target: Path) -> None:
    """model.bin, config.json and tokenizer.json in `source` into `target`. Raises RuntimeError for other arrays."""
    arrays = dict(_arrays(source / "model.bin"))
    settings = json.loads((source / "config.json").read_text())
    vocabulary, width = arrays["decoder/embeddings/weight"].shape
    end = ENGLISH_END if vocabulary == ENGLISH_VOCABULARY else ENGLISH_END + 1
    layers = sum(name.startswith("encoder/layer_") and name.endswith("/ffn/linear_0/bias") for name in arrays)
    heads = int(arrays["encoder/num_heads"])
    inner = len(arrays["encoder/layer_0/ffn/linear_0/bias"])
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=int(arrays["decoder/num_heads"]),
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        max_source_positions=len(arrays["encoder/position_encodings/encodings"]),
        max_target_positions=len(arrays["decoder/position_encodings/encodings"]),
        decoder_start_token_id=end + 1,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    module = WhisperForConditionalGeneration(config)
    module.load_state_dict(dict(_weights(arrays, layers)))
    module.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=end + 1,
        max_length=config.max_target_positions,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
    )
    module.save_pretrained(target)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins)  # type: ignore[no-untyped-call]
    extractor.save_pretrained(target)
    WhisperTokenizer(tokenizer_file=str(source / "tokenizer.json")).save_pretrained(target)


@torch.inference_mode()
def prove(source: Path, target: Path) -> str:
    """Compares states of the encoder and the next tokens with CTranslate2's. Raises RuntimeError, ModuleNotFoundError.

    The sound is made here: sweeps and noise have frequencies in every band.
    """
    require("proofs of Whisper", "ctranslate2")
    import ctranslate2

    original = ctranslate2.models.Whisper(str(source), device="cpu", compute_type="float32")
    module: Any = WhisperForConditionalGeneration.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    extract = WhisperFeatureExtractor.from_pretrained(target, local_files_only=True)
    for index, sound in enumerate(_sounds()):
        features = extract(sound, sampling_rate=SAMPLING_RATE, return_tensors="np")["input_features"]
        theirs = original.encode(ctranslate2.StorageView.from_array(features), to_cpu=True)
        ours = module.get_encoder()(torch.from_numpy(features)).last_hidden_state
        expected = torch.from_numpy(np.array(theirs))
        distance = float((ours - expected).norm() / expected.norm())
        if not distance <= ROUNDING:
            raise RuntimeError(f"sound {index}: the encoder's states differ from CTranslate2's by {distance:.2g}")
        start: int = module.config.decoder_start_token_id
        found = original.generate(theirs, [[start]], max_length=TRANSCRIBED, beam_size=1, return_logits_vocab=True)[0]
        ids = torch.tensor([[start, *found.sequences_ids[0]]])
        logits = module(encoder_outputs=(ours,), decoder_input_ids=ids).logits[0]
        for at, step in enumerate(found.logits[0]):
            scores = torch.from_numpy(np.array(step))
            allowed = scores > torch.finfo(scores.dtype).min  # CTranslate2 rules tokens out by its rules of timestamps
            worst = float((logits[at] - scores)[allowed].abs().max() / scores[allowed].abs().max())
            if not worst <= ROUNDING:
                raise RuntimeError(f"sound {index}: next tokens differ from CTranslate2's by {worst:.2g}")
    return f"states and next tokens of {index + 1} sounds equal CTranslate2's"


def _sounds() -> Iterator[np.ndarray]:
    """Mono, of 2, 11 and 30 seconds, float32 in [-1, 1]."""
    draw = np.random.default_rng(0)
    for seconds in (2, 11, 30):
        time_s = np.arange(seconds * SAMPLING_RATE) / SAMPLING_RATE
        sweep = np.sin(2 * np.pi * (100 * time_s + 3500 * time_s**2 / seconds))
        noise = draw.standard_normal(len(time_s)) * (np.sin(7 * time_s) > 0)
        yield (0.5 * sweep + 0.1 * noise).clip(-1, 1).astype(np.float32)


def _arrays(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of each variable. Raises RuntimeError if the file has another format than is known here."""
    with file.open("rb") as stream:
        version, specification = _number(stream, "I"), _text(stream)
        if (version, specification) != (FORMAT, SPECIFICATION):
            expected = f"{SPECIFICATION} in format {FORMAT}"
            raise RuntimeError(f"{file.name}: expected {expected}, got {specification} in format {version}")
        _number(stream, "I")  # revision of the specification
        for _ in range(_number(stream, "I")):
            name = _text(stream)
            shape = [_number(stream, "I") for _ in range(_number(stream, "B"))]
            kind = _number(stream, "B")
            if kind not in DTYPES or (shape and kind not in FLOATS):
                raise RuntimeError(f"{file.name}: {name} has a type that is not converted ({kind})")
            yield name, np.frombuffer(stream.read(_number(stream, "I")), DTYPES[kind]).reshape(shape)


def _number(stream: BufferedReader, kind: str) -> int:
    """Little-endian: B one byte, H two, I four."""
    number: int
    (number,) = struct.unpack(f"<{kind}", stream.read(struct.calcsize(kind)))
    return number


def _text(stream: BufferedReader) -> str:
    return stream.read(_number(stream, "H"))[:-1].decode()  # ends in a zero byte


def _weights(arrays: dict[str, np.ndarray], layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Float32 under the names of Transformers' Whisper."""

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[name].astype(np.float32))

    def linear(ours: str, theirs: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{ours}.weight", tensor(f"{theirs}/weight")
        yield f"{ours}.bias", tensor(f"{theirs}/bias")

    def norm(ours: str, theirs: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{ours}.weight", tensor(f"{theirs}/gamma")
        yield f"{ours}.bias", tensor(f"{theirs}/beta")

    def fused(ours: str, theirs: str, names: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Projections that CTranslate2 keeps one under the other; keys have no bias."""
        weights, biases = (tensor(f"{theirs}/{part}").chunk(len(names)) for part in ("weight", "bias"))
        for name, weight, bias in zip(names, weights, biases, strict=True):
            yield f"{ours}.{name}_proj.weight", weight.contiguous()
            if name != "k":
                yield f"{ours}.{name}_proj.bias", bias.contiguous()
            elif bool(bias.any()):
                raise RuntimeError(f"{theirs}: keys have a bias")

    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", tensor(f"{side}/position_encodings/encodings")
        yield from norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for index in range(layers):
            ours, theirs = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            yield from norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            yield from fused(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", "qkv")
            yield from linear(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            yield from norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            yield from linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            yield from linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            if side == "decoder":
                yield from norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                yield from linear(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                yield from fused(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", "kv")
                yield from linear(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
    for conv in ("conv1", "conv2"):
        yield from linear(f"model.encoder.{conv}", f"encoder/{conv}")
    for name in ("model.decoder.embed_tokens.weight", "proj_out.weight"):
        yield name, tensor("decoder/embeddings/weight")
