"""A decoder in llama.cpp's GGUF file, as a Hugging Face directory with float32 weights; Transformers reads the file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.models.packaged.extra import require

BEGINNING, CONTINUED = "The capital of France is", "Paris"
SHOWN = 4  # tokens


def convert(source: Path, target: Path) -> None:
    """The one GGUF file in `source` into `target`. Raises ModuleNotFoundError if it cannot be read."""
    require("GGUF files", "gguf", "accelerate")
    (file,) = source.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name, local_files_only=True)
    module = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    tied = {"lm_head.weight"} if module.config.tie_word_embeddings else set()
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items() if name not in tied}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(target)
    tokenizer.save_pretrained(target)


@torch.inference_mode()
def prove(source: Path, target: Path) -> str:
    """What the converted model writes after BEGINNING. Raises RuntimeError if only a wrong one would write that."""
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    module = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)
    ids = tokenizer(BEGINNING, return_tensors="pt").input_ids
    for _ in range(SHOWN):
        ids = torch.cat([ids, module(ids).logits[:, -1:].argmax(2)], 1)
    text = str(tokenizer.decode(ids[0], skip_special_tokens=True))
    if CONTINUED not in text:
        raise RuntimeError(f"the converted model continues {BEGINNING!r} as {text!r}, expected {CONTINUED!r}")
    return text
