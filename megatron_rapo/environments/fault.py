"""What an environment must not do."""


class EnvironmentFault(Exception):
    """An environment did what the protocol does not allow: the run ends, and says what."""
