"""Runs that are simulated, event by event: the trainer's own order of batches over planned durations."""
