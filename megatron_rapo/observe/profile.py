"""The profile of chosen steps, by PyTorch's profiler: operators and kernels, under the names of phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_rapo.config import RunConfig

FOLDER = "profile"


class Profiler:
    """Profiles the steps of `observe.profile_steps` on the ranks of `observe.profile_ranks`, each whole.

    RUN/profile/step_000003-rank_00000.json    for https://ui.perfetto.dev
    """

    def __init__(self, config: RunConfig, rank: int) -> None:
        observe = config.observe
        self._steps = frozenset(observe.profile_steps if rank in observe.profile_ranks else ())
        self._folder = config.run.directory / FOLDER
        self._rank = rank
        self._step = 0
        self._profile: Any = None

    def begin_step(self, step: int) -> None:
        """`step` begins."""
        self._step = step
        if step in self._steps:
            from torch.profiler import profile  # late: torch takes seconds

            self._profile = profile(acc_events=True)  # CUDA's activities are among the default's, where it is
            self._profile.__enter__()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what happens within it."""
        if self._profile is None:
            yield
            return
        from torch.profiler import record_function

        with record_function(name):
            yield

    def finish_step(self) -> None:
        """Writes the step's profile, if there is one.

        Raises:
            OSError: the disk is full or broken.
        """
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.__exit__(None, None, None)
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"step_{self._step:06d}-rank_{self._rank:05d}.json"
            profile.export_chrome_trace(str(self._folder / name))
