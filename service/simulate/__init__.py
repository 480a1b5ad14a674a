"""Capacity planning: request traces through the real scheduler, on devices that only count seconds."""
