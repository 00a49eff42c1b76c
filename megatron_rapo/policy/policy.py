"""The policy: a Megatron model under data parallelism, its optimizer, and one step's updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_rapo.config import Adapter, Model, Optimizer
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.chunked import Head, chunked_statistics
from megatron_rapo.loss.mismatch import Mismatch
from megatron_rapo.loss.objective import Objective
from megatron_rapo.loss.statistics import TokenStatistics
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body, build_chunks
from megatron_rapo.model.dtypes import DTYPES
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.expert_routing import ExpertRouting
from megatron_rapo.policy.finite import (
    DIVERGED,
    check_finite,
    find_damage,
    named_parameters,
    refuse_not_finite,
    trained_parameters,
)
from megatron_rapo.policy.frozen import FrozenModel
from megatron_rapo.policy.gradients import accumulate_gradients, main_gradient, unwrap, wrap
from megatron_rapo.policy.hidden_states import whole_tokens
from megatron_rapo.policy.learning_rate import LearningRate
from megatron_rapo.policy.pipeline import recorded_choices, run_forward, taken_choices
from megatron_rapo.policy.weighing import mark
from megatron_rapo.weights.fresh_adapters import begin_adapters
from megatron_rapo.weights.load import load_weights

Allow = Callable[[Mapping[str, float], str | None], bool]
"""Of a minibatch's metrics, and what is not finite: whether its update is applied; the same on all ranks."""

# Times the largest weight at the start. No training comes near; far beyond, activations overflow unseen: an
# infinite variance makes a norm's output 0, and every logit the same.
MOST_GROWTH = 100.0

NORM = "optimizer/gradient_norm"


class Policy:
    """The model in training.

    Attributes:
        chunks: this rank's model chunks, as Megatron built them.
        adapter: what is trained in them in place of the weights, if not these.
        wrapped: the same, wrapped for data parallelism.
        optimizer: Megatron's.
        learning_rate: the rate of each update.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        architecture: Architecture,
        placement: Placement,
        total_updates: int,
        adapter: Adapter | None = None,
        seed: int = 0,
    ) -> None:
        """Builds the model, loads the HF weights of `model.path`, and prepares the optimizer.

        All ranks must call it together.

        Args:
            model: its weights, and how they are computed.
            optimizer: its options.
            architecture: of the model.
            placement: this rank's.
            total_updates: where the learning rate's decay ends.
            adapter: what is trained beside the weights; None: the weights are.
            seed: of the run, which adapters begin with.

        Raises:
            RapoError: the weights do not load, or `optimizer.in_host_memory_during_rollouts` has no effect.
        """
        self._offloads, self._offloaded = optimizer.in_host_memory_during_rollouts, False
        if self._offloads and device().type == "cpu":
            raise RapoError(
                "optimizer.in_host_memory_during_rollouts = true has no effect where the trainer computes on "
                "the CPU; remove it"
            )
        self.architecture = architecture
        self.placement = placement
        self.adapter = adapter
        self.chunks: list[Body] = build_chunks(architecture, model, placement.layout, adapter=adapter)
        source = model.checkpoint or model.path
        load_weights(self.chunks, architecture, source, placement.tensor_rank, placement.expert_tensor_rank)
        if adapter is not None:
            ranks = placement.tensor_rank, placement.expert_tensor_rank
            begin_adapters(self.chunks, architecture, adapter, seed, *ranks)
        largest = self._check_parameters(f"the policy's weights of {source}", "take an undamaged copy")
        self._largest_weight = MOST_GROWTH * max(largest, 1.0)
        self._routing = ExpertRouting(self.chunks, architecture, model, placement)
        self.wrapped = wrap(self.chunks, optimizer)
        self.optimizer = _megatron_optimizer(self.wrapped, optimizer, DTYPES[model.dtype])
        self.learning_rate = LearningRate(self.optimizer, optimizer, total_updates)
        _connect(self.wrapped, self.optimizer, optimizer)

    def close(self) -> None:
        """Frees memory and process groups; the policy cannot be updated any more."""
        unwrap(self.wrapped)
        config = self.wrapped[0].config  # Megatron keeps it
        config.grad_scale_func = config.no_sync_func = None

    def annotate(self, minibatches: Sequence[Sequence[Microbatch]], objective: Objective) -> None:
        """Records the log-probs under the policy as it is now, wherever it will have moved before their use.

        A step's only minibatch needs none, as its update starts from the very policy, and given texts have
        none, unless the method weighs or marks tokens by them.
        """
        method = objective.method
        if method.options.old_log_probs == "engine":
            for microbatch in (one for minibatch in minibatches for one in minibatch):
                microbatch.old_log_probs = microbatch.engine_log_probs
            return
        reads = method.weighs or method.marks_tokens
        if not reads and (len(minibatches) == 1 or method.demonstrations is not None):
            return
        microbatches = [microbatch for minibatch in minibatches for microbatch in minibatch]

        def collect(microbatch: Microbatch, hidden: Tensor) -> None:
            states = microbatch.at_places(whole_tokens(hidden, self.placement))
            head = objective.head(self.head_weight)
            statistics = chunked_statistics(states, microbatch.targets, head)
            microbatch.old_log_probs = statistics.log_prob
            if reads:
                microbatch.old_entropies = statistics.entropy
            if method.tempered is not None:
                head = replace(head, temperature=head.temperature * method.tempered)
                microbatch.tempered_log_probs = chunked_statistics(states, microbatch.targets, head).log_prob

        replays = method.options.routing_replay == "old"
        run_forward(self.wrapped, microbatches, collect, recorded_choices if replays else taken_choices)

    def log_probs(self, microbatches: Sequence[Microbatch], head: Callable[[Tensor], Head]) -> list[Tensor]:
        """`[places]` log-probs of each microbatch's targets, on the last stage; nothing elsewhere.

        `head` says how this rank's rows of the head are read. All ranks must call it together.
        """
        return [statistics.log_prob for statistics in self._statistics(microbatches, head)]

    def _statistics(
        self, microbatches: Sequence[Microbatch], head: Callable[[Tensor], Head]
    ) -> list[TokenStatistics]:
        def collect(microbatch: Microbatch, hidden: Tensor) -> TokenStatistics:
            states = microbatch.at_places(whole_tokens(hidden, self.placement))
            return chunked_statistics(states, microbatch.targets, head(self.head_weight))

        return run_forward(self.wrapped, microbatches, collect, taken_choices)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the head; on the last stage."""
        return self.chunks[-1].head_weight

    def update(
        self,
        minibatches: Sequence[Sequence[Microbatch]],
        objective: Objective,
        frozen: FrozenModel | None,
        allow: Allow = refuse_not_finite,
    ) -> Mapping[str, float]:
        """One optimizer update a minibatch, where `allow` lets it be applied. One that is not counts in the
        learning rate's schedule all the same, and unless it is not finite in the metrics.

        `frozen` is the model whose whole distribution the objective may want; it has annotated them.

        Returns:
            Metrics, means over all response tokens; loss, gradient norm and learning rate are means over the
            updates. The same on all ranks.

        Raises:
            RapoError: a weight is not finite, or MOST_GROWTH times what was the largest; on all ranks. So is
                what `allow` raises.
        """
        sums = torch.zeros(len(objective.parts), dtype=torch.float64, device=device())
        mismatch, norms, rates, before = Mismatch(device()), [], [], self._bit_sums()
        self._routing.begin_step()
        for number, minibatch in enumerate(minibatches):
            self._routing.begin_update(minibatch)
            self._mark(minibatch, objective, moved=number > 0)
            self.learning_rate.begin_update()
            rates.append(self.optimizer.param_groups[0]["lr"])
            of_minibatch, apart = self._accumulate(minibatch, objective, frozen)
            norm = self._gradient_norm()
            told = {**self._told(objective, of_minibatch, apart), NORM: norm}
            damage = self._not_finite(objective.metrics(of_minibatch), norm)
            if damage is None:
                sums += of_minibatch
                mismatch.merge(apart)
                norms.append(norm)
            if allow(told, damage):
                self.optimizer.step()
        self.synchronise_parameters()
        self._check_parameters("after the step's updates, weights", DIVERGED, self._largest_weight)
        return {
            **self._told(objective, sums, mismatch, updates=max(len(norms), 1)),
            NORM: sum(norms) / len(norms) if norms else math.nan,
            "optimizer/learning_rate": sum(rates) / len(rates),
            "optimizer/changed_tensors": self._changed(before),
            **self._routing.metrics(replays=objective.method.options.routing_replay != "off"),
        }

    @staticmethod
    def _told(objective: Objective, sums: Tensor, mismatch: Mismatch, updates: int = 1) -> dict[str, float]:
        """What is told of minibatches."""
        apart = mismatch.metrics() if objective.method.demonstrations is None else {}
        return {**objective.metrics(sums, updates=updates), **apart}

    def _gradient_norm(self) -> float:
        """As `optimizer.step` computes it, before it is called."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def _not_finite(self, metrics: Mapping[str, float], norm: float) -> str | None:
        """What is NaN or infinite in a minibatch's loss and gradients, on all ranks."""
        if damage := _damage_to(metrics):
            return damage
        gradients = {name: main_gradient(parameter) for name, parameter in trained_parameters(self.chunks)}
        _, damage = find_damage("gradients", gradients, self.placement, DIVERGED)
        return damage or _damage_to({"loss/not_finite": 0.0, NORM: norm})  # a sum of squares that overflows

    def _bit_sums(self) -> Tensor:
        """`[tensors]` int64: of each weight that this rank trains the sum of its bits, read as integers."""
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        return torch.stack(
            [
                parameter.detach().view(integers[parameter.element_size()]).sum(dtype=torch.int64)
                for _, parameter in trained_parameters(self.chunks)
            ]
        )

    def _changed(self, before: Tensor) -> float:
        """The share of tensors that changed since, on the rank where it is the largest."""
        return self.placement.largest(float((self._bit_sums() != before).double().mean()))

    def _mark(self, minibatch: Sequence[Microbatch], objective: Objective, *, moved: bool) -> None:
        """What the method makes of a minibatch's tokens before its update (`Method.mark_tokens`)."""
        method, now = objective.method, None
        if moved and method.marks_tokens and method.follows_policy:
            now = self._statistics(minibatch, objective.head)
        mark(minibatch, method, self.placement, now)

    def _accumulate(
        self, minibatch: Sequence[Microbatch], objective: Objective, frozen: FrozenModel | None
    ) -> tuple[Tensor, Mismatch]:
        """The minibatch's gradients in the buffers; the sums that metrics are made of."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return accumulate_gradients(self.wrapped, minibatch, objective, frozen, self.placement)

    def _check_parameters(self, what: str, remedy: str, bound: float = math.inf) -> float:
        return check_finite(what, dict(named_parameters(self.chunks)), self.placement, remedy, bound)

    def offload(self) -> None:
        """Optimizer state to host memory, and gradient buffers away, if the options say so: for rollouts."""
        if self._offloads and not self._offloaded:
            self.optimizer.offload_to_cpu()
            for chunk in self.wrapped:
                chunk.offload_grad_buffers()
            self._offloaded = True

    def onload(self) -> None:
        """Everything is where it computes again."""
        if self._offloaded:
            self.optimizer.restore_from_cpu()
            for chunk in self.wrapped:
                chunk.restore_grad_buffers()
            self._offloaded = False

    @contextmanager
    def onloaded(self) -> Iterator[None]:
        """For updates: onload, and offload again. An error leaves it as it is, since it ends the run."""
        self.onload()
        yield
        self.offload()

    def go_to_update(self, update: int) -> None:
        """Sets the learning rate to where it stands after `update` updates."""
        self.learning_rate.go_to(update)

    def synchronise_parameters(self) -> None:
        """Makes every rank's parameters current; needed before they are read outside the forward pass."""
        for chunk in self.wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)


def _damage_to(metrics: Mapping[str, float]) -> str | None:
    if metrics["loss/not_finite"] > 0:
        return (
            f"{metrics['loss/not_finite']:.2%} of the response tokens have NaN or infinite logits under the "
            f"policy: {DIVERGED}"
        )
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    return next((f"{name} = {value}: {DIVERGED}" for name, value in broken.items()), None)


def _megatron_optimizer(
    wrapped: Sequence[DistributedDataParallel], optimizer: Optimizer, dtype: torch.dtype
) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=optimizer.learning_rate,
        min_lr=optimizer.min_learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_gradient,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=optimizer.distributed,
        overlap_param_gather=optimizer.overlap_communication,
    )
    return get_megatron_optimizer(config, list(wrapped))


def _connect(
    wrapped: Sequence[DistributedDataParallel], megatron_optimizer: Any, optimizer: Optimizer
) -> None:
    """Gives the pipeline schedules what they call around gradient accumulation."""
    config = wrapped[0].config
    config.grad_scale_func = megatron_optimizer.scale_loss
    if optimizer.overlap_communication:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
