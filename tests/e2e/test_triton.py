"""The stock tritonclient over HTTP (binary tensors) and gRPC (raw contents), from an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from service.models.files import directory_of
from tests.conftest import MINILM
from tests.e2e.conftest import Service

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PACKAGES = ("tritonclient[http,grpc]==2.73.0", "numpy", "ml_dtypes")


@pytest.fixture(scope="session")
def triton_python() -> str:
    """tritonclient needs protobuf < 7 and Ray's reflection >= 7: they cannot share an environment."""
    venv = ROOT / ".venv-triton"
    python = venv / "bin" / "python"
    stamp = venv / ".installed"
    if not stamp.exists() or stamp.read_text() != repr(PACKAGES):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        stamp.write_text(repr(PACKAGES))
    return str(python)


@pytest.fixture(scope="module")
def found(service: Service, triton_python: str) -> dict[str, Any]:
    script = Path(__file__).with_name("triton_client.py")
    arguments = [triton_python, str(script), str(service.http_port), str(service.grpc_port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_health_and_metadata(found: dict[str, Any], transport: str) -> None:
    seen = found[transport]
    assert seen["live"]
    assert seen["ready"]
    assert seen["model_ready"]
    assert seen["inputs"] == 4


@pytest.mark.parametrize("transport", ["http", "grpc"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 3e-2), ("causal", 1e-5)])
def test_attention(found: dict[str, Any], transport: str, dtype: str, tolerance: float) -> None:
    assert found[transport][dtype]["error"] < tolerance
    assert found[transport][dtype]["lse"] == [1, 2, 24]


def test_both_transports_give_the_same_embedding_and_sentence_transformers_too(found: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    over_http, over_grpc = torch.tensor(found["http"]["embedding"]), torch.tensor(found["grpc"]["embedding"])
    assert torch.allclose(over_http, over_grpc, atol=1e-6)
    texts = ["How much does this cost?", "two words"]
    expected = torch.from_numpy(SentenceTransformer(str(directory_of(MINILM)), device="cpu").encode(texts))
    assert torch.nn.functional.cosine_similarity(over_http, expected).min() >= 0.9999


def test_unknown_model_on_both(found: dict[str, Any]) -> None:
    status, message = found["http"]["refusal"]
    assert status == "404"
    assert "no-such-model" in message
    status, message = found["grpc"]["refusal"]
    assert status == "StatusCode.NOT_FOUND"
    assert "no-such-model" in message
