"""Small requests at an even rate while something fails, each on a connection of its own, and what became of them."""

from __future__ import annotations

import json
import threading
import time
import uuid
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from types import TracebackType

BODY = json.dumps({"query": [[[1, 0]]], "key": [[[1, 0], [0, 1]]], "value": [[[1, 2], [3, 4]]]})
CLIENTS, EVERY_S = 4, 0.2
ANSWER_S = 10.0  # a request that waits longer has failed
HTTP_OK = 200


@dataclass(frozen=True, slots=True)
class Attempt:
    """`reason` is empty if the request was answered with 200; seconds are of time.monotonic."""

    id: str
    started_s: float
    ended_s: float
    reason: str


class Probe:
    """Sends while it is entered."""

    def __init__(self, port: int) -> None:
        self.attempts: list[Attempt] = []  # appended by all threads
        self._port = port
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(index,)) for index in range(CLIENTS)]

    def __enter__(self) -> Probe:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def failed(self, since_s: float) -> list[Attempt]:
        """Those that failed and ended after `since_s`, in the order of their ends."""
        found = [attempt for attempt in tuple(self.attempts) if attempt.reason and attempt.ended_s >= since_s]
        return sorted(found, key=lambda attempt: attempt.ended_s)

    def answered(self) -> list[Attempt]:
        return [attempt for attempt in tuple(self.attempts) if not attempt.reason]

    def _send(self, index: int) -> None:
        self._is_over.wait(index * EVERY_S / CLIENTS)
        while not self._is_over.is_set():
            attempt = self._attempt()
            self.attempts.append(attempt)
            self._is_over.wait(attempt.started_s + EVERY_S - time.monotonic())

    def _attempt(self) -> Attempt:
        request_id, started_s = str(uuid.uuid4()), time.monotonic()
        connection = HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
        try:
            headers = {"content-type": "application/json", "x-request-id": request_id}
            connection.request("POST", "/v1/attention", BODY, headers)
            answer = connection.getresponse()
            text = answer.read()
            reason = "" if answer.status == HTTP_OK else f"{answer.status} {text[:200].decode(errors='replace')}"
        except (OSError, HTTPException) as error:
            reason = type(error).__name__
        finally:
            connection.close()
        return Attempt(request_id, started_s, time.monotonic(), reason)
