"""Prices requests before they run: cost in closed form, predicted seconds on this device, and the plan."""
