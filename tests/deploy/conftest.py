"""Ray's own import warns (pydantic extras on Field); everything after it is under `error` like the rest."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401
