"""Ranks that make no progress: found by each rank's own watch, told by name with stacks and collectives."""
