"""The one exception whose message is meant for the user."""


class RapoError(Exception):
    """Something the user can mend: the message names what is wrong, the value, and the remedy.

    The command line prints it without a traceback and ends the whole job with a non-zero status.
    """
