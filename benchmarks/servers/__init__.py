"""The servers of `python -m benchmarks serving`. The apps here run in their own venvs and import no code of ours."""
