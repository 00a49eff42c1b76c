"""The options of the trainer: model, layout, optimizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_rapo.section import (
    BelowOne,
    NonNegativeFloat,
    PathOption,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)


class Model(Section):
    """The policy, the frozen reference, and how they are computed."""

    path: PathOption = Field(description="HF model directory: config.json, safetensors, tokenizer files.")
    checkpoint: PathOption | None = Field(
        None,
        description="Megatron checkpoint (torch_dist) whose weights training starts at, such as "
        "`megatron-rapo convert to-megatron` or another Megatron trainer writes; `path` then gives "
        "configuration, tokenizer, and what engines start with. Default: the weights of `path`.",
    )
    reference_path: PathOption | None = Field(
        None,
        description="HF directory of the reference. Default: the weights that training starts at.",
    )
    config: PathOption | None = Field(
        None,
        description="HF config.json to plan with (`--dry-run`) before `path` is on this machine. "
        "Where `path` exists, both must describe the same architecture.",
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Type of weights and activations.")
    recompute: Literal["none", "full"] = Field(
        "none",
        description="Activation recomputation: `full` keeps only each layer's input and repeats its forward "
        "in the backward.",
    )
    balance_coefficient: NonNegativeFloat = Field(
        0.0,
        description="Of the load-balancing loss of a mixture of experts (Switch Transformer's), a mean over "
        "a minibatch's tokens in each layer, summed over layers; 0: none, as usual in RL. It makes routers "
        "choose experts evenly.",
    )
    router_z_coefficient: NonNegativeFloat = Field(
        0.0,
        description="Of the z-loss of its routers (ST-MoE's), likewise. It keeps their logits small.",
    )
    reference_in_host_memory: bool = Field(
        False,
        description="Keep the reference's body, and its hidden states of the rollout batch, in host memory "
        "between their uses: frees GPU memory for some copying.",
    )
    vocabulary_multiple: PositiveInt = Field(
        1,
        description="Head and embedding rows are padded to a multiple of this times tensor_parallel "
        "(128 is fast on GPUs). Padded rows are masked out of every probability.",
    )


class Teacher(Section):
    """A frozen model that methods distil from: any size of any family, of the policy's tokenizer.

    It is computed under the policy's layout and in its `dtype`. Its final hidden states of a batch are kept,
    from which its head makes logits over the whole vocabulary where the loss needs them.
    """

    path: PathOption = Field(
        description="HF model directory: config.json, safetensors, and the policy's tokenizer."
    )
    checkpoint: PathOption | None = Field(
        None,
        description="Megatron checkpoint (torch_dist) of its weights; `path` then gives configuration and "
        "tokenizer. Default: the weights of `path`.",
    )
    in_host_memory: bool = Field(
        False,
        description="Keep its body, and its hidden states of the batch, in host memory between their uses: "
        "frees GPU memory for some copying.",
    )


class Parallel(Section):
    """The layout of the trainer. Its ranks number TP × PP × CP × DP."""

    tensor_parallel: PositiveInt = Field(1, description="TP: ranks that share each layer's matrices.")
    pipeline_parallel: PositiveInt = Field(1, description="PP: stages that the layers are cut into.")
    virtual_pipeline_parallel: PositiveInt | None = Field(
        None, description="VPP: model chunks a stage (interleaved 1F1B); needs pipeline_parallel > 1."
    )
    context_parallel: PositiveInt = Field(1, description="CP: ranks that share each sequence's tokens.")
    data_parallel: PositiveInt = Field(1, description="DP: replicas that share each minibatch.")
    expert_parallel: PositiveInt = Field(
        1,
        description="EP: ranks that share a layer's experts, of a mixture of experts. They are those that "
        "otherwise are TP × CP × DP ranks of a stage, so EP takes no further ones.",
    )
    expert_tensor_parallel: PositiveInt = Field(
        1, description="Ranks that share the matrices of each expert, in place of tensor_parallel."
    )
    sequence_parallel: bool = Field(
        False,
        description="Shards norms and residuals over the TP group along tokens; needs tensor_parallel > 1.",
    )
    timeout_s: Seconds = Field(
        1800.0,
        description="Seconds that a rank waits in a collective before the job is declared dead; with engines "
        "longer by the time in which one may be silent (rollout.request_timeout_s) or start "
        "(rollout.startup_timeout_s).",
    )

    @property
    def model_parallel(self) -> int:
        """Ranks of one replica: TP × PP × CP."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def world_size(self) -> int:
        """Ranks of the trainer: TP × PP × CP × DP."""
        return self.model_parallel * self.data_parallel

    def without_effect(self) -> dict[str, str]:
        inert = {}
        if self.tensor_parallel == 1 and self.sequence_parallel:
            inert["sequence_parallel"] = "tensor_parallel is 1"
        if self.pipeline_parallel == 1:
            inert["virtual_pipeline_parallel"] = "pipeline_parallel is 1"
        elif self.virtual_pipeline_parallel == 1:
            inert["virtual_pipeline_parallel"] = "one chunk a stage is the plain pipeline"
        return inert

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage: TP × CP × DP."""
        return self.tensor_parallel * self.context_parallel * self.data_parallel

    @property
    def expert_copies(self) -> int:
        """Expert data parallelism: how many ranks of a stage have the same part of the same experts."""
        return self.stage // (self.expert_parallel * self.expert_tensor_parallel)

    @model_validator(mode="after")
    def _check(self) -> Parallel:
        experts = self.expert_parallel * self.expert_tensor_parallel
        if self.stage % experts:
            raise ValueError(
                f"expert_parallel × expert_tensor_parallel = {experts} does not divide the {self.stage} "
                "ranks of a stage (TP × CP × DP); choose a divisor"
            )
        return self


class Optimizer(Section):
    """AdamW with Megatron's gradient clipping and learning-rate schedule.

    Of N updates, W of them warm-up, update n has the rate learning_rate · n / W while n ≤ W; then, with
    p = (n − 1 − W) / (N − W), it has min_learning_rate + (learning_rate − min_learning_rate) · s(p), where
    s(p) is 1 − p (linear), (1 + cos πp) / 2 (cosine) or 1 (constant). So the first update after the warm-up
    has the full rate, none has a rate of 0, and min_learning_rate is what update N + 1 would have.
    """

    learning_rate: PositiveFloat = Field(
        1e-6, description="The rate after warm-up; `optimizer/learning_rate` is the rate used."
    )
    min_learning_rate: NonNegativeFloat = Field(
        0.0, description="Where the decay ends, one update behind the last."
    )
    warmup_updates: int = Field(0, ge=0, description="Optimizer updates of linear warm-up from zero.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Shape of the decay over the optimizer updates of `decay_steps`."
    )
    decay_steps: PositiveInt | None = Field(
        None,
        description="Steps after which the decay has ended; beyond them the rate is `min_learning_rate`. "
        "Default: `run.steps`, so that to raise that later is to ask for another schedule.",
    )
    weight_decay: NonNegativeFloat = Field(0.01, description="Decoupled weight decay.")
    beta1: BelowOne = Field(0.9, description="Decay of the first moment.")
    beta2: BelowOne = Field(0.95, description="Decay of the second moment.")
    epsilon: PositiveFloat = Field(1e-8, description="Adam's ε.")
    clip_gradient: PositiveFloat = Field(1.0, description="Largest global gradient norm (L2).")
    distributed: bool = Field(
        True, description="Shard optimizer state over DP × CP (Megatron's DistributedOptimizer)."
    )
    overlap_communication: bool = Field(
        False, description="Overlap gradient and parameter communication with compute; needs distributed."
    )

    in_host_memory_during_rollouts: bool = Field(
        False,
        description="Optimizer state waits in host memory, and gradient buffers are given up, while engines "
        "sample: room for engines on the same GPUs (rollout.colocated).",
    )

    def without_effect(self) -> dict[str, str]:
        options = ["min_learning_rate", "decay_steps"] if self.decay == "constant" else []
        return dict.fromkeys(options, 'decay is "constant"')

    @model_validator(mode="after")
    def _check(self) -> Optimizer:
        if self.decay != "constant" and self.min_learning_rate >= self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} must be below "
                f"learning_rate = {self.learning_rate}; lower it"
            )
        if self.overlap_communication and not self.distributed:
            raise ValueError("overlap_communication = true needs distributed = true; set both or neither")
        return self
