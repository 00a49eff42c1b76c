"""For tests of a user's own file: problems, groups, engines that say what the test wants, and checks.

```python
check_reward(score, [("3*4+5", {"numbers": [3, 4, 5], "target": 17}, 1.0)])

episode = run_environment(TryAgain(), a_problem("3 4 5=17:", target=17), turns=["3+4", "3*4+5"])
assert episode.score.value == 0.5

check_method(RunningBaseline, {"penalty": 0.5})
```
A token here is a character, so that tests need no model: `chr(token_id)` is its text. What a check finds
is an AssertionError, with a line for each deviation.
"""

from megatron_rapo.testing.environment import LOG_PROB, VERSION, ScriptedGenerate, run_environment
from megatron_rapo.testing.made_up import a_group, a_problem
from megatron_rapo.testing.method import a_method, check_method
from megatron_rapo.testing.reward import check_reward

__all__ = [
    "LOG_PROB",
    "VERSION",
    "ScriptedGenerate",
    "a_group",
    "a_method",
    "a_problem",
    "check_method",
    "check_reward",
    "run_environment",
]
