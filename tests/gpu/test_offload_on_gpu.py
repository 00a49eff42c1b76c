"""One rank on a GPU: an optimizer that waited in host memory goes on as one that did not."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_rapo.config import Model, Optimizer, Parallel
from megatron_rapo.launch.local import run_local
from tests.distributed.minibatches import VOCABULARY, make_minibatches
from tests.gpu import needs_cuda
from tests.methods import a_method
from tests.models import make_hf_model


@needs_cuda
def test_updates_are_the_same_with_and_without_waiting_in_host_memory(tmp_path):
    path = make_hf_model(tmp_path / "model", hidden_size=256, head_dim=64)
    report = tmp_path / "report.json"
    run_local(measure, (path, report), 1)
    found = json.loads(report.read_text())
    assert found["same"] is True
    assert found["freed"] > 0


def measure(path: Path, report: Path) -> None:
    from megatron_rapo.loss.objective import Objective
    from megatron_rapo.model.hf_config import read_architecture
    from megatron_rapo.parallel.placement import process_groups
    from megatron_rapo.policy.policy import Policy

    with process_groups(Parallel(), seed=1) as placement:
        method = a_method("grpo", divergence_coefficient=0.0)
        objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
        outcomes, freed = [], 0
        for waits in (False, True):
            optimizer = Optimizer(learning_rate=1e-3, in_host_memory_during_rollouts=waits)
            policy = Policy(Model(path=path), optimizer, read_architecture(path), placement, 10)
            for seed in range(3):
                policy.update(make_minibatches(placement, [seed]), objective, None)
                before = torch.cuda.memory_allocated()
                policy.offload()
                freed = max(freed, before - torch.cuda.memory_allocated())
                policy.onload()
            outcomes.append(torch.cat([p.detach().flatten().cpu() for p in policy.chunks[0].parameters()]))
        report.write_text(json.dumps({"same": torch.equal(*outcomes), "freed": freed}))
