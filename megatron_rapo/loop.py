"""The training loop: prompts → rollouts → rewards → microbatches → reference → update → weights."""

from __future__ import annotations

from megatron_rapo.config import RunConfig
from megatron_rapo.experience.delivery import with_tokens
from megatron_rapo.launch.stop import requests
from megatron_rapo.opening import open_job
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.weighing import weigh


def train(config: RunConfig) -> None:
    """Trains a run from where it stands to its last step. Every rank of the layout calls it.

    Raises:
        SystemExit: a signal asked to stop (docs/resume.md).
        RapoError: something the user can mend; an error on one rank is to end them all (`launch.run_local`,
            torchrun and srun do that).
    """
    with open_job(config) as job:
        phase = job.observer.phase
        state = job.begin()
        with requests.deferring(config.checkpoint.stop_grace_s):
            while state.step < config.run.steps and not job.stop_signal:
                step = state.step + 1
                job.observer.begin_step(step)
                batch = job.collect(step)
                with job.engines.offloaded(), job.policy.onloaded():
                    with phase("annotate"):
                        samples = make_samples(
                            batch.groups, job.method, job.vocabulary, config.minibatch_prompts
                        )
                        job.record(step, batch, samples)
                        plans = plan_minibatches(samples, config)
                        samples = with_tokens(samples, plans, batch, job.placement, job.choices)
                        minibatches = build_minibatches(samples, plans, config, job.placement, job.choices)
                        job.policy.annotate(minibatches, job.objective)
                        for frozen in job.frozen:
                            frozen.annotate(minibatches, job.objective)
                        weigh(minibatches, job.method, job.placement)
                    with phase("update"):
                        updated = job.update(minibatches, batch)
                        job.method.learn(updated)
                job.batches.settle(step)
                with phase("publish"):
                    published = job.publish(step)
                state = job.state_after(step)
                job.batches.run_ahead(step)
                state = job.finish_step(state, {**job.measured(step, batch), **updated, **published})
        job.end(state)
