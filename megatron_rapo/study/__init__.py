"""Studies: a question, a grid of runs that answers it, and the answer with its interval."""
