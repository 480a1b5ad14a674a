"""Measure a running service, or attention itself, compared with a baseline in the same run."""
