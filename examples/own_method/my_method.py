# my_method.py
import math

from pydantic import Field

from megatron_rapo import AtToken, Method, Term
from megatron_rapo.episode.group import known_rewards
from megatron_rapo.methods.terms.policy_gradient import PolicyGradient


class Overconfidence(Term):
    """max(0, log π − log bound)² at each token."""

    def __init__(self, bound: float) -> None:
        self.bound = math.log(bound)

    def __call__(self, token: AtToken):
        over = (token.log_prob - self.bound).clamp(min=0.0)
        return over.square(), {"overconfident": over > 0}


class RunningBaseline(Method):
    """A = r − b, b a running mean of the rewards of earlier steps."""

    class Options(Method.Options):
        memory: float = Field(0.9, ge=0, lt=1, description="How much of b each step keeps.")
        penalty: float = Field(0.1, ge=0, description="Of tokens above `bound`.")
        bound: float = Field(0.9, gt=0, lt=1, description="A probability.")

    def __init__(self, options, configured) -> None:
        super().__init__(options, configured)
        self.baseline = 0.0

    def advantages(self, groups):
        rewards, before = known_rewards(groups), self.baseline
        if rewards.count():  # all may be unknown
            memory = self.options.memory
            self.baseline = memory * before + (1 - memory) * float(rewards.mean())
        return rewards - before

    def terms(self):
        o = self.options
        return [(1.0, PolicyGradient(0.2, 0.2)), (o.penalty, Overconfidence(o.bound))]

    def metrics(self):
        return {"baseline": self.baseline}

    def state(self):
        return {"baseline": self.baseline}

    def restore(self, state) -> None:
        self.baseline = state["baseline"]
