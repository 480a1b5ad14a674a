"""Load on a running service: `make loadtest`. `payloads` and `report` are plain Python and change nothing on import."""
