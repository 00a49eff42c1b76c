"""Requests of one round of sampling, from any thread, to the engines that live at its beginning."""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future

from megatron_rapo.background import BackgroundLoop
from megatron_rapo.rollout.dispatch import Dispatch
from megatron_rapo.rollout.requests import Request
from megatron_rapo.rollout.response import Response


class Round:
    """Open between the beginning of a rollout and its end (`EnginePool.round`)."""

    def __init__(self, loop: BackgroundLoop, dispatch: Dispatch[Request, list[Response]]) -> None:
        """`dispatch` is used on the loop alone."""
        self._loop = loop
        self._dispatch = dispatch

    def ask(self, request: Request, after: Hashable | None = None) -> Future[list[Response]]:
        """The request's responses, in its order, once an engine has made them; where it has room, the one
        that had the first request which came `after` the same.

        They do not depend on which engine does, beyond the rounding of logits in another batch. The future
        fails with `TooFewEngines` where engines were lost and too few are left, with `RapoError` where one
        refused it.
        """
        return self._loop.start(self._dispatch.ask(request, after))

    @property
    def resent(self) -> int:
        """Requests that were sent again, since the engine that had them was lost."""
        return self._dispatch.resent

    def close(self) -> None:
        """Gives up what is under way."""
        self._loop.run(self._dispatch.close())
