"""What is given to the policy has no control tokens: no tool ends the turn, or speaks for the user."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_TRIES = 20


class Neutral:
    """Breaks up what a tokenizer would read as a token of its own (`<|im_end|>`, `</tool_response>`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}
        special = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        # Tokens of white space, which some tokenizers add, control nothing; nor does the unknown one.
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
        self.control = {
            token: text
            for token, text in {**added, **dict(special)}.items()
            if text.strip() and token not in unknown
        }

    def __call__(self, text: str) -> str:
        """The text, whose tokens have none of control: a space stands in each where there was one."""
        text = text.encode(errors="replace").decode()  # half of a surrogate pair is no character
        for _ in range(_TRIES):
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
            found = {self.control[token] for token in token_ids if token in self.control}
            if not found:
                return text
            before = text
            for control in sorted(found, key=len, reverse=True):
                text = text.replace(control, f"{control[:1]} {control[1:]}")
            if text == before:  # it is written otherwise, in full-width letters, say
                text = self._tokenizer.decode([token for token in token_ids if token not in self.control])
        return "?"
