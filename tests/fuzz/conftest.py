"""An engine with a small model of every kind, in process; its count is written to the file that RESULTS names."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import transformers as hf
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from prometheus_client import CollectorRegistry

from benchmarks import report
from service.config import Config, ModelConfig
from service.engine.engine import Engine
from service.telemetry.heap_trim import trim
from service.telemetry.metrics import Metrics
from tests.fuzz.sent import Tally
from tests.models import zoo
from tests.models.test_directories import old_layout, plain

CASES = int(os.environ.get("CASES", "1000"))  # of each target
ROUND = 500  # Hypothesis remembers every case of a round
PROMPTS = {"query": "the animal ", "passage": "the street "}


def save_models(root: Path) -> tuple[ModelConfig, ...]:
    zoo.save(
        "bert", hf.AutoModelForSequenceClassification, root / "classifier", id2label={0: "no", 1: "maybe", 2: "yes"}
    )
    zoo.save("bert", hf.AutoModelForSequenceClassification, root / "ranker", id2label={0: "relevant"})
    zoo.save("llama", hf.AutoModelForCausalLM, root / "decoder")
    zoo.save("t5", hf.AutoModelForSeq2SeqLM, root / "translator")
    zoo.save("vit", hf.AutoModel, root / "vision-embed")
    zoo.save("whisper", hf.AutoModel, root / "whisper")
    old_layout(plain("bert"), "mean_tokens", {"prompts": PROMPTS})(root / "embedder")
    return tuple(ModelConfig(name=one.name, path=str(one)) for one in sorted(root.iterdir()))


def each(strategy: SearchStrategy[Any], act: Callable[[Any], None], cases: int = CASES) -> None:
    """Calls `act` with that many cases; what fails is reduced to the smallest that fails."""
    for start in range(0, cases, ROUND):

        @settings(
            max_examples=min(ROUND, cases - start),
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        @given(strategy)
        def one(case: Any) -> None:
            act(case)

        one()


def memory_bytes() -> int:
    gc.collect()
    trim()
    return int(psutil.Process().memory_info().rss)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    tally, start_s = Tally(), time.monotonic()
    yield tally
    if path := os.environ.get("RESULTS"):
        file = Path(path)
        figures = json.loads(file.read_text())["figures"] if file.exists() else {}
        figures[tally.name] = {"seconds": round(time.monotonic() - start_s), **tally.document()}
        found = {**report.document(figures), "command": f"make fuzz CASES={CASES}"}
        file.write_text(json.dumps(found, indent=2) + "\n")


@pytest.fixture(scope="session")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    models = save_models(tmp_path_factory.mktemp("models"))
    config = Config(models=models, state_dir=tmp_path_factory.mktemp("state"))
    config.metrics_dir.mkdir(parents=True)
    engine = Engine.start(config, Metrics(CollectorRegistry()))
    yield engine
    engine.close()
