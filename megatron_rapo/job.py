"""Everything that a run consists of, and what is done with several parts of it at once, on every rank."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rapo.ahead.batches import Batches
from megatron_rapo.ahead.keeping import keep, take_up
from megatron_rapo.ahead.partial import PartialBatches
from megatron_rapo.ahead.unfinished import keep_unfinished, take_up_unfinished
from megatron_rapo.checkpoint.files import how_to_go_on, step_of
from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import RunConfig
from megatron_rapo.data.batching import Microbatch, Sample
from megatron_rapo.data.order import MixedOrder, PromptOrder
from megatron_rapo.data.trees import segment_sizes
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.evaluation.evaluator import Evaluator
from megatron_rapo.evaluation.given_loss import GivenLoss
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.experience.given import summarise_given
from megatron_rapo.experience.summary import count_tokens, staleness, summarise
from megatron_rapo.guards.guards import Guards
from megatron_rapo.launch.stop import requests
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.state import restore_state, saved_state
from megatron_rapo.methods.told import told_by
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.observe.observer import Observer
from megatron_rapo.observe.phase_memory import PHASES, PhaseMemory
from megatron_rapo.observe.versions import software_versions
from megatron_rapo.parallel.device import peak_memory
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.frozen import FrozenModel
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish.publisher import Publisher
from megatron_rapo.record.answers import drop_until
from megatron_rapo.record.identity import Identity
from megatron_rapo.record.standing import finish
from megatron_rapo.record.start import begin
from megatron_rapo.samples.recorder import SampleRecorder
from megatron_rapo.samples.replay import Unpublished
from megatron_rapo.samples.store import drop_after
from megatron_rapo.scaling.devices import own_peak_tflops
from megatron_rapo.scaling.flops import recomputed_flops, training_flops, update_computing
from megatron_rapo.weights.export import write_hf_model
from megatron_rapo.weights.peft_directory import write_peft_adapter


@dataclass
class Job:
    """The parts of a run, and what is done with several of them at once."""

    config: RunConfig
    observer: Observer
    memory: PhaseMemory
    placement: Placement
    identity: Identity
    architecture: Architecture
    vocabulary: int
    choices: ChoiceShape | None
    prompts: PromptOrder | MixedOrder
    engines: SharedEngines
    batches: Batches | PartialBatches
    guards: Guards
    recorder: SampleRecorder
    evaluator: Evaluator | None
    given_loss: GivenLoss | None
    policy: Policy
    frozen: Sequence[FrozenModel]
    method: Method
    objective: Objective
    publisher: Publisher | Unpublished
    checkpoints: CheckpointStore
    stop_signal: int = 0  # that asked to stop; a step's end agrees on it, on all ranks

    @property
    def distribution(self) -> FrozenModel | None:
        """The frozen model whose whole distribution the loss may need: the teacher, else the reference."""
        return self.frozen[-1] if self.frozen else None

    def begin(self) -> TrainState:
        """Takes up the newest checkpoint, or starts; the engines then serve these weights."""
        self.checkpoints.remove_partial(self.placement)
        checkpoint = self.checkpoints.newest_whole(self.placement)
        state = TrainState() if checkpoint is None else self._load(checkpoint)
        resume_step = None if checkpoint is None else state.step
        if self.placement.is_main:
            versions = {**software_versions(), "engines": self.engines.software()}
            for line in begin(self.config, self.identity, versions, resume_step):
                print(line, flush=True)
        self.guards.go_on(state.guards, state.step)
        self.observer.open_logs(resume_step)
        self.observer.begin_step(state.step)
        with self.observer.phase("publish"):
            self.publish(state.step, resumed=checkpoint is not None)
        if checkpoint is not None:
            self.batches.run_ahead(state.step)
        if state.step == 0:
            self.observer.finish_step(self._evaluate_if_due(step=0))
        return state

    def _take_up_batches(self, checkpoint: Path, step: int) -> None:
        """Those that were sampled ahead of their steps, to their end or not."""
        rollout = self.config.rollout
        size, tokens = rollout.prompts_per_step, rollout.partial_tokens
        unfinished = take_up_unfinished(checkpoint, prompts_per_step=size, partial_tokens=tokens)
        whole = self.method.reads_responses
        ready = take_up(checkpoint, self.prompts, self.placement, prompts_per_step=size, whole=whole)
        self.batches.go_on(step, ready, unfinished)

    def _keep_batches(self, checkpoint: Path) -> None:
        keep(self.batches.ready, checkpoint, self.placement)
        keep_unfinished(self.batches.unfinished, checkpoint, self.placement)

    def _load(self, checkpoint: Path) -> TrainState:
        """Takes up a checkpoint."""
        with self.policy.onloaded(), self.observer.phase("resume"):
            state = self.checkpoints.load(checkpoint, self.policy)
            self._take_up_batches(checkpoint, state.step)
        self.prompts.position = state.prompts_drawn
        if state.method_state is not None and state.method == self.config.algorithm.method:
            restore_state(self.method, state.method_state)
        return state

    def _roll_back(self) -> TrainState:
        """Goes back to the newest checkpoint, and on with prompts that were not drawn yet.

        Raises:
            RapoError: there is none, or the run has been rolled back often enough.
        """
        self._finish_checkpoint(wait=True)
        checkpoint = self.checkpoints.newest_whole(self.placement)
        self.guards.check_rollback(possible=checkpoint is not None)
        assert checkpoint is not None
        drawn, rollbacks = self.prompts.position, self.guards.rollbacks + 1
        state = self._load(checkpoint)
        state = replace(state, prompts_drawn=drawn, guards={**state.guards, "rollbacks": rollbacks})
        self.prompts.position = drawn
        if self.placement.is_main:
            drop_after(self.config.run.directory, state.step)
        self.guards.go_on(state.guards, state.step)
        self.observer.open_logs(state.step)
        self.observer.begin_step(state.step)
        with self.observer.phase("publish"):
            self.publish(state.step, resumed=True)
        self.batches.run_ahead(state.step)
        return state

    def state_after(self, step: int) -> TrainState:
        """What goes on with the next step.

        Raises:
            RapoError: the method's state cannot be saved.
        """
        method = self.config.algorithm.method
        return TrainState(step, self.prompts.position, method, saved_state(self.method))

    def collect(self, step: int) -> Batch:
        """What the step trains on; on all ranks."""
        self.guards.begin_step(step)
        batch = self.batches.take(step)
        self.objective.temperature = batch.temperature
        self._finish_checkpoint(wait=False)
        return batch

    def update(self, minibatches: Sequence[Sequence[Microbatch]], batch: Batch) -> Mapping[str, float]:
        """The step's updates, as far as guards let them be applied; their metrics."""
        known = self._summarised(batch) if self.guards.keep_updates else {}

        def allow(metrics: Mapping[str, float], damage: str | None) -> bool:
            return self.guards.allow({**known, **metrics}, damage)

        return self.policy.update(minibatches, self.objective, self.distribution, allow)

    def publish(self, step: int, *, resumed: bool = False) -> Mapping[str, float]:
        """Has the engines serve the weights after a step, if they are to sample with them.

        Returns:
            Metrics (`Publisher.publish`).
        """
        is_evaluated = self.evaluator is not None and self.evaluator.due(step)
        if self.method.demonstrations is None or is_evaluated:
            return self.publisher.publish(step, resumed=resumed)
        self.policy.synchronise_parameters()
        return {}

    def record(self, step: int, batch: Batch, samples: Sequence[Sequence[Sample]]) -> None:
        """Keeps what the step sampled (docs/samples.md)."""
        if self.method.demonstrations is not None:
            return
        self.recorder.record(step, batch, samples)

    def finish_step(self, state: TrainState, metrics: Mapping[str, float]) -> TrainState:
        """Evaluates, saves and logs, each when due; what the run goes on from.

        Raises:
            RapoError: a guard ends the run.
        """
        metrics = {
            **metrics,
            **told_by(self.method),
            **self._evaluate_if_due(state.step),
            **self.engines.metrics(),
        }
        metrics |= self.guards.finish_step(metrics)
        state = replace(state, guards=self.guards.state())
        self.stop_signal = int(self.placement.largest(requests.number))
        if self.stop_signal:
            requests.heed()
        if self.guards.rolls_back:
            self.observer.finish_step({**metrics, **self._memory()})
            return self._roll_back()
        self._finish_checkpoint(wait=False)
        best = self.checkpoints.best is not None and self.checkpoints.best.take(state.step, metrics)
        due = self.placement.share_from_main(self.checkpoints.due(state.step))  # clocks differ
        if due or best or self.stop_signal:
            with self.observer.phase("checkpoint"):
                self.recorder.finish()  # what the checkpoint goes on after is not sampled again
                self._finish_checkpoint(wait=True)
                self.checkpoints.save(self.policy, state, self._keep_batches)
                self._finish_checkpoint(wait=state.step == self.config.run.steps or self.stop_signal > 0)
        self.observer.finish_step({**metrics, **self._memory()})
        self.guards.check_end()
        return state

    def _memory(self) -> Mapping[str, float]:
        """The most that any rank has held: since the start, and in each phase of the step."""
        most, *phases = self.placement.largest_of_each(
            [self.memory.most or peak_memory(), *self.memory.take()]
        )
        named = zip(PHASES, phases, strict=True)
        told = {f"memory/{phase}_gib": peak / 2**30 for phase, peak in named if peak}
        return {**told, "memory/peak_gib": most / 2**30}

    def _finish_checkpoint(self, *, wait: bool) -> None:
        """Completes the checkpoint that is being written; answers before it are needed no more."""
        self.checkpoints.finish(self.placement, wait=wait)
        if self.placement.is_main and (newest := self.checkpoints.newest()) is not None:
            drop_until(self.config.run.directory, step_of(newest))

    def end(self, state: TrainState) -> None:
        """Leaves the trained policy as a HF model in `<run>/model`, and adapters by themselves in
        `<run>/adapter`, as PEFT has them.

        Raises:
            SystemExit: the run was asked to stop; it is saved.
        """
        if self.stop_signal:
            self._tell_stop(state)
            raise SystemExit(128 + self.stop_signal)
        directory, model, own = self.config.run.directory, self.config.model, self.policy.chunks
        with self.observer.phase("export"):
            self.policy.synchronise_parameters()
            write_hf_model(
                own, self.architecture, self.placement, directory / "model", companions_of=model.path
            )
            if self.policy.adapter is not None:
                base = model.checkpoint or model.path
                write_peft_adapter(
                    *(own, self.architecture, self.placement, self.policy.adapter, directory / "adapter"),
                    base=base.absolute(),
                )
        if self.placement.is_main:
            finish(self.config.run.directory, state.step)

    def _tell_stop(self, state: TrainState) -> None:
        """Once all is written, on all ranks: a launcher may end the others as soon as one has ended."""
        if self.placement.is_main:
            steps, directory = self.config.run.steps, self.config.run.directory
            name = signal.Signals(self.stop_signal).name
            print(
                f"stopped by {name} after step {state.step} of {steps}: {how_to_go_on(directory)}", flush=True
            )
        self.placement.share_from_main(None)

    def measured(self, step: int, batch: Batch) -> Mapping[str, float]:
        """Metrics of what the step learnt from, and of how fast that was."""
        times, (response_tokens, _) = self.observer.times(), count_tokens(batch.drawn)
        rate = {}
        if self.method.demonstrations is None:
            seconds = self.placement.largest(batch.sampled.times.sampling_s) or times.get("time/rollout_s")
            rate = {"throughput/rollout_tokens_per_s": response_tokens / seconds} if seconds else {}
        what = {**self._summarised(batch), **self._staleness(step, batch)}
        return {**what, **rate, **self._throughput(batch, times)}

    def _staleness(self, step: int, batch: Batch) -> Mapping[str, float]:
        if self.method.demonstrations is not None:
            return {}
        return staleness(batch, step - 1, self.config.rollout.partial_tokens)

    def _summarised(self, batch: Batch) -> Mapping[str, float]:
        if self.method.demonstrations is None:
            return summarise(batch, self.vocabulary, self.config.source_names)
        return summarise_given(batch, self.prompts)

    def _throughput(self, batch: Batch, times: Mapping[str, float]) -> Mapping[str, float]:
        """Tokens a second of the step so far, whole and by phase of the trainer, prompts included."""
        _, all_tokens = count_tokens(batch.groups)
        return {
            **self._compute(batch, times["time/update_s"]),
            "throughput/tokens_per_s": all_tokens / times["time/step_s"],
            "throughput/annotate_tokens_per_s": all_tokens / times["time/annotate_s"],
            "throughput/update_tokens_per_s": all_tokens / times["time/update_s"],
        }

    def _compute(self, batch: Batch, seconds: float) -> Mapping[str, float]:
        """What the step's updates took of computing, and how near a rank came to its device's peak."""
        episodes = [one.episode for group in batch.groups for one in group.episodes]
        lengths = attended = [len(sequence) for episode in episodes for sequence in episode.sequences]
        segments = segment_sizes(batch.groups)
        if self.config.algorithm.share_prompts:
            lengths, attended = segments
        peak = self.config.observe.peak_tflops or own_peak_tflops(self.config.model.dtype)
        of_sequences = self.architecture, lengths, attended, self.config.adapter
        recompute = self.config.model.recompute == "full"
        told: dict[str, float] = update_computing(
            training_flops(*of_sequences),
            recomputed_flops(*of_sequences) if recompute else 0,
            seconds * self.placement.layout.world_size,
            peak,
        )
        if self.config.parallel.context_parallel == 1:  # else they cannot be shared
            told["compute/repeated_tokens"] = 1.0 - sum(segments[0]) / sum(lengths)
        return told

    def _evaluate_if_due(self, step: int) -> Mapping[str, float]:
        found: dict[str, float] = {}
        if self.evaluator is not None and self.evaluator.due(step):
            with self.observer.phase("evaluate"):
                found |= self.evaluator.run(step)
        if self.given_loss is not None and self.given_loss.due(step):
            with self.observer.phase("evaluate"):
                found |= self.given_loss.measure()
        return {f"evaluate/{name}": value for name, value in found.items()}
