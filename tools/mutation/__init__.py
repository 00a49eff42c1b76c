"""The rooms of tools/mutate.py: faults, which tests run a line, trials in copies of the repository."""
