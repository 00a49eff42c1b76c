"""The family of docs/families.md, from outside of the package: who imports this has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_rapo.model.families.named import FAMILIES

PAGE = (Path(__file__).parents[1] / "docs/families.md").read_text(encoding="utf-8")
RECORD, LINE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)

names: dict[str, Any] = {"FAMILIES": FAMILIES}
exec(RECORD + LINE, names)
