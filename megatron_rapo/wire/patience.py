"""How long both ends between trainer and engines wait for each other."""

TIMEOUT_S = 120.0  # for everyone to join a group, and for each message or broadcast in it
