"""Load on a service: `make loadtest`, `farsight loadtest`. Only `locustfile` changes anything on import."""
