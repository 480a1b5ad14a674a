"""One request of the fuzzer, and what every answer to one must be."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from service.errors import CODES, Kind

SLOWEST_S = 10.0
UNPARSED = {400, 404, 405, 413, 415}  # answered without a look inside
EXPLAINED = {503: "ready", 504: "time"}  # 5xx that these requests may ask for, and the word in the path or body


@dataclass(frozen=True, slots=True)
class Sent:
    """One request over HTTP."""

    target: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""
    query: str = ""

    def __repr__(self) -> str:
        shown = self.body if len(self.body) < 6000 else self.body[:3000] + b" ... " + self.body[-3000:]
        return f"{self.target}: {self.method} {self.path}?{self.query} {self.headers} {shown!r}"


@dataclass(frozen=True, slots=True)
class Got:
    """Its answer."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes
    seconds: float

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


@dataclass
class Tally:
    """What was sent and what came back, by target."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    parsed: Counter[str] = field(default_factory=Counter)
    slowest_s: dict[str, float] = field(default_factory=dict)
    name: str = ""
    memory_at_start: int = 0
    memory_before: int = 0  # after the first cases
    memory_after: int = 0

    def add(self, target: str, status: str, seconds: float, *, is_parsed: bool) -> None:
        self.statuses.setdefault(target, Counter())[status] += 1
        self.parsed[target] += is_parsed
        self.slowest_s[target] = max(seconds, self.slowest_s.get(target, 0.0))

    def document(self) -> dict[str, Any]:
        every: Counter[str] = sum(self.statuses.values(), Counter())
        return {
            "cases": every.total(),
            "passed_first_parse": self.parsed.total(),
            "statuses": dict(sorted(every.items())),
            "slowest_s": round(max(self.slowest_s.values(), default=0.0), 3),
            "memory_at_start_mib": self.memory_at_start >> 20,
            "memory_before_mib": self.memory_before >> 20,
            "memory_after_mib": self.memory_after >> 20,
            "targets": {
                target: {
                    "cases": found.total(),
                    "passed_first_parse": self.parsed[target],
                    "statuses": dict(sorted(found.items())),
                    "slowest_s": round(self.slowest_s[target], 3),
                }
                for target, found in sorted(self.statuses.items())
            },
        }


def check(sent: Sent, got: Got, tally: Tally, *, behind_haproxy: bool = False) -> None:
    """Counts it. Fails for a 5xx that was not asked for, for slowness, and for an answer of the wrong form."""
    tally.add(sent.target, str(got.status), got.seconds, is_parsed=got.status not in UNPARSED)
    assert got.seconds < SLOWEST_S, f"{got.seconds:.1f} s"
    asked = EXPLAINED.get(got.status)
    is_explained = asked is not None and (
        asked in sent.path or asked.encode() in sent.body or asked in str(sent.headers)
    )
    assert got.status < 500 or is_explained, (got.status, got.body[:500])
    assert got.status in {200, *(code.http for code in CODES.values())}, got.status
    assert len(got.values("x-request-id")) == 1, got.headers
    assert len(got.values("content-type")) == 1, got.headers
    if got.status != 200:
        is_ours = not (behind_haproxy and got.body.startswith(b'{"error":{'))  # Serve's and HAProxy's have one form
        check_error(got, v2=sent.path.startswith("/v2") and is_ours)
    elif "json" in got.values("content-type")[0]:
        json.loads(got.body, parse_constant=_refuse)
    elif "safetensors" in got.values("content-type")[0]:
        (size,) = struct.unpack("<Q", got.body[:8])
        json.loads(got.body[8 : 8 + size], parse_constant=_refuse)


def check_error(got: Got, *, v2: bool) -> None:
    """The one form of errors of each API, with the codes of the one table."""
    error = json.loads(got.body, parse_constant=_refuse)["error"]
    if v2:
        assert isinstance(error, str)
        assert error
        return
    assert {"message", "type", "code", "param"} <= set(error) <= {"message", "type", "code", "param", "retry_after_s"}
    assert CODES[Kind(error["type"])].http == got.status
    assert error["message"]
    assert len(error["message"]) <= 1000
    assert math.isfinite(error.get("retry_after_s", 0.0))


def _refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")
