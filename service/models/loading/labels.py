"""Labels of a classification head, however the files count them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from service.models.files import WEIGHTS, read_json

# the last matrix of a head: one row for each label
MATRICES = (
    "classifier.weight",
    "score.weight",
    "classifier.out_proj.weight",
    "classification_head.out_proj.weight",
)


def count_labels(directory: Path) -> int | None:
    """Outputs of the head, by its weights; None if it has none of MATRICES."""
    whole, index = (directory / file for file in WEIGHTS)
    places: dict[str, str] = json.loads(index.read_text())["weight_map"] if index.is_file() else {}
    for name in MATRICES:
        file = directory / places[name] if name in places else whole
        if not file.is_file():
            continue
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118 (it is no mapping)
                rows: int = weights.get_slice(name).get_shape()[0]
                return rows
    return None


def read_labels(directory: Path, count: int) -> tuple[str, ...]:
    """A name for each of `count` outputs: as config.json gives it, else Transformers' own, LABEL_i."""
    names: dict[str, Any] = read_json(directory / "config.json").get("id2label") or {}
    return tuple(str(names.get(str(at), f"LABEL_{at}")) for at in range(count))
