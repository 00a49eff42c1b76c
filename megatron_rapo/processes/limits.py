"""What a process of ours does first, so that it neither starves nor outlives the one that started it."""

from __future__ import annotations

import os
import resource
import signal


def protect_parent(memory_limit: int) -> None:
    """Bounds this process's address space (bytes), and leaves output and Ctrl-C to the parent."""
    os.dup2(2, 1)  # what functions print is for people; standard output may be for programs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, ceiling = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_limit if ceiling == resource.RLIM_INFINITY else min(memory_limit, ceiling)
    resource.setrlimit(resource.RLIMIT_AS, (limit, ceiling))


def leave_if_forked(own: int) -> None:
    """Ends this process where it is a copy that the user's code forked and let return: another one answers.

    Args:
        own: the number of the process that is to answer.
    """
    if os.getpid() != own:
        os._exit(0)


def die_in(seconds: float) -> None:
    """The kernel ends this process after so many seconds, whatever it is doing; 0: never."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
