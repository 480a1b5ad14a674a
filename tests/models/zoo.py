"""Small seeded models of every architecture, saved as the directories that the service loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = (
    *("attention", "compares", "every", "token", "with", "other", "and", "somebody", "pays", "the", "animal", "did"),
    *("not", "cross", "street", "because", "it", "was", "tired", "long", "documents", "are", "read", "by", "machines"),
)
VOCABULARY = 128
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
}
DECODER: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1}
DECODER |= {"eos_token_id": 2}

Make = Callable[..., hf.PretrainedConfig]
# every architecture by model_type: its configuration
CONFIGS: dict[str, Make] = {
    "bert": lambda **more: hf.BertConfig(**{**SMALL, **more}),
    "roberta": lambda **more: hf.RobertaConfig(**{**SMALL, "max_position_embeddings": 513, **more}),
    "xlm-roberta": lambda **more: hf.XLMRobertaConfig(**{**SMALL, "max_position_embeddings": 513, **more}),
    "distilbert": lambda **more: hf.DistilBertConfig(
        **{
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 64,
            "pad_token_id": 0,
            **more,
        }
    ),
    "modernbert": lambda **more: hf.ModernBertConfig(
        **{**SMALL, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 4, **more}
    ),
    "gpt2": lambda **more: hf.GPT2Config(
        **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, **more}
    ),
    "llama": lambda **more: hf.LlamaConfig(**{**DECODER, **more}),
    "qwen3": lambda **more: hf.Qwen3Config(**{**DECODER, "head_dim": 16, **more}),
    "mistral": lambda **more: hf.MistralConfig(**{**DECODER, "sliding_window": 8, **more}),
    "gemma": lambda **more: hf.GemmaConfig(**{**DECODER, "head_dim": 16, **more}),
    "gemma2": lambda **more: hf.Gemma2Config(
        **{**DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, **more}
    ),
    "gemma3_text": lambda **more: hf.Gemma3TextConfig(
        **{**DECODER, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, **more}
    ),
    "t5": lambda **more: hf.T5Config(
        **{"vocab_size": VOCABULARY, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 64, **more},
        decoder_start_token_id=0,
    ),
    "bart": lambda **more: hf.BartConfig(
        **{"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, **more},
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=512,
    ),
    "vit": lambda **more: hf.ViTConfig(
        **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, **more},
        image_size=32,
        patch_size=8,
    ),
    "whisper": lambda **more: hf.WhisperConfig(
        **{
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 3,
            "decoder_layers": 1,
            "num_mel_bins": 16,
            **more,
        },
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=100,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        decoder_start_token_id=1,
    ),
}


def save(kind: str, head: type[Any], directory: Path, **more: Any) -> Any:
    """A seeded model of `head` (an Auto class) in `directory`, with its tokenizer. Returns the module, eager."""
    torch.manual_seed(0)
    config = CONFIGS[kind](**more)
    module = head.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # far from the small initial weights, so that differences show
        for parameter in module.parameters():
            parameter.mul_(2.0) if parameter.ndim > 1 else parameter.add_(0.05 * torch.randn_like(parameter))
    module.save_pretrained(directory)
    if kind == "whisper":  # windows of two seconds
        hf.WhisperFeatureExtractor(feature_size=16, chunk_length=2).save_pretrained(directory)
    elif kind != "vit":
        pair = {"bert": True}.get(kind, False)
        save_tokenizer(tokenizer(with_pair_types=pair), directory, gives_types=pair)
    saved = json.loads((directory / "config.json").read_text())
    assert saved["model_type"] == kind
    return module


def save_tokenizer(made: Tokenizer, directory: Path, *, gives_types: bool = False, **settings: Any) -> None:
    """As Transformers saves one: tokenizer.json and `settings` beside it."""
    made.save(str(directory / "tokenizer.json"))
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if gives_types else [])]
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": names, **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(given))


def tokenizer(*, with_pair_types: bool = False) -> Tokenizer:
    """Words and letters to ids below VOCABULARY, [CLS] x [SEP] around them; offsets are those of the text."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    letters = [chr(code) for code in range(33, 97)]
    words = [*special, *WORDS, *letters][:VOCABULARY]
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    second = ":1" if with_pair_types else ":0"
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B{second} [SEP]{second}",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    made.add_special_tokens(special)
    return made
