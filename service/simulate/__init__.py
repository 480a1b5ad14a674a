"""Capacity planning: traces of requests through the real scheduler on devices that only count."""
