"""Experience: prompts to scored groups of responses, shared by all ranks."""
