"""Layouts of a run on so many devices: which fit, and how long a step takes on each (docs/planning.md)."""
