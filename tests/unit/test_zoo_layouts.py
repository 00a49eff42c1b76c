"""Methods of the zoo at every layout, in chunks, and over a checkpoint: `check_method` of each."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_rapo.methods.named import METHODS
from megatron_rapo.testing import check_method
from tests.papers import PAPERS

# Their terms mean to have another gradient than their value's.
WITH_DETACH = {"hapo", "sage", "epo"}


@pytest.mark.parametrize("name", PAPERS)
def test_it_is_the_same_at_every_layout_and_over_a_checkpoint(name: str) -> None:
    options: dict[str, Any] = {**PAPERS[name].base}
    check_method(METHODS[name], options, gradient=name not in WITH_DETACH)
