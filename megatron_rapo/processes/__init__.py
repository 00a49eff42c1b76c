"""Python processes of their own, which can be limited and killed: how they are started, and ended."""
