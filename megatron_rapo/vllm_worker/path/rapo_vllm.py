"""What vLLM imports by name: `PYTHONPATH` has this folder, and no other module of the trainer's environment.

The package is loaded by its place, since a folder on the path would bring all that is installed beside it:
another torch, for one.
"""

import importlib.util
import sys
from pathlib import Path

if "megatron_rapo" not in sys.modules:
    _root = Path(__file__).resolve().parents[2]
    _spec = importlib.util.spec_from_file_location(
        "megatron_rapo", _root / "__init__.py", submodule_search_locations=[str(_root)]
    )
    assert _spec is not None and _spec.loader is not None
    sys.modules["megatron_rapo"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["megatron_rapo"])

from megatron_rapo.vllm_worker.extension import Extension
from megatron_rapo.vllm_worker.guard import Guard

__all__ = ["Extension", "Guard"]
