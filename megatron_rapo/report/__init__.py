"""The exploration report: one self-contained page, its figures and its numbers, of runs and evaluations."""
