"""`python -m benchmarks` measures a running service, or attention itself, compared with a baseline in the same run."""

from benchmarks.command import app

app(prog_name="python -m benchmarks")
