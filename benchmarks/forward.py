"""A long forward pass with our attention, compared with Transformers with SDPA: seconds, plan and error of each layer,
memory.

The model is Llama-like and seeded. As in trained models, its token embeddings share a common direction (half of their
norm). Without it the values of a random model cancel, and the first layer is too diffuse for any selection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModel, LlamaConfig

from benchmarks.attention import race
from benchmarks.contenders import Ran
from service.attention.sparse.bounded_error import ErrorBound
from service.config import Config, ModelConfig
from service.core.options import HiddenOptions
from service.core.plan import PlanKind
from service.core.request import ForwardRequest
from service.models.hook import ForwardContext
from service.models.loading.load import LoadSettings, load
from service.models.model import Model
from service.planning.planner import epsilon_for

VOCABULARY, TOPIC_TOKENS, TOPIC_WORDS = 256, 512, 40


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention call of the sparse pass."""

    plan: str
    density: float | None
    relative_l2_upper: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds are medians over the rounds. `output_error`: relative L2 error of the last hidden states against SDPA."""

    tokens: int
    sparse_s: float
    sdpa_s: float
    speedup: float
    output_error: float
    layers: list[Layer]
    grew_bytes: dict[str, int]  # growth of the process during a pass of each


def run(tokens: int, layers: int, rounds: int, max_error: float, step: Callable[[str], None]) -> Figures:
    """Run both passes in turn, round by round, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        save(directory, tokens, layers)
        config = Config()
        settings = LoadSettings(torch.device("cpu"), config.max_text_bytes, config.max_batch_tokens)
        ours = load(ModelConfig(name="llama-like", path=folder), settings)
        theirs = AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval()
    ids = text(tokens)
    bound = ErrorBound(max_error, PlanKind.DENSE, epsilon_for(max_error, config), config.block_size, config.audit_rows)
    contexts: list[ForwardContext] = []

    def sparse() -> Ran:
        contexts.append(ForwardContext(PlanKind.SPARSE, bound, history=ours.history))
        return Ran(_hidden(ours, ids, contexts[-1])[None, None], PlanKind.SPARSE)

    def sdpa() -> Ran:
        with torch.inference_mode():
            output = theirs(input_ids=torch.tensor([ids]), use_cache=False)
        return Ran(output.last_hidden_state[None], PlanKind.DENSE)

    raced = race({"sparse": sparse, "sdpa": sdpa}, rounds, torch.device("cpu"), step)
    found, expected = raced["sparse"].ran.out, raced["sdpa"].ran.out
    return Figures(
        tokens=tokens,
        sparse_s=median(raced["sparse"].seconds),
        sdpa_s=median(raced["sdpa"].seconds),
        speedup=median(raced["sdpa"].seconds) / median(raced["sparse"].seconds),
        output_error=float((found - expected).norm() / expected.norm()),
        layers=[Layer(str(layer.kind), layer.density, layer.error.relative_l2_upper) for layer in contexts[0].layers],
        grew_bytes={name: contender.peak_bytes for name, contender in raced.items()},
    )


def save(directory: Path, tokens: int, layers: int) -> None:
    """Write a model with 8 heads of 64 and hidden size 512: 2.6 million weights per layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=tokens, pad_token_id=0,
    )  # fmt: skip
    module: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        module.embed_tokens.weight.add_(config.initializer_range * torch.randn(config.hidden_size))
    module.save_pretrained(directory)
    words = {str(number): number for number in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(directory / "tokenizer.json"))


def text(tokens: int) -> tuple[int, ...]:
    """Token ids with drifting topics: every 512 tokens another 40 words of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.randint(10, VOCABULARY, (tokens // TOPIC_TOKENS + 1, TOPIC_WORDS), generator=generator)
    words = torch.randint(0, TOPIC_WORDS, (tokens,), generator=generator)
    ids: list[int] = topics[torch.arange(tokens) // TOPIC_TOKENS, words].tolist()
    return tuple(ids)


def _hidden(model: Model, ids: tuple[int, ...], context: ForwardContext) -> torch.Tensor:
    request = ForwardRequest("bench", "llama-like", "hidden", HiddenOptions(), token_ids=(ids,))
    (computed,) = model.run([(request, model.tokenize(request))], context)
    return computed.tensors["hidden_states"]
