"""sentence-transformers behind LitServe. Runs in its own venv: python litserve_app.py MODEL PORT MAX_BATCH"""

# no `from __future__ import annotations`: LitServe needs the evaluated type of a request in the signature
import sys
from typing import Any

import litserve  # type: ignore[import-not-found]
from sentence_transformers import SentenceTransformer

BATCH_TIMEOUT_S = 0.01  # as long as a short text takes


class Embeddings(litserve.LitAPI):  # type: ignore[misc]
    """Batches of at most `MAX_BATCH` texts that arrive within the timeout."""

    def __init__(self, directory: str, max_batch: int) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=BATCH_TIMEOUT_S, api_path="/embeddings")
        self._directory = directory
        self._max_batch = max_batch

    def setup(self, device: str) -> None:
        self._model = SentenceTransformer(self._directory, device=device)

    def decode_request(self, request: dict[str, Any]) -> str:
        text: str = request["input"]
        return text

    def predict(self, texts: list[str]) -> Any:
        return self._model.encode(texts, batch_size=self._max_batch, show_progress_bar=False)

    def encode_response(self, vector: Any) -> dict[str, Any]:
        return {"data": [{"embedding": vector.tolist()}]}


def main() -> None:
    directory, port, max_batch = sys.argv[1:]
    server = litserve.LitServer(Embeddings(directory, int(max_batch)), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)


if __name__ == "__main__":  # worker processes import this file again
    main()
