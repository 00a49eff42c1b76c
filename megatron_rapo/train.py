"""The training loop: prompts → rollouts → rewards → microbatches → reference → update → weights."""

from __future__ import annotations

from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.config import RunConfig
from megatron_rapo.experience.summary import summarise
from megatron_rapo.job import open_job
from megatron_rapo.policy.batch import build_minibatches


def train(config: RunConfig) -> None:
    """Trains a run from where it stands to its last step. Every rank of the layout calls it.

    Raises:
        RapoError: something the user can mend; an error on one rank is to end them all (`launch.run_local`,
            torchrun and srun do that).
    """
    with open_job(config) as job:
        phase, collector = job.observer.phase, job.collector
        state = job.begin()
        while state.step < config.run.steps:
            step = state.step + 1
            job.observer.begin_step(step)
            prompts = job.prompts.draw(config.rollout.prompts_per_step)
            with phase("rollout"):
                groups = collector.sample(
                    prompts,
                    responses=config.rollout.responses_per_prompt,
                    weight_version=state.step,
                    seed=job.sampling_seed(step),
                )
            with phase("reward"):
                scored = collector.share(collector.score(groups))
            with phase("annotate"):
                minibatches = build_minibatches(scored, config, job.placement, job.vocabulary)
                job.policy.annotate(minibatches, job.objective)
                if job.reference is not None:
                    job.reference.annotate(minibatches, job.objective)
            with phase("update"):
                metrics = job.policy.update(minibatches, job.objective, job.reference)
            with phase("publish"):
                job.publish(version=step)
            state = TrainState(step, job.prompts.position)
            job.finish_step(state, {**summarise(scored, job.vocabulary), **job.throughput(scored), **metrics})
        job.end()
