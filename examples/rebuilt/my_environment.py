"""Work in rounds, of which each sees the question and what the round before wrote down, and nothing else."""

from megatron_rapo import Episode, Generate, Problem, RapoError, Transcript


class Rebuilt:
    """A line that the policy ends is its note for the next round; a turn that ends otherwise is its answer.

    Contexts stay short, however long the work is, as in IterResearch. Each round is a sequence of its own,
    trained on what it sampled; all share the reward of the answer.
    """

    def __init__(self, rounds: int = 3, round_tokens: int = 32) -> None:
        self.rounds = rounds
        self.round_tokens = round_tokens

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """See `Environment`."""
        newline = generate.encode("\n")
        if len(newline) != 1:
            raise RapoError(f"a line break is {len(newline)} tokens of this model; end notes by another text")
        sequences, note = [], []
        for number in range(self.rounds):
            transcript = Transcript([*problem.token_ids, *note])
            turn = await generate(
                transcript.token_ids, turn=number, max_tokens=self.round_tokens, stop=newline
            )
            transcript.add_turn(turn)
            sequences.append(transcript.sequence())
            note = turn.token_ids.tolist()  # as they were sampled: never decoded and encoded again
            answered = note[-1:] != newline
            if answered:
                break
        return Episode(
            tuple(sequences),
            answer=turn.text,
            truncated=turn.truncated or not answered,
            facts={"rounds": len(sequences)},
        )
