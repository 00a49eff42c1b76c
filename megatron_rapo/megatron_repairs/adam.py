"""Repairs checkpoints of Megatron's DistributedOptimizer over torch's Adam (no Transformer Engine, no Apex).

megatron/core/optimizer/distrib_optimizer.py trips over torch's per-parameter `step` three times (lines of
0.16.1, of 0.19.2): saving a fresh optimizer asserts that a step exists (642, 839); loading copies `step` like
a moment and fails (940, 1225); and the loaded `step` is one tensor shared by all parameters (825, 1032), so
that each of them advances it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

VERSIONS = ">=0.16.1,<0.20"


def repair() -> None:
    """Does nothing where Transformer Engine or Apex is present."""
    if HAVE_APEX_OR_TE:
        return
    load, state_dict = DistributedOptimizer.load_state_dict, DistributedOptimizer.state_dict

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            main.copy_(tensors["param"])
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[main][moment].copy_(tensors[moment])

    def load_unshared(self: Any, state: dict[str, Any]) -> None:
        load(self, state)
        for values in self.optimizer.state.values():
            values["step"] = values["step"].clone()

    def state_of_fresh(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for values in self.optimizer.state.values():
                values["step"] = torch.tensor(0.0)
        return state_dict(self)

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.load_state_dict = load_unshared
    DistributedOptimizer.state_dict = state_of_fresh
