"""One loaded model: rows in, what its task makes of them out. Runs on the device thread only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

from service.attention.output import no_checkpoint
from service.core.model_info import ModelInfo
from service.core.options import (
    ClassifyOptions,
    EmbedOptions,
    ExplainOptions,
    HiddenOptions,
    ScoreOptions,
)
from service.core.request import ForwardRequest
from service.errors import invalid
from service.models import heads, hook
from service.models.inputs.processor import Inputs
from service.models.inputs.rows import EncodedInput, Tokenized
from service.models.packing import pack, split_by_shape, split_by_tokens
from service.models.tasks import embed, explain, score

Jobs = Sequence[tuple[ForwardRequest, Tokenized]]
States = tuple[Sequence[int], torch.Tensor, torch.Tensor]  # rows' indices, states [T, H], bounds [S + 1]


def by_row(passes: Iterable[States]) -> Iterator[tuple[int, torch.Tensor]]:
    """(a row's index, its own [L, H]) of every pass."""
    for indices, states, bounds in passes:
        yield from zip(indices, torch.split(states, bounds.diff().tolist()), strict=True)


@dataclass(frozen=True, slots=True)
class Computed:
    """Of the inputs of one request: tensors by name, first axis the inputs, and what is told beside them as JSON."""

    tensors: dict[str, torch.Tensor]
    details: Any = None


@dataclass(frozen=True, slots=True)
class Model:
    """`module` is the model with its head, `base` the part that makes hidden states."""

    info: ModelInfo
    inputs: Inputs
    module: Any  # Transformers' modules have what their configuration says, which no type knows
    base: Any
    device: torch.device
    pooling: embed.Pooling
    classifier: heads.Classifier | None = None  # None: the model's own forward pass classifies
    first_position: int = 0
    max_batch_tokens: int = 16384
    history: hook.SparseHistory = field(default_factory=hook.SparseHistory)
    resets: tuple[Callable[[], None], ...] = field(default=())  # before each pass: state that would carry over

    def tokenize(self, request: ForwardRequest) -> Tokenized:
        """The rows of one request; on any thread."""
        return self.inputs.rows(request)

    @torch.inference_mode()
    def run(self, jobs: Jobs, context: hook.ForwardContext) -> list[Computed]:
        """What each request asked for. All have the same task and, but for explanations and scores, equal options."""
        first = jobs[0][0]
        rows = [row for _, tokenized in jobs for row in tokenized.rows]
        match first.task:
            case "embed":
                assert isinstance(first.options, EmbedOptions), "bug: not options of embeddings"
                return self._split(jobs, "embedding", self.embed(rows, context, first.options.dimensions))
            case "classify" | "rerank":
                assert isinstance(first.options, ClassifyOptions), "bug: not options of classification"
                scores = self.classify(rows, context)
                told = scores if first.options.raw_scores else self._probabilities(scores)
                return [replace(one, details=self.info.labels) for one in self._split(jobs, "scores", told)]
            case "score":
                return self._score(jobs, rows, context)
            case "hidden":
                assert isinstance(first.options, HiddenOptions), "bug: not options of hidden states"
                return [self._hidden(tokenized, context, first.options.layer) for _, tokenized in jobs]
            case "explain":
                return [self._explain(request, tokenized, context) for request, tokenized in jobs]

    # -- tasks --------------------------------------------------------------------------------------------------

    def embed(
        self, rows: Sequence[EncodedInput], context: hook.ForwardContext, dimensions: int | None = None
    ) -> torch.Tensor:
        """[rows, dimensions] float32 on the CPU."""
        out = torch.empty(len(rows), dimensions or self.info.dimensions)
        for indices, states, bounds in self.states(rows, context):
            out[list(indices)] = embed.pool(states, bounds, self.pooling, dimensions).cpu()
        return out

    def classify(self, rows: Sequence[EncodedInput], context: hook.ForwardContext) -> torch.Tensor:
        """[rows, labels] float32 logits on the CPU."""
        out = torch.empty(len(rows), len(self.info.labels))
        if self.classifier is None:
            # heads of encoder-decoder models look for one end token in every row, and count them over the batch
            alone = self.module.config.is_encoder_decoder
            for batch in [[at] for at in range(len(rows))] if alone else self._alike(rows):
                try:
                    output = self._pass(self.module, context, None, **self._batch([rows[at] for at in batch]))
                except ValueError as error:
                    raise invalid(f"input {batch[0]}: {error}" if alone else str(error), param="input") from error
                out[batch] = output.logits.float().cpu()
            return out
        for indices, states, bounds in self.states(rows, context):
            out[list(indices)] = self.classifier(states, bounds).float().cpu()
        return out

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        problem = getattr(self.module.config, "problem_type", None)
        if problem == "regression":
            return logits
        return (
            logits.sigmoid() if problem == "multi_label_classification" or logits.shape[1] == 1 else logits.softmax(1)
        )

    def _score(self, jobs: Jobs, rows: Sequence[EncodedInput], context: hook.ForwardContext) -> list[Computed]:
        owners = [request for request, tokenized in jobs for _ in tokenized.rows]
        found: list[score.Scored | None] = [None] * len(rows)
        pause = context.checkpoint or no_checkpoint
        for at, states in by_row(self.scored_states(rows, context)):
            options = owners[at].options
            assert isinstance(options, ScoreOptions), "bug: not options of scores"
            arguments = states, rows[at].target or rows[at].ids, self.logits, options
            found[at] = score.score(*arguments, is_shifted=self.inputs.has_target, pause=pause)
        results, at = [], 0
        for _, tokenized in jobs:
            mine = [one for one in found[at : at + len(tokenized.rows)] if one is not None]
            told = [
                score.document(one, row, self.inputs.tokenizer) for one, row in zip(mine, tokenized.rows, strict=True)
            ]
            sums = torch.tensor([one.logprobs.sum().item() for one in mine])
            counts = torch.tensor([len(one.logprobs) for one in mine])
            results.append(Computed({"logprob_sum": sums, "scored_tokens": counts}, told))
            at += len(tokenized.rows)
        return results

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[n, vocabulary] float32; of models with a target `states` are logits already."""
        return states.float() if self.inputs.has_target else heads.next_token_logits(self.module, states)

    def _hidden(self, tokenized: Tokenized, context: hook.ForwardContext, layer: int) -> Computed:
        rows = tokenized.rows
        parts: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        for at, states in by_row(self.states(rows, context, layer)):
            parts[at] = states.cpu()
        return Computed({"hidden_states": torch.cat(parts), "lengths": torch.tensor([len(part) for part in parts])})

    def _explain(self, request: ForwardRequest, tokenized: Tokenized, context: hook.ForwardContext) -> Computed:
        options, row = request.options, tokenized.rows[0]
        assert isinstance(options, ExplainOptions), "bug: not options of explanations"
        assert self.inputs.tokenizer is not None, "bug: images are not explained"
        tokens = explain.tokens_of(row, request.texts[0] if request.texts else None, self.inputs.tokenizer)
        assert tokenized.query is not None, "bug: tokenised for something else"
        looked = explain.AttentionProbe(tokenized.query, keeps_all=options.rollout)
        for _ in self.states([row], replace(context, observe=looked.see)):
            pass  # the observer has seen it all
        return Computed({}, explain.document(looked, tokens, options, context.checkpoint or no_checkpoint))

    # -- passes -------------------------------------------------------------------------------------------------

    def states(self, rows: Sequence[EncodedInput], context: hook.ForwardContext, layer: int = -1) -> Iterator[States]:
        """Hidden states after `layer`, pass by pass: packed where the model can, else in batches of equal shape."""
        if self.info.packed:
            for run in split_by_tokens([len(row) for row in rows], self.max_batch_tokens):
                packed = pack([rows[at] for at in run], self.device, self.first_position)
                arguments = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
                if packed.type_ids is not None:
                    arguments["token_type_ids"] = packed.type_ids
                states = self._states(context, packed.cu_seqlens, layer, arguments)[0]
                yield run, states, torch.tensor(packed.cu_seqlens, device=self.device)
            return
        for batch in self._alike(rows):
            arguments = self._batch([rows[at] for at in batch])
            arguments.pop("decoder_input_ids", None)  # `base` is the encoder
            yield batch, *self._flat(self._states(context, None, layer, arguments))

    def scored_states(self, rows: Sequence[EncodedInput], context: hook.ForwardContext) -> Iterator[States]:
        """What `logits` turns into logits of the tokens that are scored."""
        return self._target_logits(rows, context) if self.inputs.has_target else self.states(rows, context)

    def _target_logits(self, rows: Sequence[EncodedInput], context: hook.ForwardContext) -> Iterator[States]:
        """Logits of the targets, as the model's own forward pass makes them."""
        for batch in self._alike(rows):
            output = self._pass(self.module, context, None, **self._batch([rows[at] for at in batch]))
            yield batch, *self._flat(output.logits)

    def _flat(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, L, H] -> [S * L, H] and the bounds of each sequence."""
        bounds = accumulate([states.shape[1]] * len(states), initial=0)
        return states.flatten(0, 1), torch.tensor(tuple(bounds), device=self.device)

    def _states(
        self, context: hook.ForwardContext, cu_seqlens: tuple[int, ...] | None, layer: int, arguments: dict[str, Any]
    ) -> torch.Tensor:
        if layer == -1:
            states: torch.Tensor = self._pass(self.base, context, cu_seqlens, **arguments).last_hidden_state
            return states
        output = self._pass(self.base, context, cu_seqlens, output_hidden_states=True, **arguments)
        chosen: torch.Tensor = output.hidden_states[layer]
        return chosen

    def _pass(
        self, module: Any, context: hook.ForwardContext, cu_seqlens: tuple[int, ...] | None, **arguments: Any
    ) -> Any:
        for reset in self.resets:
            reset()
        if self.info.task == "score" or hasattr(module.config, "use_cache"):
            arguments["use_cache"] = False
        context.positions.append(self._positions(arguments))
        with hook.running(replace(context, cu_seqlens=cu_seqlens)):
            return module(**arguments)

    def _positions(self, arguments: dict[str, Any]) -> int:
        if "pixel_values" in arguments:
            return len(arguments["pixel_values"]) * self.inputs.patches
        return sum(arguments[name].numel() for name in ("input_ids", "decoder_input_ids") if name in arguments)

    def _alike(self, rows: Sequence[EncodedInput]) -> list[list[int]]:
        shapes = [(len(row.ids), len(row.target or ()), row.patches) for row in rows]
        return split_by_shape(shapes, self.max_batch_tokens)

    def _batch(self, rows: Sequence[EncodedInput]) -> dict[str, Any]:
        """Arguments of one pass over rows of equal shape."""
        if rows[0].pixels is not None:
            pixels = torch.stack([row.pixels for row in rows if row.pixels is not None])
            return {"pixel_values": pixels.to(self.device, next(self.module.parameters()).dtype)}
        arguments = {"input_ids": torch.tensor([row.ids for row in rows], device=self.device)}
        if any(row.types for row in rows):
            types = [row.types or (0,) * len(row.ids) for row in rows]
            arguments["token_type_ids"] = torch.tensor(types, device=self.device)
        if rows[0].target is not None:
            start = self.module.config.decoder_start_token_id
            shifted = [(start, *(row.target or ())[:-1]) for row in rows]
            arguments["decoder_input_ids"] = torch.tensor(shifted, device=self.device)
        return arguments

    # -- small rules --------------------------------------------------------------------------------------------

    def _split(self, jobs: Jobs, name: str, whole: torch.Tensor) -> list[Computed]:
        """Rows of each request; the chunks of one input become one."""
        found, at = [], 0
        for _, tokenized in jobs:
            part = whole[at : at + len(tokenized.rows)]
            at += len(tokenized.rows)
            if tokenized.chunks:
                lengths = [len(row) for row in tokenized.rows]
                part = embed.merge_chunks(part, lengths, tokenized.rows_per_input, self.pooling)
            found.append(Computed({name: part}))
        return found
