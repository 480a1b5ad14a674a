"""What the tests of models share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from service.config import ModelConfig
from service.core.options import (
    ClassifyOptions,
    EmbedOptions,
    ExplainOptions,
    ForwardOptions,
    HiddenOptions,
    ScoreOptions,
    Task,
)
from service.core.plan import Cost, Plan, PlanKind
from service.core.request import ForwardRequest
from service.models.hook import ForwardContext
from service.models.loading.load import LoadSettings, load
from service.models.model import Model, TaskOutput

CPU = torch.device("cpu")
SETTINGS = LoadSettings(CPU, max_text_bytes=1 << 20, max_batch_tokens=16384, sparse_min_tokens=0)
OPTIONS: dict[str, type[ForwardOptions]] = {
    "embed": EmbedOptions,
    "classify": ClassifyOptions,
    "rerank": ClassifyOptions,
    "score": ScoreOptions,
    "hidden": HiddenOptions,
    "explain": ExplainOptions,
}


def plan(kind: PlanKind = PlanKind.DENSE, **fields: Any) -> Plan:
    return Plan(kind, Cost(0, 0, 0, 0), 0.0, "test", **fields)


def loaded(directory: Path, **fields: Any) -> Model:
    return load(ModelConfig(name="m", path=str(directory), **fields), SETTINGS)


def asked(task: Task, *texts: str, **fields: Any) -> ForwardRequest:
    """Fields of the request by their names, all others are options."""
    own = {
        name: fields.pop(name)
        for name in ("pairs", "token_ids", "images", "audio", "features", "query")
        if name in fields
    }
    return ForwardRequest("r", "m", task, OPTIONS[task](**fields), texts=texts, **own)


def run(model: Model, *requests: ForwardRequest, context: ForwardContext | None = None) -> list[TaskOutput]:
    """All requests in one batch."""
    jobs = [(request, model.tokenize(request)) for request in requests]
    return model.run(jobs, context or ForwardContext(PlanKind.DENSE))
