"""Batches that are sampled ahead of the steps that train on them."""
