"""A server before the engines, by which programs that are not ours play episodes: vLLM's generate route."""
