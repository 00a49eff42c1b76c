"""What a method is: hooks, each with a default, that all ranks call alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods import options as common
from megatron_rapo.methods.advantages import varies
from megatron_rapo.methods.aggregation import Aggregation, token_weights
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.demonstrations import Demonstrations
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import (
    OF_ITS_DISTRIBUTION,
    OF_THE_REFERENCE,
    OF_THE_TEACHER,
    Need,
    Term,
)

if TYPE_CHECKING:
    from torch import Tensor

OfEpisodes = Sequence[Sequence[Any]] | npt.NDArray[Any]
"""`[groups][episodes]`: a value of each episode; an array's rows may be as long as the largest group."""


class Method:
    """What is learnt from a step's groups. Every hook has a default; all ranks call each alike.

    A run makes one object of it. In the order of a step:

    - `sampling` says how the step's responses are sampled;
    - `ask` says what of each problem is sampled, once and after what came of it;
    - `teaches` says which groups dynamic sampling replaces;
    - `choose`, `advantages`, `flatten`, `mark_responses` and `off_policy` look at all groups of the step;
    - `aggregate` makes the weights of tokens, of each minibatch's responses that are in the loss;
    - `weigh` may change them, token by token, once old log-probs and entropies are known;
    - `mark_tokens` makes numbers of each token of a minibatch for its terms, before each update;
    - `terms` is the loss: Σ coefficient · term, token by token;
    - `learn` hears what the step's updates measured;
    - `metrics` tells numbers of the step;
    - `state` and `restore` carry over checkpoints what the object learnt of the run.

    Attributes:
        Options: the section of its options.
        options: this run's.
        configured: how the configuration has responses sampled.
        reward_range: the smallest and largest reward that it takes; another one ends the run.
        aggregation: how `aggregate` weighs tokens.
        reads_responses: whether hooks read tokens or texts of responses. Where not, groups have all else of
            them: rewards, facts, outcomes, lengths, and each problem with all its columns. Tokens and texts
            of a step are many, and all ranks hold those of all responses if it is set.
        follows_policy: whether `mark_tokens` reads log-probs and entropies of the policy as each update
            finds it: the policy is then run once more for each update of a step but its first.
        mixture: β, the teacher's or reference's share in the mixture of the Jensen–Shannon divergence; above
            0, below 1.
        tempered: a temperature, in multiples of the rollouts', at which `weigh` and `mark_tokens` read old
            log-probs too; None where they don't.
        example: options without which it cannot be made, for lists and tests of all methods.
    """

    Options = common.Options
    reward_range: tuple[float, float] = (-np.inf, np.inf)
    aggregation: Aggregation = "token_mean"
    reads_responses: bool = False
    follows_policy: bool = False
    mixture: float = 0.5
    tempered: float | None = None
    example: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, options: common.Options, configured: Sampling) -> None:
        """
        Raises:
            ValueError: they do not fit together; the message begins with the option.
        """
        self.options = options
        self.configured = configured

    def sampling(self) -> Sampling:
        """How the next step's responses are sampled, and with which temperature trained. Here: as configured.

        At most `max_response_tokens` of the configuration, and two responses a prompt or more.
        """
        return self.configured

    @property
    def demonstrations(self) -> Demonstrations | None:
        """Which given texts it learns from. Then engines sample nothing for it, and nothing is rewarded.

        Each text is a response of its own: `advantages` and the hooks beside it see groups of one, whose
        reward says nothing. Here: None, it learns from samples.
        """
        return None

    @property
    def columns(self) -> Sequence[str]:
        """Columns of problems that it reads. Data of which no row has one are refused before a run starts."""
        return ()

    @property
    def facts(self) -> Sequence[str]:
        """Facts of episodes that it reads, by name: those that the reward or the environment tells."""
        return ()

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """Which episodes are wanted of each problem, beside those that it has.

        It is asked at first with groups without episodes, then with what has come of it, until it wants
        nothing more. With dynamic sampling it is asked so for the prompts of each round. A text that is too
        long gives an episode of unknown reward. What it wants must hang on the groups and its state alone:
        then a run that goes on asks the same. Here: `responses_per_prompt` answers to the problem's prompt.

        Returns:
            `[groups]`, a guide for each further episode; `PLAIN` is the problem's prompt alone.
        """
        wanted = [PLAIN] * self.sampling().responses_per_prompt
        return [[] if group.episodes else wanted for group in groups]

    def teaches(self, group: Group) -> bool:
        """Whether a group teaches; dynamic sampling replaces it if not. Here: its known rewards differ."""
        return bool(varies(known_rewards([group]))[0])

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """Which responses are in the loss, bools; the others are measured only.

        Those of unknown reward, or with tokens that do not exist, never are. Here: all others but for what
        the options `mask_truncated` and `groups_without_variance` leave out.
        """
        rewards, keep = known_rewards(groups), self.options.groups_without_variance
        kept = varies(rewards)
        if keep == "keep":
            kept = np.ones_like(kept)
        elif keep == "keep_failed":
            kept = kept | np.ma.filled(rewards.max(axis=1) <= 0.0, False)
        masks = self.options.mask_truncated
        return [
            [bool(group_kept) and not (masks and one.episode.truncated) for one in group.episodes]
            for group, group_kept in zip(groups, kept, strict=True)
        ]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """How much better each response was than expected: a number, or `[tokens]` of them.

        What is returned for a response of unknown reward plays no part.
        """
        raise NotImplementedError(f"{type(self).__name__} has no advantages")

    def flatten(self, groups: Sequence[Group]) -> OfEpisodes:
        """φ ≥ 0 of each response, the power that flattens the reference there. Here: 1, not at all."""
        return [[1.0] * len(group.episodes) for group in groups]

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        """Numbers of each response by name, or `[tokens]` of them, for terms and for the hooks below.

        The names may not change from step to step. Here: none.
        """
        return {}

    def off_policy(self, groups: Sequence[Group]) -> OfEpisodes:
        """Which responses the policy did not sample after these very tokens at its temperature, bools.

        Their engine's log-probs are not compared with the trainer's: they take no part in the mismatch of the
        two, and their importance weights are 1. Here: those that were asked for so (`Guide.is_off_policy`).
        """
        return [[one.guide.is_off_policy for one in group.episodes] for group in groups]

    def aggregate(self, response_tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        """The weight of each token of each of a minibatch's responses that are in the loss, `[responses]`."""
        return token_weights(response_tokens, self.aggregation, self.configured.max_response_tokens)

    def weigh(self, tokens: Annotated) -> Tensor:
        """The weights of a minibatch's tokens in the loss, once their old log-probs and entropies are known.

        It is called on the ranks that have tokens, each with its own, so it may not change the state. What it
        decides by all tokens (a quantile, a sum), it must gather (`tokens.of_all_ranks`). That the policy is
        run once more before the update is its cost where a step has one update. Here: as they are.

        Returns:
            `[tokens]`, from 0 up; `tokens.weights` add up to 1 over a minibatch under `token_mean`.
        """
        return tokens.weights

    @property
    def weighs(self) -> bool:
        """Whether it has a `weigh` of its own."""
        return type(self).weigh is not Method.weigh

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """Numbers of each token of a minibatch by name, `[tokens]`, that its terms read: marks.

        It is called before each update, on the ranks that have tokens, under the rules of `weigh`. Here:
        none.
        """
        return {}

    @property
    def marks_tokens(self) -> bool:
        """Whether it has a `mark_tokens` of its own."""
        return type(self).mark_tokens is not Method.mark_tokens

    @property
    def asks(self) -> bool:
        """Whether it has an `ask` of its own."""
        return type(self).ask is not Method.ask

    def terms(self) -> Sequence[tuple[float, Term]]:
        """The loss's coefficients and terms.

        Coefficients may change from step to step; what terms there are, what they need and what they report
        may not.
        """
        raise NotImplementedError(f"{type(self).__name__} has no terms")

    def learn(self, measured: Mapping[str, float]) -> None:
        """Hears the metrics of the step's updates, `loss/entropy` for example; the same on all ranks.

        What a controller needs to know, and may keep in its state. Here: nothing is done.
        """

    def metrics(self) -> Mapping[str, float]:
        """Numbers of the step by name, which are logged as `method/<name>`.

        It is asked for after each step's updates; what it tells of groups it keeps when it sees them
        (`advantages`). Here: nothing.
        """
        return {}

    def state(self) -> Any:
        """What it learnt of the run, as JSON: numbers, texts, lists, and dictionaries with text keys.

        It is asked for after each step, and saved with checkpoints. Here: nothing.
        """
        return None

    def restore(self, state: Any) -> None:
        """Takes up the state that was saved, before the first step of a run that goes on."""

    @property
    def needs(self) -> frozenset[Need]:
        """What its terms read."""
        return frozenset(need for _, term in self.terms() for need in term.needs)

    @property
    def wants_reference(self) -> bool:
        """Whether there is a reference model at all."""
        return bool(self.needs & OF_THE_REFERENCE)

    @property
    def wants_reference_hidden(self) -> bool:
        """Whether the loss needs the reference's whole distribution, so its hidden states."""
        return bool(self.needs & OF_ITS_DISTRIBUTION)

    @property
    def wants_teacher(self) -> bool:
        """Whether there is a teacher, whose whole distribution the loss then needs."""
        return bool(self.needs & OF_THE_TEACHER)
