"""The links of a layout, measured by its ranks."""

from __future__ import annotations

import re

from megatron_rapo.machine.links import links
from tests.distributed.jobs import layout


def test_each_group_of_a_layout_is_measured() -> None:
    findings = links(layout("tp2-pp2"))
    assert [one.name for one in findings] == [
        "collectives of TP",
        "collectives of PP",
        "collectives of all ranks",
        "clocks",
    ]
    assert {one.verdict for one in findings} == {"ok"}
    for one, ranks in zip(findings, (2, 2, 4), strict=False):
        assert re.match(rf"{ranks} ranks: [\d,]+ µs for a number, \d+\.\d GB/s for 16 MiB", one.found), one
    assert findings[-1].found.endswith("apart on 1 machine")
