"""Frozen dataclasses that describe a model, a device, the work and the plan. JSON in and out; no
torch."""
