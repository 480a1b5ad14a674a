"""Models from local Hugging Face directories: safetensors only, no remote code, nothing fetched."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from service.config import ModelConfig
from service.core import ModelInfo, Plan, PlanKind, Work
from service.errors import FarsightError, Kind, invalid, too_large
from service.models import hook
from service.models.files import directory_of
from service.models.packing import pack
from service.models.tasks import embed

# the architectures whose packed pass is proven equal to one-at-a-time passes; others are refused at load
PACKABLE = ("bert",)

CHECK_PLAN = Plan(PlanKind.DENSE, Work(0, 0, 0, 0), 0.0, "start-up check")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids of every input, special tokens included, and what was cut to fit."""

    token_ids: tuple[tuple[int, ...], ...]
    truncated: int
    dropped_tokens: int


@dataclass(frozen=True, slots=True)
class Model:
    """One loaded model: tokenise anywhere, run on the device thread only."""

    info: ModelInfo
    module: torch.nn.Module
    tokenizer: Tokenizer
    pooling: embed.Pooling
    device: torch.device
    max_text_bytes: int

    def tokenize(self, texts: Sequence[str], truncate: Literal["error", "end"]) -> Tokenized:
        """Token ids of `texts`. Too long is refused with both lengths, or cut at the end and counted."""
        for index, text in enumerate(texts):
            size = len(text.encode(errors="surrogatepass"))
            if size > self.max_text_bytes:
                raise too_large(f"input {index}", size, self.max_text_bytes, "bytes", param="input")
        special = self.tokenizer.num_special_tokens_to_add(False)
        token_ids, truncated, dropped = [], 0, 0
        for index, encoding in enumerate(self.tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            over = len(encoding.ids) + special - self.info.max_length
            if over > 0:
                self._refuse_or_allow(index, self.info.max_length + over, truncate)
                encoding.truncate(self.info.max_length - special)
                truncated, dropped = truncated + 1, dropped + over
            ids = tuple(self.tokenizer.post_process(encoding).ids)
            if not ids:
                raise invalid(f"input {index} has no tokens", param="input")
            token_ids.append(ids)
        return Tokenized(tuple(token_ids), truncated, dropped)

    def check_ids(self, rows: Sequence[tuple[int, ...]], truncate: Literal["error", "end"]) -> Tokenized:
        """The same rules for token ids that the caller made: used as they are, no special tokens added."""
        checked, truncated, dropped = [], 0, 0
        for index, row in enumerate(rows):
            ids = row
            if not ids:
                raise invalid(f"input {index} has no tokens", param="input")
            over = len(ids) - self.info.max_length
            if over > 0:
                self._refuse_or_allow(index, len(ids), truncate)
                truncated, dropped = truncated + 1, dropped + over
                ids = ids[: self.info.max_length]
            low, high = min(ids), max(ids)
            if low < 0 or high >= self.info.vocab_size:
                bad = low if low < 0 else high
                raise invalid(f"input {index}: token id {bad} is outside 0..{self.info.vocab_size - 1}", param="input")
            checked.append(ids)
        return Tokenized(tuple(checked), truncated, dropped)

    def _refuse_or_allow(self, index: int, length: int, truncate: str) -> None:
        if truncate == "error":
            raise FarsightError(
                Kind.TOO_LARGE,
                f"input {index} has {length} tokens, over the {self.info.max_length} of model {self.info.name!r}; "
                'shorten it, or set "truncate": "end"',
                code="context_length_exceeded",
                param="input",
            )

    @torch.inference_mode()
    def embed(
        self,
        sequences: Sequence[Sequence[int]],
        plan: Plan,
        dimensions: int | None = None,
        checkpoint: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """S sequences in one packed pass -> [S, dimensions] float32 on the CPU."""
        packed = pack(sequences, self.device)
        context = hook.ForwardContext(plan, packed.cu_seqlens, checkpoint)
        hidden = self.module(
            input_ids=packed.input_ids, position_ids=packed.position_ids, farsight=context
        ).last_hidden_state
        return embed.pool(hidden, packed, self.pooling, dimensions).cpu()


def load(config: ModelConfig, device: torch.device, max_text_bytes: int) -> Model:
    """One model, proven on the device: its packed pass equals one-at-a-time passes, or it is refused."""
    hook.register()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    directory = directory_of(config)
    hf_config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if hf_config.model_type not in PACKABLE:
        raise ValueError(
            f"model {config.name!r}: architecture {hf_config.model_type!r} is not served yet; {', '.join(PACKABLE)} is"
        )
    module = AutoModel.from_pretrained(
        directory,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, config.dtype),
        attn_implementation=hook.NAME,
    ).to(device)
    module.eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = Model(
        info=_info(config, hf_config, module, directory),
        module=module,
        tokenizer=tokenizer,
        pooling=embed.read_pooling(directory),
        device=device,
        max_text_bytes=max_text_bytes,
    )
    _prove_packing(model)
    return replace(model, info=replace(model.info, smallest_pass_s=_smallest_pass_s(model)))


def _info(config: ModelConfig, hf: PretrainedConfig, module: torch.nn.Module, directory: Path) -> ModelInfo:
    positions = int(hf.max_position_embeddings)
    if config.max_length is not None and config.max_length > positions:
        raise ValueError(f"model {config.name!r}: max_length {config.max_length} is over its {positions} positions")
    return ModelInfo(
        name=config.name,
        task="embed",
        architecture=hf.model_type,
        dtype=config.dtype,
        max_length=config.max_length or _declared_length(directory, positions),
        dimensions=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        packed=True,
    )


def _declared_length(directory: Path, positions: int) -> int:
    """What the sentence-transformers file declares, within what the model has positions for."""
    file = directory / "sentence_bert_config.json"
    declared = json.loads(file.read_text()).get("max_seq_length") if file.is_file() else None
    return min(declared or positions, positions)


def _smallest_pass_s(model: Model) -> float:
    """Fastest of a few passes of four tokens: what every pass costs, however short."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        model.embed([(1, 2, 3, 4)], CHECK_PLAN)  # its copy to the CPU waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def _prove_packing(model: Model) -> None:
    """Two different sequences packed must embed as they do alone, or masks were lost somewhere inside the model."""
    step = max(1, model.info.vocab_size // 64)
    first, second = list(range(1, 17 * step, step))[:17], list(range(2, 9 * step, step))[:5]
    together = model.embed([first, second], CHECK_PLAN)
    alone = torch.cat([model.embed([first], CHECK_PLAN), model.embed([second], CHECK_PLAN)])
    worst = (torch.nn.functional.cosine_similarity(together, alone) - 1).abs().max().item()
    if not worst < 1e-3:
        raise RuntimeError(f"model {model.info.name!r}: packed embeddings differ from single ones (cosine {1 - worst})")
