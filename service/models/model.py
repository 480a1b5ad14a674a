"""One loaded model: runs its tasks on the rows of requests. On the device thread only, except `tokenize`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

from service.attention.output import Checkpoint, no_checkpoint
from service.core.model_info import ModelInfo
from service.core.options import (
    ClassifyOptions,
    EmbedOptions,
    ExplainOptions,
    HiddenOptions,
    ScoreOptions,
)
from service.core.passes import split_by_shape, split_by_tokens
from service.core.request import ForwardRequest
from service.errors import invalid
from service.models import heads, hook
from service.models.inputs.processor import InputProcessor
from service.models.inputs.rows import EncodedInput, Tokenized
from service.models.packing import computed_positions, pack, stack
from service.models.tasks import embed, explain, score

TokenizedRequests = Sequence[tuple[ForwardRequest, Tokenized]]


@dataclass(frozen=True, slots=True)
class PassStates:
    """States of one pass, sequence after sequence."""

    indices: Sequence[int]  # of the rows in this pass
    states: torch.Tensor  # [T, H]
    bounds: torch.Tensor  # [S + 1] int64: sequence i is states[bounds[i]:bounds[i + 1]]


def states_by_row(passes: Iterable[PassStates]) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, states [L, H]) of each row."""
    for part in passes:
        yield from zip(part.indices, torch.split(part.states, part.bounds.diff().tolist()), strict=True)


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """Results of one request: tensors by name, their first axis the inputs, and results that are JSON."""

    tensors: dict[str, torch.Tensor]
    details: Any = None


@dataclass(frozen=True, slots=True)
class Model:
    """A Transformers model on a device, with what its tasks need."""

    info: ModelInfo
    inputs: InputProcessor
    module: Any  # the model with its head; Any, because its attributes depend on the architecture
    base: Any  # the part of `module` that computes hidden states
    device: torch.device
    pooling: embed.Pooling
    classifier: heads.Classifier | None = None  # None: classified by the model's own forward pass
    activation: str | None = None  # stored for the head's logits: "Identity" or "Sigmoid"; None: by the kind of head
    first_position: int = 0
    padding_id: int | None = None  # tokens of this id take no position, also inside a text (RoBERTa)
    max_batch_tokens: int = 16384
    history: hook.SparseHistory = field(default_factory=hook.SparseHistory)
    resets: tuple[Callable[[], None], ...] = ()  # called before each pass: state that must not carry over

    def tokenize(self, request: ForwardRequest, checkpoint: Checkpoint = no_checkpoint) -> Tokenized:
        """The rows of one request, on any thread. Raises FarsightError like `InputProcessor.encode`."""
        return self.inputs.encode(request, checkpoint)

    @torch.inference_mode()
    def run(self, requests: TokenizedRequests, context: hook.ForwardContext) -> list[TaskOutput]:
        """The results of each request. All have the same task and, except for `explain` and `score`, equal options.

        Raises FarsightError (422) if the model itself refuses an input.
        """
        first = requests[0][0]
        rows = [row for _, tokenized in requests for row in tokenized.rows]
        match first.task:
            case "embed":
                assert isinstance(first.options, EmbedOptions), "bug: expected options of embed"
                vectors = self.embed(rows, context, size := first.options.dimensions)
                return self._by_request(requests, "embedding", vectors, is_cut=size is not None)
            case "classify" | "rerank":
                assert isinstance(first.options, ClassifyOptions), "bug: expected options of classify"
                logits = self.classify(rows, context)
                scores = logits if first.options.raw_scores else self._probabilities(logits)
                outputs = self._by_request(requests, "scores", scores)
                return [replace(output, details=self.info.labels) for output in outputs]
            case "score":
                return self._score(requests, rows, context)
            case "hidden":
                assert isinstance(first.options, HiddenOptions), "bug: expected options of hidden"
                return [self._hidden(tokenized, context, first.options.layer) for _, tokenized in requests]
            case "explain":
                return [self._explain(request, tokenized, context) for request, tokenized in requests]

    # -- tasks --------------------------------------------------------------------------------------------------

    def embed(
        self, rows: Sequence[EncodedInput], context: hook.ForwardContext, dimensions: int | None = None
    ) -> torch.Tensor:
        """Embeddings of n rows: [n, dimensions] float32 on the CPU."""
        vectors: dict[int, torch.Tensor] = {}
        for part in self.hidden_states(rows, context):
            prompts = torch.tensor([rows[index].prompt for index in part.indices], device=self.device)
            pooled = embed.pool(part.states, part.bounds, self.pooling, prompts=prompts, dimensions=dimensions)
            vectors.update(zip(part.indices, pooled.cpu(), strict=True))
        return torch.stack([vectors[index] for index in range(len(rows))])

    def classify(self, rows: Sequence[EncodedInput], context: hook.ForwardContext) -> torch.Tensor:
        """Logits of n rows: [n, labels] float32 on the CPU. Raises FarsightError (422) if the head refuses a row."""
        out = torch.empty(len(rows), len(self.info.labels))
        if self.classifier is None:
            config = self.module.config
            # heads of encoder-decoder models require one end token in every row, equally many in all rows of a batch;
            # heads of decoders without a padding token refuse batches
            alone = config.is_encoder_decoder or (
                self.inputs.spec.tokenizer is not None and config.get_text_config().pad_token_id is None
            )
            for batch in [[index] for index in range(len(rows))] if alone else self._same_shape(rows):
                try:
                    logits = self.head_logits([rows[index] for index in batch], context)
                except ValueError as error:
                    raise invalid(f"input {batch[0]}: {error}" if alone else str(error), param="input") from error
                out[batch] = logits.float().cpu()
            return out
        for part in self.hidden_states(rows, context):
            ids = torch.tensor([token for index in part.indices for token in rows[index].ids], device=self.device)
            out[list(part.indices)] = self.classifier(part.states, part.bounds, ids).float().cpu()
        return out

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """States of `scored_states` -> [n, vocabulary] float32. Those of models with a target are logits already."""
        return states.float() if self.inputs.spec.has_target else heads.next_token_logits(self.module, states)

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        problem = getattr(self.module.config, "problem_type", None)
        if self.activation is not None:
            return logits.sigmoid() if self.activation == "Sigmoid" else logits
        if problem == "regression" and self.info.task != "rerank":
            return logits
        if problem == "multi_label_classification" or logits.shape[1] == 1:
            return logits.sigmoid()
        return logits.softmax(1)

    def _score(
        self, requests: TokenizedRequests, rows: Sequence[EncodedInput], context: hook.ForwardContext
    ) -> list[TaskOutput]:
        options_by_row = [request.options for request, tokenized in requests for _ in tokenized.rows]
        scores: dict[int, score.TokenScores] = {}
        for index, states in states_by_row(self.scored_states(rows, context)):
            options = options_by_row[index]
            assert isinstance(options, ScoreOptions), "bug: expected options of score"
            scores[index] = score.score(
                states,
                rows[index].target or rows[index].ids,
                self.logits,
                options,
                is_shifted=self.inputs.spec.has_target,
                checkpoint=context.checkpoint or no_checkpoint,
            )
        ordered = iter(scores[index] for index in range(len(rows)))
        return [self._scored([(row, next(ordered)) for row in tokenized.rows]) for _, tokenized in requests]

    def _scored(self, scores: Sequence[tuple[EncodedInput, score.TokenScores]]) -> TaskOutput:
        details = [score.document(found, row, self.inputs.spec.tokenizer) for row, found in scores]
        sums = torch.tensor([found.logprobs.sum().item() for _, found in scores])
        counts = torch.tensor([len(found.logprobs) for _, found in scores])
        return TaskOutput({"logprob_sum": sums, "scored_tokens": counts}, details)

    def _hidden(self, tokenized: Tokenized, context: hook.ForwardContext, layer: int) -> TaskOutput:
        parts: list[torch.Tensor] = [torch.empty(0)] * len(tokenized.rows)
        for index, states in states_by_row(self.hidden_states(tokenized.rows, context, layer)):
            parts[index] = states.cpu()
        lengths = torch.tensor([len(part) for part in parts])
        return TaskOutput({"hidden_states": torch.cat(parts), "lengths": lengths})

    def _explain(self, request: ForwardRequest, tokenized: Tokenized, context: hook.ForwardContext) -> TaskOutput:
        options, row, tokenizer = request.options, tokenized.rows[0], self.inputs.spec.tokenizer
        assert isinstance(options, ExplainOptions), "bug: expected options of explain"
        assert tokenizer is not None, "bug: only texts can be explained"
        assert tokenized.query is not None, "bug: tokenized for another task"
        tokens = explain.tokens_of(row, request.texts[0] if request.texts else None, tokenizer)
        probe = explain.AttentionProbe(tokenized.query, keeps_calls=options.rollout)
        context = replace(context, observe=probe.observe, map_tiles=explain.MAP_TILES if options.block_map else 0)
        list(self.hidden_states([row], context))  # only the probe and the maps need this pass
        return TaskOutput({}, explain.document(probe, tokens, options, context))

    def _by_request(
        self, requests: TokenizedRequests, name: str, values: torch.Tensor, *, is_cut: bool = False
    ) -> list[TaskOutput]:
        """values [rows, D] split by request; the chunks of one input are merged into one."""
        outputs = []
        parts = torch.split(values, [len(tokenized.rows) for _, tokenized in requests])
        for (_, tokenized), part in zip(requests, parts, strict=True):
            if tokenized.chunks:
                lengths = [row.length for row in tokenized.rows]
                is_unit = is_cut or self.pooling.is_normalized
                part = embed.merge_chunks(part, lengths, tokenized.rows_per_input, is_normalized=is_unit)
            outputs.append(TaskOutput({name: part}))
        return outputs

    # -- passes -------------------------------------------------------------------------------------------------

    def hidden_states(
        self, rows: Sequence[EncodedInput], context: hook.ForwardContext, layer: int = -1
    ) -> Iterator[PassStates]:
        """Hidden states after `layer`, pass by pass: packed if the model allows it, else in batches of equal shape."""
        if not self.info.packed:
            for batch in self._same_shape(rows):
                states = self.unpacked_states([rows[index] for index in batch], context, layer)
                yield self._flat(batch, states, [rows[index].kept for index in batch])
            return
        for indices in split_by_tokens([len(row) for row in rows], self.max_batch_tokens):
            members = [rows[index] for index in indices]
            packed = pack(members, self.device, self.first_position, self.padding_id)
            arguments = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
            if packed.type_ids is not None:
                arguments["token_type_ids"] = packed.type_ids
            states = self._base_states(arguments, context, layer, packed.cu_seqlens)[0]
            yield PassStates(indices, states, torch.tensor(packed.cu_seqlens, device=self.device))

    def scored_states(self, rows: Sequence[EncodedInput], context: hook.ForwardContext) -> Iterator[PassStates]:
        """What `logits` turns into logits, pass by pass: hidden states, or the targets' logits if there are targets."""
        if not self.inputs.spec.has_target:
            yield from self.hidden_states(rows, context)
            return
        for batch in self._same_shape(rows):
            yield self._flat(batch, self.head_logits([rows[index] for index in batch], context))

    def unpacked_states(
        self, rows: Sequence[EncodedInput], context: hook.ForwardContext, layer: int = -1
    ) -> torch.Tensor:
        """Hidden states of S rows of equal shape in one pass, without packing: [S, L, H]."""
        arguments = self._stacked(rows)
        arguments.pop("decoder_input_ids", None)  # `base` is the encoder
        return self._base_states(arguments, context, layer)

    def head_logits(self, rows: Sequence[EncodedInput], context: hook.ForwardContext) -> torch.Tensor:
        """Logits of S rows of equal shape by the model's own forward pass: [S, labels], or [S, L, vocabulary].

        Raises ValueError if the model's head refuses the rows.
        """
        logits: torch.Tensor = self._run(self.module, self._stacked(rows), context).logits
        return logits

    def _base_states(
        self,
        arguments: dict[str, Any],
        context: hook.ForwardContext,
        layer: int,
        cu_seqlens: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        if layer == -1:
            states: torch.Tensor = self._run(self.base, arguments, context, cu_seqlens).last_hidden_state
            if context.sample is not None:
                context.sample.take(states.flatten(0, 1))
        else:
            arguments = {**arguments, "output_hidden_states": True}
            states = self._run(self.base, arguments, context, cu_seqlens).hidden_states[layer]
        return states

    def _run(
        self,
        module: Any,
        arguments: dict[str, Any],
        context: hook.ForwardContext,
        cu_seqlens: tuple[int, ...] | None = None,
    ) -> Any:
        for reset in self.resets:
            reset()
        if self.info.task == "score" or hasattr(module.config, "use_cache"):
            arguments = {**arguments, "use_cache": False}
        context.positions.append(computed_positions(arguments, self.inputs.spec.states))
        with hook.running(replace(context, cu_seqlens=cu_seqlens)):
            return module(**arguments)

    def _same_shape(self, rows: Sequence[EncodedInput]) -> list[list[int]]:
        shapes = [(len(row.ids), len(row.target or ()), row.states) for row in rows]
        return split_by_shape(shapes, self.max_batch_tokens)

    def _flat(self, indices: Sequence[int], states: torch.Tensor, kept: Sequence[int | None] = ()) -> PassStates:
        """states [S, L, H] as [T, H], of each sequence those that are `kept`."""
        lengths = [count or states.shape[1] for count in kept or [None] * len(states)]
        parts = [each[:length] for each, length in zip(states, lengths, strict=True)]
        flat = torch.cat(parts) if any(kept) else states.flatten(0, 1)
        return PassStates(indices, flat, torch.tensor((0, *accumulate(lengths)), device=self.device))

    def _stacked(self, rows: Sequence[EncodedInput]) -> dict[str, torch.Tensor]:
        """Arguments of one unpacked pass over rows of equal shape."""
        start = getattr(self.module.config, "decoder_start_token_id", None)
        return stack(rows, self.device, next(self.module.parameters()).dtype, start)
