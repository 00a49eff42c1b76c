"""What a vLLM server has of ours: how its workers take weights, and a key before all of its routes.

It runs in vLLM's own environment, which finds it by `path/` alone, and imports neither Megatron nor anything
that vLLM does not bring along.
"""
