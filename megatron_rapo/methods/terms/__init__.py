"""The terms that methods make their losses of, each a value a token."""
