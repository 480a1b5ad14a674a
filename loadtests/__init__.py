"""Load on a service: `make loadtest`, `python -m loadtests`. Only `locustfile` changes anything on import."""
