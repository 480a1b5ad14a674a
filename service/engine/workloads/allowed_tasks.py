"""What a model may be asked for: how many inputs, which tasks."""

from __future__ import annotations

from service.config import Config
from service.core.model_info import ModelInfo
from service.core.options import EmbedOptions, ExplainOptions, HiddenOptions
from service.core.request import ForwardRequest
from service.errors import invalid, too_large


def check_counts(config: Config, request: ForwardRequest) -> None:
    """Raises FarsightError (413) if there are too many inputs, before any of them is read."""
    features = 0 if request.features is None else len(request.features)
    is_audio = request.features is not None and request.features.ndim == 3  # limited by its windows
    images = len(request.images) + (0 if is_audio else features)
    count = len(request.texts) + len(request.token_ids) + len(request.pairs) + len(request.audio) + images
    if count > config.max_texts:
        raise too_large("input", count, config.max_texts, "items", param="input")
    if images > config.max_images:
        raise too_large("images", images, config.max_images, "images", param="images")


def check_task(info: ModelInfo, request: ForwardRequest) -> None:
    """Raises FarsightError (422) if the model is for something else, naming what it takes, or an option is out of its
    range."""
    task = request.task
    allowed = {info.task, "hidden", "explain"} | ({"classify"} if info.task == "rerank" else set())
    if info.task == "classify" and len(info.labels) == 1:
        allowed.add("rerank")
    if info.inputs in ("image", "audio"):
        allowed -= {"explain"}
    if task not in allowed:
        raise invalid(
            f"model {info.name!r} is for {info.task}, not for {task}; it takes {', '.join(sorted(allowed))}",
            code="wrong_task",
            param="model",
        )
    options, layers = request.options, info.num_layers
    if isinstance(options, HiddenOptions) and not -layers - 1 <= options.layer <= layers:
        raise invalid(f"layer: expected {-layers - 1}..{layers}, got {options.layer}", param="layer")
    if isinstance(options, ExplainOptions):
        for layer in options.layers or ():
            if not -layers <= layer < layers:
                raise invalid(f"layers: expected {-layers}..{layers - 1}, got {layer}", param="layers")
    if isinstance(options, EmbedOptions) and options.dimensions is not None and options.dimensions > info.dimensions:
        raise invalid(f"dimensions: expected 1..{info.dimensions}, got {options.dimensions}", param="dimensions")
