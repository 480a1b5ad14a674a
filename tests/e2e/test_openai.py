"""The stock openai client."""

from __future__ import annotations

import openai
import pytest
import torch
from sentence_transformers import SentenceTransformer

from service.models.files import directory_of
from tests.conftest import MINILM
from tests.e2e.conftest import Service

pytestmark = pytest.mark.e2e

TEXTS = ["How much does this cost?", "The animal didn't cross the street because it was tired.", "東京 ☕"]


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_embeddings_equal_sentence_transformers(client: openai.OpenAI, encoding: str | None) -> None:
    chosen = {} if encoding is None else {"encoding_format": encoding}
    response = client.embeddings.create(model=MINILM.name, input=TEXTS, **chosen)  # type: ignore[arg-type]
    vectors = [entry.embedding for entry in response.data]
    if encoding == "base64":  # asked for by name, the client hands it through
        assert all(isinstance(vector, str) for vector in vectors)
        return
    expected = torch.from_numpy(SentenceTransformer(str(directory_of(MINILM)), device="cpu").encode(TEXTS))
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(vectors), expected)
    assert cosine.min() >= 0.9999


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MINILM.name]
    assert client.models.retrieve(MINILM.name).owned_by == "farsight"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.UnprocessableEntityError):
        client.embeddings.create(model=MINILM.name, input=[])
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(model=MINILM.name, input="word " * 400)
    assert caught.value.status_code == 413
    assert caught.value.code == "context_length_exceeded"


def test_our_extensions_travel_in_extra_body(client: openai.OpenAI) -> None:
    response = client.embeddings.create(model=MINILM.name, input="word " * 400, extra_body={"truncate": "end"})
    assert response.usage.total_tokens == 256
    assert response.model_extra is not None
    assert response.model_extra["plan"]["kind"] == "dense"
    assert response.model_extra["cost"]["usd"] > 0
