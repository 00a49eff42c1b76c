"""Every case's loss and whole gradient against plain PyTorch, on all ranks of one job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_rapo.certify.adapted import RandomAdapters, adapted
from megatron_rapo.certify.cases import CASES, RANKS, VOCABULARY, Case, batch, batch_of
from megatron_rapo.certify.plain_loss import PlainModel, old_entropies, plain_loss, tempered_log_probs
from megatron_rapo.config import Optimizer, Parallel, RunConfig
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.episode.group import Group
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.delivery import with_tokens
from megatron_rapo.experience.sharing import share
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.method import Method
from megatron_rapo.model.build import build_chunks
from megatron_rapo.model.dtypes import DTYPES
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, arrange, process_groups
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.gradients import accumulate_gradients, main_gradient, unwrap, wrap
from megatron_rapo.policy.weighing import mark, weigh
from megatron_rapo.weights.export import hf_tensors
from megatron_rapo.weights.load import fill, load_weights
from megatron_rapo.weights.parameter_map import mapped_parameters

# Norm of the difference over the norm.
BARS = {"float64": 1e-10, "float32": 1e-5}


@dataclass(frozen=True)
class Result:
    """One line of the certificate; errors are relative.

    That of the loss is to Σ |loss| of its tokens: advantages of a group cancel, so that some methods' losses
    are near 0.
    """

    case: str
    dtype: str
    loss: float
    expected_loss: float
    loss_error: float
    gradient_error: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within the bar."""
        # One by one: `max` may drop a NaN.
        return all(error <= BARS[self.dtype] for error in (self.loss_error, self.gradient_error))


def measure(config: RunConfig, report: Path, cases: Sequence[Case] = CASES) -> None:
    """One rank's part: runs the cases in all dtypes; rank 0 writes the results to `report` as JSON.

    Args:
        config: its `model.path` and `reference_path` hold the small models; its algorithm is certified, in
            the gradients of its adapter, if it has one.
        report: a file.
        cases: what to run.
    """
    with process_groups(Parallel(data_parallel=RANKS), config.run.seed) as everyone:
        results = compare(config, cases, is_main=everyone.is_main)
        if everyone.is_main:
            report.write_text(json.dumps([asdict(result) for result in results]))


def compare(config: RunConfig, cases: Sequence[Case], *, is_main: bool) -> list[Result]:
    """The cases in all dtypes, within process groups; empty but on the main rank."""
    results: list[Result] = []
    for dtype in BARS:
        expected = _expected(config, DTYPES[dtype]) if is_main else None
        for case in cases:
            loss, gradient = _computed(config, case, dtype)
            if expected is not None:
                results.append(_compare(case, dtype, loss, gradient, *expected))
    return results


def _expected(config: RunConfig, dtype: torch.dtype) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, Σ |loss| of its tokens, and the gradient by HF name."""
    policy, reference = (
        _plain(path, dtype) for path in (config.model.path, config.model.reference_path or config.model.path)
    )
    teacher = None if config.teacher is None else _plain(config.teacher.path, dtype)
    trained = policy.weights
    if config.adapter is not None:
        trained = RandomAdapters(policy.architecture, config.adapter).all(dtype)
    for tensor in trained.values():
        tensor.requires_grad_()
    if config.adapter is not None:
        policy = replace(policy, weights=adapted(policy.weights, trained, config.adapter.scale))
    method = config.new_method()
    groups = batch_of(method)
    [samples] = make_samples(groups, method, VOCABULARY, config.minibatch_prompts)
    loss, size = plain_loss(
        policy,
        reference,
        teacher,
        samples,
        method,
        temperature=config.rollout.temperature,
        vocabulary=VOCABULARY,
    )
    if not size:
        raise RapoError(
            f'method "{method.options.method}" has a loss of 0 at every token of what is certified, so '
            "there is nothing to compare; give it options by which it learns from rewards of 0 and 1"
        )
    loss.backward()
    gradients = {name: tensor.grad for name, tensor in trained.items() if tensor.grad is not None}
    return float(loss.detach()), size, gradients


def _plain(path: Path, dtype: torch.dtype) -> PlainModel:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    return PlainModel(weights, read_architecture(path))


def _computed(config: RunConfig, case: Case, dtype: str) -> tuple[float, dict[str, Tensor]]:
    """Loss, and on rank 0 the gradient by HF name, under the case's layout."""
    placement = arrange(case.layout, config.run.seed)
    architecture = read_architecture(config.model.path)
    # Not validated: float64 is no option of a run.
    model = config.model.model_copy(update={"dtype": dtype})
    budget = case.token_budget or _longest(config, case.layout)
    options = {"max_tokens_per_microbatch": budget, "share_prompts": case.share_prompts}
    algorithm = config.algorithm.model_copy(update=options)
    config = config.model_copy(update={"model": model, "parallel": case.layout, "algorithm": algorithm})
    method = config.new_method()

    adapter = config.adapter
    chunks = build_chunks(architecture, model, case.layout, adapter=adapter)
    load_weights(chunks, architecture, model.path, placement.tensor_rank, placement.expert_tensor_rank)
    if adapter is not None:
        matrices = RandomAdapters(architecture, adapter)
        for mapped in mapped_parameters(chunks, architecture, adapter):
            fill(mapped, matrices, architecture, placement.tensor_rank, placement.expert_tensor_rank)
    wrapped = wrap(chunks, Optimizer(distributed=False))
    objective = Objective(
        method,
        temperature=config.rollout.temperature,
        vocabulary=VOCABULARY,
        group=placement.tensor_group,
        context_group=placement.context_group,
    )
    groups = batch_of(method)[::-1] if case.permuted else batch_of(method)
    shared = _shared(groups, method, placement)
    samples = make_samples(shared.groups, method, VOCABULARY, config.minibatch_prompts)
    plans = plan_minibatches(samples, config)
    minibatches = build_minibatches(with_tokens(samples, plans, shared, placement), plans, config, placement)
    for microbatch in minibatches[0]:
        _widen(microbatch, DTYPES[dtype])
        engine = microbatch.engine_log_probs
        microbatch.old_log_probs, microbatch.old_entropies = engine, old_entropies(engine)
        if method.tempered is not None:
            microbatch.tempered_log_probs = tempered_log_probs(engine, method.tempered)
    frozen = open_frozen(config, architecture, method, placement, chunks)
    for one in frozen:
        one.annotate(minibatches, objective)
    distribution = frozen[-1] if frozen else None
    weigh(minibatches, method, placement)
    mark(minibatches[0], method, placement)
    sums, _ = accumulate_gradients(wrapped, minibatches[0], objective, distribution, placement)
    gradient = dict(hf_tensors(chunks, architecture, placement, main_gradient, adapter))
    unwrap(wrapped)
    return objective.metrics(sums)["loss/total"], _collected(gradient, placement)


def _widen(microbatch: Microbatch, dtype: torch.dtype) -> None:
    """What a method is given, and makes of it, in the model's type: so its rounding is not in the error."""
    for name in ("weights", "phi", "advantages", "engine_log_probs"):
        setattr(microbatch, name, getattr(microbatch, name).to(dtype))
    microbatch.marks = {name: values.to(dtype) for name, values in microbatch.marks.items()}


def _shared(groups: Sequence[Group], method: Method, placement: Placement) -> Batch:
    """The groups as a step has them whose heads sampled a share each."""
    mine = groups[placement.data_rank :: placement.layout.data_parallel] if placement.is_head else []
    problems = [group.problem for group in groups]
    sampled = share(problems, mine, placement, whole=method.reads_responses)
    return Batch(sampled.groups, sampled, rounds=0)


def _longest(config: RunConfig, layout: Parallel) -> int:
    """Tokens of the longest sequence, padded: no two sequences then share a microbatch."""
    multiple = config.model_copy(update={"parallel": layout}).sequence_multiple
    lengths = [one.episode.tokens for group in batch() for one in group.episodes]
    return -(-max(lengths) // multiple) * multiple


def _collected(gradient: dict[str, Tensor], placement: Placement) -> dict[str, Tensor]:
    """The gradients that all ranks collected."""
    shares: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, gradient, group=placement.host_group)
    return {name: tensor for share in shares for name, tensor in share.items()}


def _compare(
    case: Case,
    dtype: str,
    loss: float,
    gradient: Mapping[str, Tensor],
    expected_loss: float,
    size: float,
    expected: Mapping[str, Tensor],
) -> Result:
    if set(gradient) != set(expected):
        raise ValueError(f"{case.name}: gradients of {sorted(set(gradient) ^ set(expected))} are missing")
    squares = sum(
        float((gradient[name].double() - tensor.double()).norm() ** 2) for name, tensor in expected.items()
    )
    scale = sum(float(tensor.double().norm() ** 2) for tensor in expected.values())
    return Result(
        case=case.name,
        dtype=dtype,
        loss=loss,
        expected_loss=expected_loss,
        loss_error=abs(loss - expected_loss) / size,
        gradient_error=(squares / scale) ** 0.5,
    )
