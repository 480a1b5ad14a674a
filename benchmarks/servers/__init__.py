"""The servers of `python -m benchmarks serving`; the apps here run in venvs of their own and import nothing of ours."""
