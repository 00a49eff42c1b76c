"""Methods of the zoo at every layout, in chunks, and over a checkpoint: `check_method` of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from megatron_rapo.certify.cases import batch
from megatron_rapo.episode.group import Group
from megatron_rapo.methods.named import METHODS
from megatron_rapo.testing import check_method
from tests.papers import PAPERS

# Their terms mean to have another gradient than their value's.
WITH_DETACH = {"hapo", "sage", "epo"}


def groups() -> Sequence[Group]:
    """The certificate's, with facts, answers and columns."""

    def told(group: Group) -> Group:
        episodes = tuple(
            replace(
                one,
                verification=replace(
                    one.verification,
                    extracted=str(number % 3),
                    facts={"calls": number + 1.0, "rubrics": number / 4},
                ),
            )
            for number, one in enumerate(group.episodes)
        )
        columns = {"base_success": float(int(group.problem.id) % 2)}
        return replace(group, problem=replace(group.problem, columns=columns), episodes=episodes)

    return [told(group) for group in batch()]


@pytest.mark.parametrize("name", PAPERS)
def test_it_is_the_same_at_every_layout_and_over_a_checkpoint(name: str) -> None:
    options: dict[str, Any] = {**PAPERS[name].base}
    check_method(METHODS[name], options, groups=groups(), gradient=name not in WITH_DETACH)
