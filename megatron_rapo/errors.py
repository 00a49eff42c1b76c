"""The exceptions whose messages are meant for the user."""


class RapoError(Exception):
    """Something the user can mend: the message names what is wrong, the value, and the remedy.

    The command line prints it without a traceback and ends the whole job with a non-zero status.
    """


class EngineLost(RapoError):
    """An engine does not answer as one: it is gone, hangs, fails inside, or sends what no engine sends.

    Others can do its work. A refusal (a status of 4xx, responses of other weights) is a plain `RapoError`:
    another engine would refuse as well.
    """
