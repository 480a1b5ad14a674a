"""Samples and runs that are made by hand."""

from __future__ import annotations

from math import nan

from loadtests.run import Options, Run
from loadtests.samples import Outcome, Sample
from loadtests.watch import Moment

SLO_S = {"512": 0.5, "4096": 2.5, "32768": 10.0, "262144": 60.0, "more": 300.0}


def sample(
    at_s: float = 0.0,
    latency_s: float = 0.1,
    length: int = 100,
    outcome: Outcome = Outcome.ANSWERED,
    tenant: str = "",
    plan: str = "dense",
    reason: str = "",
) -> Sample:
    if outcome is not Outcome.ANSWERED:
        plan = "-"
    device_s = 0.25 if outcome is Outcome.ANSWERED else 0.0
    ended_s = at_s + latency_s
    return Sample("embeddings", length, outcome, at_s, at_s, ended_s, tenant, plan, 0.01, device_s, 7e-6, reason)


def run(samples: list[Sample], duration_s: float = 10.0, scale: float = 1.0) -> Run:
    moments = [
        Moment(float(at), 0.25, 1.5, 6e8, 1, 0.5 * at, 10.0 * at, 20.0 * at, 3000.0 * at) for at in range(1, 13)
    ] + [Moment(13.0, nan, nan, nan, 0, nan, nan, nan, nan)]
    return Run(Options("smoke", duration_s, scale), samples, moments, [(3.0, 5.0, "kill -9 of a replica")])
