"""The servers of `python -m benchmarks serving`: requirements, commands and endpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.models.demo import DEMO_MODEL

MODEL = DEMO_MODEL.name
MAX_BATCH = 32
APPS = Path(__file__).parent

# Farsight's version, for all. It is part of every pip command, otherwise pip would choose another build or release.
TORCH = "torch==2.13.0"
SENTENCE_TRANSFORMERS = (TORCH, "sentence-transformers==6.2.0", "transformers==5.23.0")  # as in our constraints.txt

REPLICA_PORTS = 100  # distance from Farsight's first port to those of its replicas


@dataclass(frozen=True, slots=True)
class Place:
    """Paths and port that a server is started with."""

    python: str  # of its venv
    model: Path
    port: int
    scratch: Path  # directory that is removed afterwards


@dataclass(frozen=True, slots=True)
class Contender:
    """A server. Without requirements it runs in the environment of this process."""

    name: str
    command: Callable[[Place], list[str]]
    requirements: tuple[str, ...] = ()
    path: str = "/embeddings"
    options: Mapping[str, str] = field(default_factory=dict)  # fields of the body in addition to model and input
    environment: Callable[[Place], Mapping[str, str]] = lambda place: {}
    ready: str = ""  # printed when it is ready; it must answer as well


def farsight(place: Place) -> list[str]:
    return [place.python, "-m", "service", "serve", "--demo"]


def by_arrival(place: Place) -> list[str]:
    """Farsight with a first-in, first-out queue."""
    return [place.python, "-m", "benchmarks.servers.by_arrival"]


def farsight_environment(place: Place) -> dict[str, str]:
    fields = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT")
    settings = {field: str(place.port + index) for index, field in enumerate(fields)}
    settings["REPLICA_PORT_BASE"] = str(place.port + REPLICA_PORTS)
    settings |= {"HOST": "127.0.0.1", "STATE_DIR": str(place.scratch), "DEVICE": "cpu", "MODELS": "[]", "REPLICAS": "1"}
    return {f"FARSIGHT_{name}": value for name, value in settings.items()}


def infinity(place: Place) -> list[str]:
    options = {
        "--model-id": str(place.model),
        "--served-model-name": MODEL,
        "--engine": "torch",
        "--device": "cpu",
        "--dtype": "float32",
        "--batch-size": str(MAX_BATCH),
        "--host": "127.0.0.1",
        "--port": str(place.port),
        "--log-level": "warning",
    }
    # no cache: every round sends the same texts. BetterTransformer excludes the compiler and was the faster of the two
    flags = ["--bettertransformer", "--no-compile", "--no-vector-disk-cache"]
    executable = str(Path(place.python).parent / "infinity_emb")
    return [executable, "v2", *(part for option in options.items() for part in option), *flags]


def app(name: str) -> Callable[[Place], list[str]]:
    """Command of one of the small apps in this folder."""
    return lambda place: [place.python, str(APPS / name), str(place.model), str(place.port), str(MAX_BATCH)]


def apart(place: Place) -> dict[str, str]:
    """Environment without model downloads or telemetry, with the packages of the venv only."""
    return {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": ""}


LINEUP = (
    Contender(
        "farsight",
        farsight,
        path="/v1/embeddings",
        options={"truncate": "end"},
        environment=farsight_environment,
        ready="Farsight is ready",  # before that HAProxy answers, but it reloads once more and closes connections
    ),
    Contender(
        "infinity-emb",
        infinity,
        (
            TORCH,
            "infinity-emb[torch,server]==0.0.78",
            "optimum==1.27.0",  # the last release with BetterTransformer, which infinity uses if it is installed
            "transformers==4.48.3",  # the last release that BetterTransformer accepts
        ),
        environment=apart,
    ),
    Contender("litserve", app("litserve_app.py"), (*SENTENCE_TRANSFORMERS, "litserve==0.2.19"), environment=apart),
    Contender(
        "fastapi",
        app("fastapi_app.py"),
        (*SENTENCE_TRANSFORMERS, "fastapi==0.165.0", "uvicorn==0.54.0", "uvloop==0.23.0", "httptools==0.9.0"),
        environment=apart,
    ),
)
