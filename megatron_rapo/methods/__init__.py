"""What is learnt from a step's groups: one file a method, to be read beside its paper."""
