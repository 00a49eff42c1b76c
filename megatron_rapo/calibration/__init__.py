"""Measures the machine at hand, as a profile that plans are made with (docs/planning.md)."""
