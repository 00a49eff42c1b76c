"""The rooms of tools/crash_test.py: what is done, to which run, and what must be the same after it."""
