"""How long engines take to sample a step's responses, and to get new weights.

A decoding step of b responses reads the weights and the keys and values of b contexts, or computes for as
long as its products take, whichever is more (a roofline), with what the profile says of steps, layers and
responses. Responses end one after the other (`Workload.still_running`), so late steps have small batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import count_expert_parameters, count_parameters
from megatron_rapo.planning.profile import Profile, all_reduce_s
from megatron_rapo.planning.remembered import remembered
from megatron_rapo.planning.workload import Workload
from megatron_rapo.scaling.flops import forward_flops
from megatron_rapo.scaling.memory import GIB

_POINTS = 32  # at which the batch is looked at, while responses end
_USABLE = 0.85  # of a device's memory: about what vLLM and SGLang take for weights and cache


@dataclass(frozen=True)
class EngineSplit:
    """Engines: how many, and the devices of each."""

    engines: int
    tensor_parallel: int


@dataclass(frozen=True)
class EngineModel:
    """The seconds of a step's rollout, by how devices are split into engines."""

    architecture: Architecture
    workload: Workload
    profile: Profile
    element: int
    """Bytes of a weight, and of keys and values."""
    batch: int | None
    """Responses that decode together at most, as an engine of one request at a time has it."""

    def rollout_s(self, split: EngineSplit, taken_gib: float = 0.0) -> float | None:
        """Of all responses; None where weights leave no room for a response.

        Args:
            split: of the devices.
            taken_gib: of a device's memory, what a trainer beside holds meanwhile.
        """
        load = self.workload
        prompts = -(-load.prompts // split.engines)  # a group stays on one engine
        here = prompts * load.responses / load.prompts
        together = min(here, self.batch or here, self.room(split, taken_gib))
        if together < 1:
            return None
        return self._sampled_s(split, prompts, here, together)

    @remembered
    def _sampled_s(self, split: EngineSplit, prompts: int, here: float, together: float) -> float:
        """Of an engine's share of prompts and responses, of which so many decode together."""
        load = self.workload
        prefill = self.prefill_s(split, prompts, load.prompt_tokens)
        if self.batch is not None and here > self.batch:  # one batch ends before the next begins
            return prefill + here / together * self._drain_s(split, together)
        context = load.prompt_tokens + load.response_tokens / 2
        each = self.decode_s(split, together, context) / together
        return prefill + (here - together) * load.response_tokens * each + self._drain_s(split, together)

    def publish_s(self, devices: int, *, over_disk: bool) -> float:
        """The weights to all engines: over the slowest link, or written and read."""
        nbytes = self._weights
        if over_disk:
            return 2 * nbytes / self.profile.disk_bytes_per_s
        link = self.profile.link(devices)
        return link.latency_s + 2 * nbytes / link.bytes_per_s  # gathered from its shards, then sent

    def _drain_s(self, split: EngineSplit, together: float) -> float:
        """Decoding of so many responses that begin at once, until the longest has ended."""
        load = self.workload
        step = load.longest / _POINTS
        context = load.prompt_tokens + load.response_tokens / 2
        shares = (load.still_running((point + 0.5) * step) for point in range(_POINTS))
        return sum(step * self.decode_s(split, max(1.0, together * share), context) for share in shares)

    def decode_s(self, split: EngineSplit, batch: float, context: float) -> float:
        """Of a token of each of so many responses, which attend to so many tokens in the mean."""
        tensor, rates = split.tensor_parallel, self.profile.engine
        rows = max(1, round(batch))
        weights = self._read(batch) / tensor
        read = (weights + batch * context * self._kept_of_token / tensor) / self.profile.memory_bytes_per_s
        layers = self.architecture.layers
        flops = rows * self._token_flops(round(context)) / tensor
        computed = self.profile.matrix_s(flops, 4 * layers + 1)
        link = self.profile.link(tensor)
        wire = 2 * layers * all_reduce_s(link, tensor, batch * self.architecture.hidden * self.element)
        return max(read, computed) + wire + rates.step_s + layers * rates.layer_s + batch * rates.response_s

    @remembered
    def _token_flops(self, context: int) -> int:
        """Of a token that attends to so many."""
        return forward_flops(self.architecture, [1], [context])

    def prefill_s(self, split: EngineSplit, prompts: int, tokens: float) -> float:
        """Of so many contexts of so many tokens each."""
        body = replace(self.architecture, vocabulary=0)
        flops = forward_flops(body, [round(prompts * tokens)], [round(tokens)]) / split.tensor_parallel
        return self.profile.matrix_s(flops, prompts * 4 * self.architecture.layers)

    def room(self, split: EngineSplit, taken_gib: float) -> float:
        """Responses of mean length whose keys and values fit beside the weights."""
        free = (self.profile.memory_gib - taken_gib) * GIB * _USABLE * split.tensor_parallel
        free -= self._weights
        return free / (self.workload.sequence * self._kept_of_token)

    @cached_property
    def _weights(self) -> int:
        """Bytes of the model."""
        return count_parameters(self.architecture) * self.element

    @cached_property
    def _weights_of_experts(self) -> int:
        """Bytes of all experts of all layers."""
        return self.architecture.layers * count_expert_parameters(self.architecture) * self.element

    def _read(self, batch: float) -> float:
        """Bytes of the weights that a token of each of so many responses needs.

        Of experts those that any of them chooses, if each chooses evenly and by itself:
        count · (1 − (1 − chosen / count)^batch) of a layer.
        """
        experts = self.architecture.experts
        if experts is None:
            return self._weights
        idle = (1 - experts.chosen / experts.count) ** batch
        return self._weights - idle * self._weights_of_experts

    @property
    def _kept_of_token(self) -> int:
        """Bytes of keys and values."""
        one = self.architecture
        return 2 * one.layers * one.kv_heads * one.head_dim * self.element
