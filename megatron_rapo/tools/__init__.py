"""Functions that the policy calls: described to it, and run in processes that can be killed."""
