"""One record per request of a run, as seen by the caller; nothing is rounded or aggregated before the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

NO_PLAN = "-"  # of a request that was refused or failed


class Outcome(StrEnum):
    ANSWERED = "answered"
    REFUSED = "refused"  # 429, with the time to retry; not a failure
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Sample:
    """Times are seconds since the run began. Latency counts from `at_s`, when the request was due, so that delays of a
    stalled service or client are included."""

    endpoint: str
    length: int  # tokens of an attention request, words of an embeddings request
    outcome: Outcome
    at_s: float
    sent_s: float
    ended_s: float
    tenant: str = ""
    plan: str = NO_PLAN
    queue_s: float = 0.0
    device_s: float = 0.0
    cost_usd: float = 0.0
    reason: str = ""

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.at_s


@dataclass(frozen=True, slots=True)
class Sent:
    """A request in flight."""

    endpoint: str
    length: int
    at_s: float
    sent_s: float
    tenant: str = ""

    def answered(self, ended_s: float, headers: Mapping[str, str]) -> Sample:
        """A sample from the headers (or gRPC parameters) that every answer has; without them it is a failure."""
        try:
            return Sample(
                **asdict(self),
                outcome=Outcome.ANSWERED,
                ended_s=ended_s,
                plan=headers["x-attention-plan"],
                queue_s=float(headers["x-queue-seconds"]),
                device_s=float(headers["x-device-seconds"]),
                cost_usd=float(headers["x-cost-usd"]),
            )
        except (KeyError, ValueError) as error:
            return self.failed(ended_s, f"answer without its headers: {error!r}")

    def refused(self, ended_s: float) -> Sample:
        return Sample(**asdict(self), outcome=Outcome.REFUSED, ended_s=ended_s)

    def failed(self, ended_s: float, reason: str) -> Sample:
        return Sample(**asdict(self), outcome=Outcome.FAILED, ended_s=ended_s, reason=reason)


def write(path: Path, samples: Iterable[Sample]) -> None:
    path.write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))


def read(path: Path) -> list[Sample]:
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [Sample(**{**row, "outcome": Outcome(row["outcome"])}) for row in rows]
