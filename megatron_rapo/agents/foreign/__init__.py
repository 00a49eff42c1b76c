"""What runs in the other interpreter, which need not have this package: files that import nothing of it."""
