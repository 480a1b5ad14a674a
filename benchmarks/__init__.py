"""Measures a running service, or attention itself, next to a yardstick in the same run."""
