"""Models from local Hugging Face directories: safetensors only, no remote code, nothing fetched, and none unproven.

At load a model runs a few tokens through Transformers' own eager attention and through ours. What differs is refused;
a model that cannot take packed sequences runs in batches of equal length, and says so.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from service.config import ModelConfig
from service.core import LayerKind, ModelInfo, ModelTask, Plan, PlanKind, Weights, Work
from service.models import heads, hook, slices
from service.models.files import directory_of, read_json, takes_images, task_of
from service.models.model import Model, by_row
from service.models.tasks import embed
from service.models.tokens import Inputs, Row, read_tokenizer

CHECK_PLAN = Plan(PlanKind.DENSE, Work(0, 0, 0, 0), 0.0, "start-up check")
CHECK_LENGTHS = (17, 5)  # tokens of the two sequences of the check
# relative L2 distance to eager attention that rounding explains, by dtype
CHECK_ERROR = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
WARM_REPEATS, WARM_S = 12, 0.25  # of the check's sequence: about 200 tokens; passes longer than this are warm enough
Passes = Callable[[hook.ForwardContext, list[Row]], None]
STEPWISE_ROPE = ("dynamic", "longrope")  # frequencies that change with the longest sequence of a pass


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """What of the service's configuration concerns models."""

    device: torch.device
    max_text_bytes: int
    max_batch_tokens: int


def load(config: ModelConfig, settings: LoadSettings) -> Model:
    """One model, proven on the device. Raises ValueError, OSError or RuntimeError that say what is wrong with it."""
    hook.register()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    directory = directory_of(config)
    hf = _configuration(config, directory)
    task = config.task or task_of(directory)
    module: Any = _module(config, directory, hf, task).to(settings.device).eval()
    slices.install(module)
    base = module.get_encoder() if hf.is_encoder_decoder else module.base_model
    positions, first_position = _positions(hf, base)
    inputs = _inputs(config, directory, hf, task, settings, positions)
    model = Model(
        info=_info(config, hf, module, base, task, inputs),
        inputs=inputs,
        module=module,
        base=base,
        device=settings.device,
        pooling=_pooling(config, directory, hf),
        classifier=heads.classifier_of(module) if task in ("classify", "rerank") else None,
        first_position=first_position,
        max_batch_tokens=settings.max_batch_tokens,
        resets=tuple(_rope_resets(module)),
    )
    return _warm(_proven(model))


# -- files to modules -------------------------------------------------------------------------------------------


def _configuration(config: ModelConfig, directory: Path) -> PretrainedConfig:
    hf: PretrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.rope_scaling is not None:
        given = dict(config.rope_scaling)
        if "type" in given:  # as older files spell it
            given["rope_type"] = given.pop("type")
        if "rope_type" not in given:
            raise ValueError(f"model {config.name!r}: rope_scaling needs a rope_type (linear, dynamic, yarn, ...)")
        kept = getattr(hf, "rope_parameters", None)
        if not isinstance(kept, dict) or "rope_theta" not in kept:
            raise ValueError(f"model {config.name!r}: rope_scaling: {hf.model_type} has no rotary positions")
        scaling = {"original_max_position_embeddings": hf.max_position_embeddings, **given}
        hf.rope_parameters = {**kept, **scaling}
        # dynamic frequencies grow where a sequence is over the model's own length, which must stay told
        if "factor" in scaling and scaling["rope_type"] != "dynamic":
            hf.max_position_embeddings = int(scaling["original_max_position_embeddings"] * scaling["factor"])
    return hf


def _module(config: ModelConfig, directory: Path, hf: PretrainedConfig, task: ModelTask) -> nn.Module:
    module, info = _auto_class(hf, task).from_pretrained(
        directory,
        config=hf,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=getattr(torch, config.dtype),
        attn_implementation=hook.NAME,
        output_loading_info=True,
    )
    # what the files lack would be random numbers; an unused pooler may be missing
    missing = [name for name in info["missing_keys"] if task != "embed" or "pooler" not in name]
    if missing:
        raise ValueError(f"model {config.name!r}: its files lack {len(missing)} weights for {task}: {missing[0]}, ...")
    found: nn.Module = module
    return found


def _auto_class(hf: PretrainedConfig, task: ModelTask) -> Any:
    match task:
        case "embed":
            return AutoModel
        case "classify" | "rerank":
            return AutoModelForImageClassification if takes_images(hf.to_dict()) else AutoModelForSequenceClassification
        case "score":
            return AutoModelForSeq2SeqLM if hf.is_encoder_decoder else AutoModelForCausalLM


def _positions(hf: PretrainedConfig, base: nn.Module) -> tuple[int | None, int]:
    """(tokens that the model has positions for, the first position's number). RoBERTa's positions begin after its
    padding id; T5's are relative and have no end."""
    embeddings = getattr(base, "embeddings", None)
    first = hf.pad_token_id + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
    count = getattr(hf, "max_position_embeddings", None)
    rope = getattr(hf, "rope_parameters", None) or {}
    if count is not None and rope.get("rope_type") == "dynamic":
        count *= rope.get("factor", 1.0)
    return (None if count is None else int(count) - first), first


def _inputs(
    config: ModelConfig,
    directory: Path,
    hf: PretrainedConfig,
    task: ModelTask,
    settings: LoadSettings,
    positions: int | None,
) -> Inputs:
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(f"model {config.name!r}: max_length {config.max_length} is over its {positions} positions")
    common: dict[str, Any] = {"model": config.name, "max_text_bytes": settings.max_text_bytes}
    if takes_images(hf.to_dict()):
        from service.models.images import read_processor

        processor = read_processor(directory, hf)
        patches = (processor.size[0] // hf.patch_size) * (processor.size[1] // hf.patch_size) + 1
        return Inputs(**common, max_length=patches, vocab_size=0, images=processor, patches=patches)
    return Inputs(
        **common,
        max_length=config.max_length or _declared_length(directory, positions),
        vocab_size=hf.get_text_config().vocab_size,
        tokenizer=read_tokenizer(directory),
        has_types=getattr(hf, "type_vocab_size", 0) > 1,
        has_target=bool(hf.is_encoder_decoder) and task == "score",
    )


def _declared_length(directory: Path, positions: int | None) -> int:
    """What the tokenizer's or the sentence-transformers file declares, within what the model has positions for."""
    declared = [
        read_json(directory / "sentence_bert_config.json").get("max_seq_length"),
        read_json(directory / "tokenizer_config.json").get("model_max_length"),
        positions,
    ]
    lengths = [int(one) for one in declared if isinstance(one, int | float) and 0 < one < 1e9]
    return min(lengths) if lengths else 512


def _pooling(config: ModelConfig, directory: Path, hf: PretrainedConfig) -> embed.Pooling:
    if config.pooling is not None:
        declared = embed.read_pooling(directory).normalize if (directory / "modules.json").is_file() else True
        return embed.Pooling(config.pooling, normalize=declared)
    if takes_images(hf.to_dict()):
        return embed.Pooling("cls", normalize=True)
    return embed.read_pooling(directory)


def _info(
    config: ModelConfig, hf: PretrainedConfig, module: Any, base: nn.Module, task: ModelTask, inputs: Inputs
) -> ModelInfo:
    text = hf.get_text_config()
    names: Any = hf.id2label
    if task == "rerank" and len(names) != 1:
        raise ValueError(f"model {config.name!r}: rerank needs one label, this model has {len(names)}")
    labels = tuple(str(names[at]) for at in range(len(names))) if task in ("classify", "rerank") else ()
    return ModelInfo(
        name=config.name,
        task=task,
        architecture=hf.model_type,
        dtype=config.dtype,
        max_length=inputs.max_length,
        dimensions=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=inputs.vocab_size,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        weights=Weights(0),
        task_weights=Weights(0),  # counted once it runs
        position_bias=hasattr(hf, "relative_attention_num_buckets"),
        attention=(),
        packed=_may_pack(hf, base),
        inputs="image" if inputs.images else "source and target" if inputs.has_target else "text",
        labels=labels,
    )


def _may_pack(hf: PretrainedConfig, base: nn.Module) -> bool:
    """Position ids can be given, and a pass's frequencies do not depend on its longest sequence."""
    stepwise = any(rope in STEPWISE_ROPE for rope in _rope_types(hf))
    return "position_ids" in inspect.signature(base.forward).parameters and not stepwise and not hf.is_encoder_decoder


def _rope_types(hf: PretrainedConfig) -> list[str]:
    parameters = getattr(hf, "rope_parameters", None) or {}
    kinds = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    return [str(one["rope_type"]) for one in kinds if "rope_type" in one]


def _rope_resets(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Transformers' dynamic frequencies stay where the longest sequence so far has put them: the answer to one request
    would depend on the requests before it."""
    for one in module.modules():
        if hasattr(one, "max_seq_len_cached") and hasattr(one, "original_max_seq_len"):
            names = [name for name in dir(one) if name.endswith("original_inv_freq")]
            yield partial(_reset_rope, one, names)


def _reset_rope(module: nn.Module, names: list[str]) -> None:
    for name in names:
        prefix = name.removesuffix("original_inv_freq")
        current = getattr(module, f"{prefix}inv_freq")
        setattr(module, f"{prefix}inv_freq", getattr(module, name).to(current.device).clone())
        if hasattr(module, f"{prefix}max_seq_len_cached"):
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
    module.max_seq_len_cached = module.original_max_seq_len


# -- proofs -----------------------------------------------------------------------------------------------------


def _proven(model: Model) -> Model:
    """Equal to eager attention, packed where that is right; raises RuntimeError where nothing is."""
    rows = _check_rows(model)
    expected = _expected(model, rows)
    failures = []
    for packed in (True, False) if model.info.packed else (False,):
        candidate = replace(model, info=replace(model.info, packed=packed))
        if not packed:
            candidate = replace(candidate, classifier=None)
        context = hook.ForwardContext(CHECK_PLAN)
        try:
            got = _got(candidate, rows, context)
        except NotImplementedError as error:
            failures.append(str(error))
            continue
        worst = max(_distance(a, b) for a, b in zip(got, expected, strict=True))
        if worst <= CHECK_ERROR[model.info.dtype]:
            return replace(candidate, info=_counted(candidate, rows))
        failures.append(f"{'packed' if packed else 'single'} pass differs from eager attention by {worst:.2g}")
    raise RuntimeError(f"model {model.info.name!r} ({model.info.architecture}): {'; '.join(failures)}")


def _check_rows(model: Model) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    if model.inputs.images is not None:
        height, width = model.inputs.images.size
        pixels = torch.randn(2, model.inputs.images.channels, height, width, generator=draw)
        return [Row(pixels=one, patches=model.inputs.patches) for one in pixels]
    lengths = [min(length, model.info.max_length) for length in CHECK_LENGTHS]
    # not the special tokens at the start of most vocabularies: some models look for them
    low = min(10, model.info.vocab_size - 1)
    ids = [tuple(torch.randint(low, model.info.vocab_size, (n,), generator=draw).tolist()) for n in lengths]
    hf = model.module.config
    if hf.is_encoder_decoder and hf.eos_token_id is not None:  # classifiers look for it
        ids = [(*one[:-1], hf.eos_token_id) for one in ids]
    target = ids[1] if model.inputs.has_target else None
    return [Row(one, target=target) for one in ids]


@torch.inference_mode()
def _expected(model: Model, rows: list[Row]) -> list[torch.Tensor]:
    """Of each row alone, with Transformers' eager attention: hidden states, and what the model's head makes of them."""
    states, heads_ = [], []
    with _eager(model.module):
        for row in rows:
            arguments = model._batch([row])
            if model.info.task != "embed":
                heads_.append(model._pass(model.module, hook.ForwardContext(CHECK_PLAN), None, **arguments).logits)
            arguments.pop("decoder_input_ids", None)
            output = model._pass(model.base, hook.ForwardContext(CHECK_PLAN), None, **arguments)
            states.append(output.last_hidden_state[0])
    return [one.float().cpu() for one in (*states, *(head.flatten(0, -2) for head in heads_))]


@torch.inference_mode()
def _got(model: Model, rows: list[Row], context: hook.ForwardContext) -> list[torch.Tensor]:
    """The same by our passes: all rows together."""
    states: dict[int, torch.Tensor] = {}
    logits: dict[int, torch.Tensor] = {}
    for at, found in by_row(model.states(rows, context)):
        states[at] = found.float().cpu()
    if model.info.task == "score":
        for at, found in by_row(model.scored_states(rows, context)):
            logits[at] = model.logits(found).cpu()
    elif model.info.task in ("classify", "rerank"):
        logits = dict(enumerate(one[None] for one in model.classify(rows, context)))
    return [*(states[at] for at in sorted(states)), *(logits[at] for at in sorted(logits))]


@contextmanager
def _eager(module: Any) -> Iterator[None]:
    module.set_attn_implementation("eager")
    if module.config._attn_implementation != "eager":
        raise RuntimeError(f"{module.config.model_type} does not compute attention through the AttentionInterface")
    try:
        yield
    finally:
        module.set_attn_implementation(hook.NAME)


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2; infinite where either is not finite."""
    distance = float((got - expected).norm() / expected.norm().clamp(min=1e-20))
    return distance if distance == distance else float("inf")


@torch.inference_mode()
def _counted(model: Model, rows: list[Row]) -> ModelInfo:
    """What a pass multiplies, and who sees whom, layer by layer, as passes show: closed forms for any architecture."""

    def states(context: hook.ForwardContext, rows: list[Row]) -> None:
        list(model.states(rows, context))

    def task(context: hook.ForwardContext, rows: list[Row]) -> None:
        match model.info.task:
            case "classify" | "rerank":
                model.classify(rows, context)
            case "score":
                for _, found, _ in model.scored_states(rows, context):
                    model.logits(found)
            case _:
                states(context, rows)

    return replace(
        model.info,
        weights=_weights(model, rows, states),
        task_weights=_weights(model, rows, task),
        attention=_layers(rows[:1], states),
        task_attention=_layers(rows[:1], task),
    )


def _weights(model: Model, rows: list[Row], work: Passes) -> Weights:
    """A matrix is known by the rows that it is given: as many as there are tokens, sequences, or one in each pass."""
    rows = rows if model.info.packed else rows[:1]
    calls: list[tuple[int, int]] = []  # rows and numbers of each matrix

    def note(module: Any, _: Any, output: torch.Tensor) -> None:
        width = module.out_channels if isinstance(module, nn.Conv2d) else output.shape[-1]
        calls.append((output.numel() // width, module.weight.numel()))

    matrices = [one for one in model.module.modules() if isinstance(one, nn.Linear | Conv1D | nn.Conv2d)]
    handles = [one.register_forward_hook(note) for one in matrices]
    work(hook.ForwardContext(CHECK_PLAN), rows)
    for handle in handles:
        handle.remove()
    if model.info.inputs == "image":  # all of one size
        return Weights(0, sequence=sum(count * weights for count, weights in calls))
    source, target = sum(len(row.ids) for row in rows), sum(len(row.target or ()) for row in rows)
    names = {1: "once", len(rows): "sequence", target: "target", source: "source"}
    found = dict.fromkeys(("source", "target", "sequence", "once"), 0)
    for count, weights in calls:
        found[names.get(count, "once")] += weights if count in names else count * weights
    return Weights(**found)


def _layers(rows: list[Row], work: Passes) -> tuple[LayerKind, ...]:
    context = hook.ForwardContext(CHECK_PLAN)
    work(context, rows)
    target = len(rows[0].target or ())
    return tuple(
        LayerKind(
            count,
            pattern.is_causal,
            pattern.window,
            queries="target" if queries == target else "source",
            keys="target" if keys == target else "source",
        )
        for (pattern, queries, keys), count in Counter(context.patterns).items()
    )


def _warm(model: Model) -> Model:
    """With the fastest of a few passes of four tokens: what every pass costs, however short.

    Then ever larger passes, as requests will make them: what libraries prepare at the first pass of a size (kernels,
    memory) is not the first caller's time.
    """
    row = _check_rows(model)[0]
    short = replace(row, ids=row.ids[:4])
    smallest_s = min(_pass_s(model, [short]) for _ in range(5))
    row = replace(row, ids=(row.ids * WARM_REPEATS)[: model.info.max_length])
    count = 1
    while count * len(row) <= model.max_batch_tokens and _pass_s(model, [row] * count) < WARM_S:
        count *= 2
    return replace(model, info=replace(model.info, smallest_pass_s=smallest_s))


@torch.inference_mode()
def _pass_s(model: Model, rows: list[Row]) -> float:
    start = time.perf_counter()
    for _, states, _ in model.states(rows, hook.ForwardContext(CHECK_PLAN)):
        states[-1].cpu()  # waits for the device
    return time.perf_counter() - start
