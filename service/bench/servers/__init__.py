"""The servers of `farsight bench serving`; the apps here run in venvs of their own and import nothing of ours."""
