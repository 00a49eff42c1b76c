"""Every option of a run: typed, validated, documented, and refused where it would have no effect.

`docs/configuration.md` is generated from this file (`megatron_rapo.config.document`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of the TOML file. Unknown keys are errors; values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def _refuse(self, options: list[str], because: str) -> None:
        """Refuses options that were set by hand although they would have no effect."""
        for option in options:
            if option in self.model_fields_set and getattr(self, option) is not None:
                raise ValueError(
                    f"{option} = {getattr(self, option)!r} would have no effect: {because}; remove it"
                )


class Run(Section):
    """What this run is called, where it writes, and how long it goes on."""

    directory: Path = Field(
        description="Folder of the run: configuration, metrics, checkpoints, final model."
    )
    steps: PositiveInt = Field(description="Rollout batches to train on.")
    seed: int = Field(
        1234,
        ge=0,
        lt=2**31,
        description="Seeds prompt order, generated tasks and sampling; the same seed repeats the run.",
    )


class Model(Section):
    """The policy, the frozen reference, and how they are computed."""

    path: Path = Field(description="HF model directory: config.json, safetensors, tokenizer files.")
    reference_path: Path | None = Field(
        None,
        description="HF directory of the reference. Default: `path`: training starts at it.",
    )
    config: Path | None = Field(
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
    vocabulary_multiple: PositiveInt = Field(
        1,
        description="Head and embedding rows are padded to a multiple of this times tensor_parallel "
        "(128 is fast on GPUs). Padded rows are masked out of every probability.",
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
    sequence_parallel: bool = Field(
        False,
        description="Shards norms and residuals over the TP group along tokens; needs tensor_parallel > 1.",
    )
    timeout_s: PositiveFloat = Field(
        1800.0, description="Seconds that a rank waits in a collective before the job is declared dead."
    )

    @property
    def model_parallel(self) -> int:
        """Ranks of one replica: TP × PP × CP."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def world_size(self) -> int:
        """Ranks of the trainer: TP × PP × CP × DP."""
        return self.model_parallel * self.data_parallel

    @model_validator(mode="after")
    def _check(self) -> Parallel:
        if self.tensor_parallel == 1 and self.sequence_parallel:
            self._refuse(["sequence_parallel"], "tensor_parallel is 1")
        if self.pipeline_parallel == 1:
            self._refuse(["virtual_pipeline_parallel"], "pipeline_parallel is 1")
        if self.virtual_pipeline_parallel == 1:
            self._refuse(["virtual_pipeline_parallel"], "one chunk a stage is the plain pipeline")
        return self


class FileData(Section):
    """Prompts from a JSONL or Parquet file."""

    source: Literal["file"]
    path: Path = Field(description="A .jsonl or .parquet file, one problem a row.")
    prompt_field: str = Field("question", description="Field that holds the problem.")
    answer_field: str = Field(
        "answer", description="Field that holds the gold answer; rows without one are reported and dropped."
    )
    template: Literal["plain", "chat"] = Field(
        "chat",
        description="`chat`: the tokenizer's own chat template; `plain`: `template_text` alone.",
    )
    template_text: str = Field(
        "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
        description="The user's turn; `{prompt}` stands for the problem, `{{` and `}}` for braces.",
    )
    system_prompt: str | None = Field(None, description="System turn of the chat template.")
    shuffle: bool = Field(True, description="A new order each epoch, by `run.seed`; else the file's order.")

    @model_validator(mode="after")
    def _check(self) -> FileData:
        if self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(
                f"path = '{self.path}' is neither .jsonl nor .parquet; convert it to one of them"
            )
        if self.template == "plain":
            self._refuse(["system_prompt"], 'template is "plain"')
        try:
            rendered = self.template_text.format(prompt="\0")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"template_text = {self.template_text!r} is not a format string ({error!r}); "
                "write {prompt} for the problem, and {{ }} for literal braces"
            ) from error
        if "\0" not in rendered:
            raise ValueError(f"template_text = {self.template_text!r} lacks {{prompt}}; add it")
        return self


class CountdownData(Section):
    """Generated: reach a target with given numbers, each used once, by + − × ÷ and brackets."""

    source: Literal["countdown"]
    numbers: Literal[3, 4] = Field(4, description="How many numbers a problem gives.")
    largest: int = Field(25, ge=2, le=99, description="Numbers are drawn from 1 to this.")
    operators: str = Field("+-*", description="Operators that a problem's hidden solution uses, of `+-*/`.")
    problems: PositiveInt = Field(100_000, description="Size of the training set.")

    @model_validator(mode="after")
    def _check(self) -> CountdownData:
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ValueError(f"operators = {self.operators!r} must be a choice of the characters '+-*/'")
        return self


class ArithmeticData(Section):
    """Generated: integer sums and products, answered in `\\boxed{}`."""

    source: Literal["arithmetic"]
    terms: int = Field(2, ge=2, le=6, description="Numbers a problem combines.")
    digits: int = Field(2, ge=1, le=6, description="Digits of the largest number.")
    operators: str = Field("+-*", description="Operators, of `+-*`.")
    problems: PositiveInt = Field(100_000, description="Size of the training set.")

    @model_validator(mode="after")
    def _check(self) -> ArithmeticData:
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"operators = {self.operators!r} must be a choice of the characters '+-*'")
        return self


Data = Annotated[FileData | CountdownData | ArithmeticData, Field(discriminator="source")]


class Rollout(Section):
    """What is sampled each step, and from which servers."""

    prompts_per_step: PositiveInt = Field(description="Prompts of one rollout batch, over all replicas.")
    responses_per_prompt: int = Field(8, ge=2, description="G: responses a prompt (one group).")
    max_prompt_tokens: PositiveInt = Field(1024, description="Longer prompts are reported and dropped.")
    max_response_tokens: PositiveInt = Field(description="Responses are cut (truncated) at this length.")
    temperature: PositiveFloat = Field(
        1.0,
        description="Sampling temperature; the trainer divides its logits by the same. Sampling always has "
        "full support (no top-p, no top-k): engine log-probs are not renormalised for them.",
    )
    urls: list[str] = Field(
        [],
        description="Addresses of running SGLang (or embedded) servers. Empty: the run starts "
        "`embedded_servers` of its own.",
    )
    embedded_servers: PositiveInt = Field(1, description="Embedded servers that the run starts.")
    embedded_device: Literal["cpu", "cuda"] = Field("cpu", description="Where embedded servers compute.")
    embedded_threads: PositiveInt = Field(1, description="CPU threads of one embedded server.")
    prompts_per_request: PositiveInt = Field(
        64,
        description="Prompts that share one HTTP request, and in the embedded server one decoding batch.",
    )
    startup_timeout_s: PositiveFloat = Field(600.0, description="Seconds for servers to become healthy.")
    request_timeout_s: PositiveFloat = Field(1800.0, description="Seconds for one request's answer.")

    @model_validator(mode="after")
    def _check(self) -> Rollout:
        if self.urls:
            self._refuse(
                ["embedded_servers", "embedded_device", "embedded_threads"], "urls name running servers"
            )
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"urls: {url!r} is not an address; write http://HOST:PORT")
        return self


class Reward(Section):
    """How responses are verified. A correct response earns 1, any other 0."""

    verifier: Literal["math", "countdown", "integer"] | None = Field(
        None,
        description="`math`: math-verify; `countdown`, `integer`: exact checkers of the generated tasks. "
        "Default: the one that belongs to `data.source`.",
    )
    workers: PositiveInt = Field(2, description="Verifier processes of each data-parallel head.")
    time_limit_s: PositiveFloat = Field(
        5.0, description="Hard limit for one verification; past it the process is killed: outcome `timeout`."
    )


class Algorithm(Section):
    """The RAPO objective: clipped policy gradient − α · divergence + β · entropy."""

    clip_low: NonNegativeFloat = Field(0.2, lt=1, description="The ratio is clipped below at 1 − this.")
    clip_high: NonNegativeFloat = Field(0.2, description="The ratio is clipped above at 1 + this.")
    divergence: Literal["forward_exact", "k3", "none"] = Field(
        "forward_exact",
        description="`forward_exact`: KL(flattened reference ‖ policy), exact over the vocabulary (RAPO); "
        "`k3`: the usual sampled estimate against the reference; `none`: no reference at all.",
    )
    divergence_coefficient: NonNegativeFloat = Field(5e-3, description="α.")
    flatten_floor: Fraction = Field(
        0.5,
        description="φ0 in φ(r) = φ0 + (1 − φ0) · clip(r, 0, 1), the power that flattens the reference for a "
        "response with reward r. 1 never flattens.",
    )
    entropy_coefficient: NonNegativeFloat = Field(1e-3, description="β.")
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        "token_mean",
        description="`token_mean`: over all response tokens of the minibatch; `sequence_mean`: over each "
        "response's tokens, then over responses; `constant`: sum over tokens divided by "
        "responses × max_response_tokens (Dr. GRPO).",
    )
    minibatch_prompts: PositiveInt | None = Field(
        None,
        description="Prompts of one optimizer update; must divide rollout.prompts_per_step. "
        "Default: all of them, one update a step.",
    )
    max_tokens_per_microbatch: PositiveInt = Field(
        16384, description="Token budget (padded) of one packed microbatch, over all its CP ranks."
    )

    @model_validator(mode="after")
    def _check(self) -> Algorithm:
        if self.divergence == "none":
            self._refuse(["divergence_coefficient", "flatten_floor"], 'divergence is "none"')
        elif self.divergence_coefficient == 0:
            raise ValueError(
                f'divergence_coefficient = 0 makes "{self.divergence}" cost time without effect; '
                'set divergence = "none"'
            )
        if self.divergence == "k3":
            self._refuse(["flatten_floor"], 'divergence = "k3" is against the unflattened reference')
        return self


class Optimizer(Section):
    """AdamW with Megatron's gradient clipping and learning-rate schedule."""

    learning_rate: PositiveFloat = Field(1e-6, description="The rate after warm-up.")
    min_learning_rate: NonNegativeFloat = Field(0.0, description="Where the decay ends.")
    warmup_updates: int = Field(0, ge=0, description="Optimizer updates of linear warm-up from zero.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Shape of the decay over the run's optimizer updates."
    )
    weight_decay: NonNegativeFloat = Field(0.01, description="Decoupled weight decay.")
    beta1: Fraction = Field(0.9, lt=1, description="Decay of the first moment.")
    beta2: Fraction = Field(0.95, lt=1, description="Decay of the second moment.")
    epsilon: PositiveFloat = Field(1e-8, description="Adam's ε.")
    clip_gradient: PositiveFloat = Field(1.0, description="Largest global gradient norm (L2).")
    distributed: bool = Field(
        True, description="Shard optimizer state over DP × CP (Megatron's DistributedOptimizer)."
    )
    overlap_communication: bool = Field(
        False, description="Overlap gradient and parameter communication with compute; needs distributed."
    )

    @model_validator(mode="after")
    def _check(self) -> Optimizer:
        if self.decay == "constant":
            self._refuse(["min_learning_rate"], 'decay is "constant"')
        elif self.min_learning_rate >= self.learning_rate:
            raise ValueError(
                f"min_learning_rate = {self.min_learning_rate} must be below {self.learning_rate}, the rate"
            )
        if self.overlap_communication and not self.distributed:
            raise ValueError("overlap_communication = true needs distributed = true; set both or neither")
        return self


class Checkpoint(Section):
    """When the run's state is saved, and whether it goes on from an earlier one."""

    every: PositiveInt | None = Field(
        None, description="Steps between checkpoints. Default: only after the last step."
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints to keep; older ones are removed.")
    resume: bool = Field(
        True,
        description="Go on from the newest checkpoint in run.directory, if there is one. "
        "false: a directory with checkpoints is an error.",
    )


class Evaluate(Section):
    """pass@k on held-out problems, before the first step and after the last."""

    problems: PositiveInt = Field(64, description="Held-out problems.")
    samples: PositiveInt = Field(16, description="N: responses a problem.")
    k: list[PositiveInt] = Field([1, 4, 16], description="The k of pass@k, each at most `samples`.")
    every: PositiveInt | None = Field(
        None, description="Also after every so many steps. Default: only before the first and after the last."
    )
    data: Data | None = Field(
        None,
        description="Where the problems come from. Default: the test split of a generated task; "
        "training from a file needs one here.",
    )

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if not self.k or max(self.k) > self.samples:
            raise ValueError(f"k = {self.k} needs values from 1 to samples = {self.samples}")
        return self


class Observe(Section):
    """Where metrics go besides metrics.jsonl and TensorBoard, which are always written."""

    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases.")
    wandb_project: str | None = Field(None, description="Project in Weights & Biases.")

    @model_validator(mode="after")
    def _check(self) -> Observe:
        if self.wandb == "off":
            self._refuse(["wandb_project"], 'wandb is "off"')
        elif self.wandb_project is None:
            raise ValueError(f'wandb = "{self.wandb}" needs wandb_project; set it')
        return self


class RunConfig(Section):
    """The whole configuration of one run."""

    run: Run
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate | None = None
    observe: Observe = Observe()

    @property
    def minibatch_prompts(self) -> int:
        """Prompts of one optimizer update."""
        return self.algorithm.minibatch_prompts or self.rollout.prompts_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one rollout batch."""
        return self.rollout.prompts_per_step // self.minibatch_prompts

    @property
    def verifier(self) -> str:
        """The verifier's name: `reward.verifier`, or the one that belongs to the data."""
        belonging = {"file": "math", "countdown": "countdown", "arithmetic": "integer"}
        return self.reward.verifier or belonging[self.data.source]

    @property
    def sequence_multiple(self) -> int:
        """What each sequence's tokens are padded to a multiple of: CP's zig-zag halves, SP's shards."""
        halves = 2 * self.parallel.context_parallel if self.parallel.context_parallel > 1 else 1
        shards = self.parallel.model_parallel // self.parallel.pipeline_parallel
        return math.lcm(halves, shards if self.parallel.sequence_parallel else 1)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        checks: list[Callable[[], None]] = [self._check_batch, self._check_rewards, self._check_evaluation]
        for check in checks:
            check()
        return self

    def _check_batch(self) -> None:
        prompts, replicas = self.rollout.prompts_per_step, self.parallel.data_parallel
        if prompts % self.minibatch_prompts:
            raise ValueError(
                f"algorithm.minibatch_prompts = {self.minibatch_prompts} does not divide "
                f"rollout.prompts_per_step = {prompts}"
            )
        if prompts < replicas:
            raise ValueError(
                f"rollout.prompts_per_step = {prompts} leaves some of parallel.data_parallel = {replicas} "
                "replicas without a prompt; raise it, or lower data_parallel"
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        padded = -(-longest // self.sequence_multiple) * self.sequence_multiple
        if padded > self.algorithm.max_tokens_per_microbatch:
            raise ValueError(
                f"algorithm.max_tokens_per_microbatch = {self.algorithm.max_tokens_per_microbatch} cannot "
                f"hold rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens "
                f"({padded} padded); raise it to {padded}"
            )

    def _check_rewards(self) -> None:
        if self.data.source == "countdown" and self.verifier != "countdown":
            raise ValueError(
                f'reward.verifier = "{self.verifier}" cannot check data.source = "countdown"; remove it'
            )
        if self.data.source != "countdown" and self.verifier == "countdown":
            raise ValueError(
                f'reward.verifier = "countdown" cannot check data.source = "{self.data.source}"; remove it'
            )

    def _check_evaluation(self) -> None:
        if self.evaluate is None:
            return
        if self.evaluate.data is None and self.data.source == "file":
            raise ValueError(
                "evaluate.data is missing: training prompts from a file leave none held out; add it"
            )
        if self.evaluate.data is not None and (
            (self.evaluate.data.source == "countdown") != (self.data.source == "countdown")
        ):
            raise ValueError(
                f'evaluate.data.source = "{self.evaluate.data.source}" needs another verifier than '
                f'data.source = "{self.data.source}"; evaluate on the same kind of task'
            )

    def resolved(self) -> dict[str, Any]:
        """All options with their values, as written beside a run's output."""
        return self.model_dump(mode="json", exclude_none=True)
