"""Load tests of the service: `make loadtest`, `python -m loadtests`. Only `locustfile` has side effects on import."""
