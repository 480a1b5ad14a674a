"""`python -m benchmarks` measures a running service, or attention itself, next to a yardstick in the same run."""

from benchmarks.command import app

app(prog_name="python -m benchmarks")
