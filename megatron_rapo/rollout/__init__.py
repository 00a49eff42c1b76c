"""Sampling from the policy: the pool of engines, their HTTP contract, and the embedded server."""
