"""`farsight bench ...`: measurements against a running service, each beside a yardstick in the same run."""

from service.bench.cli import app

__all__ = ["app"]
