"""`farsight bench ...`: measures a running service, or attention itself, each beside a yardstick in the same run."""

from service.bench.cli import app

__all__ = ["app"]
