"""Environments, and how a head runs the episodes of its prompts in them."""
