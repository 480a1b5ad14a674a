"""Small inputs and a context that a model is verified and measured with at load."""

from __future__ import annotations

from typing import Any

import torch

from service.core.plan import PlanKind
from service.models.hook import ForwardContext
from service.models.inputs.rows import EncodedInput
from service.models.model import Model

PROBE_LENGTHS = (17, 5)  # tokens of the two sequences
# what tokenizers treat in ways of their own: nothing, spaces, cases, accents, scripts, direction, width, length, code
TEXTS = (
    *("", " ", "   ", "\t", "\n\n", " leading", "trailing ", "two  spaces", "line\nbreak", "a", "A", "42", "3.14159"),
    *("The quick brown Fox", "UPPER CASE", "naïve café Ünïcödé", "Straße ΑΒΓ", "e\u0301 combining", "\ufb01 ligature"),
    *("日本語のテキスト", "한국어", "שלום עולם", "مرحبا بالعالم", "हिन्दी", "\U0001f642 emoji"),
    *("\U0001f469\u200d\U0001f467 joined", "zero\u200bwidth\u200d\ufeff", "x\u00a0y", "\x00\x07 control"),
    *("don't, you're: (e.g.) [x] {y} <z>", "https://example.org/a?b=c&d=%20", "def f(x):\n    return x**2"),
    *("ACGTACGTTTGA", "C(=O)O.[Na+]", "query: passage:", "word " * 40, "a" * 300, "antidisestablishmentarianism" * 6),
)
LITERAL = ("<pad>", "<s>", "</s>", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "<|endoftext|>", "<unk>", "<mask>")
MAX_LITERAL = 16  # special tokens of the tokenizer itself that are tried inside a text


def probe_context() -> ForwardContext:
    """A context of exact attention. A new one for each pass: passes write into it."""
    return ForwardContext(PlanKind.DENSE)


def probe_rows(model: Model) -> list[EncodedInput]:
    """Two random inputs, always the same for one model: images, windows of audio, or tokens of PROBE_LENGTHS."""
    draw = torch.Generator().manual_seed(0)
    spec = model.inputs.spec
    if spec.image_processor is not None:
        pixels = torch.randn(2, spec.image_processor.channels, *spec.image_processor.size, generator=draw)
        return [EncodedInput(features=image, states=spec.states) for image in pixels]
    if spec.audio_processor is not None:
        spectrograms = torch.randn(2, *spec.audio_processor.shape, generator=draw)
        return [EncodedInput(features=window, states=spec.states) for window in spectrograms]
    lengths = [min(length, model.info.max_length) for length in PROBE_LENGTHS]
    # not the first ids, which most vocabularies use for special tokens: some models look for those
    low = min(10, model.info.vocab_size - 1)
    ids = [tuple(torch.randint(low, model.info.vocab_size, (n,), generator=draw).tolist()) for n in lengths]
    hf_config = model.module.config
    if hf_config.is_encoder_decoder and hf_config.eos_token_id is not None:  # classifiers need an end token
        ids = [(*row[:-1], hf_config.eos_token_id) for row in ids]
    target = ids[1] if spec.has_target else None
    return [EncodedInput(row, (0,) * len(row) if spec.always_types else None, target) for row in ids]


def probe_texts(tokenizer: Any) -> list[str]:
    """Texts that show how a tokenizer reads: TEXTS, and special tokens spelled out inside a text."""
    literal = dict.fromkeys((*LITERAL, *tokenizer.all_special_tokens[:MAX_LITERAL]))
    return [*TEXTS, *(f"before {token} after" for token in literal), *(f"at the end {token}" for token in literal)]
