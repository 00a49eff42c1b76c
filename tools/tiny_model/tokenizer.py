"""One token a character: all that the generated tasks' prompts and answers are written with."""

from __future__ import annotations

from transformers import Qwen2Tokenizer

PAD, EOS = "<|pad|>", "<|endoftext|>"
CHARACTERS = "\n *+-/()=:0123456789{}\\bdeox,"

_BYTE_LEVEL = str.maketrans({"\n": "Ċ", " ": "Ġ"})  # how byte-level BPE writes what is not printable


def build_tokenizer() -> Qwen2Tokenizer:
    """Pad is token 0, end of sequence 1, then `CHARACTERS` in order.

    It is Qwen2's own byte-level BPE, without merges: transformers loads no other class beside a Qwen2
    model, whatever the files say. That class leaves out characters that have no token.
    """
    tokens = [PAD, EOS, *CHARACTERS.translate(_BYTE_LEVEL)]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=EOS,
        clean_up_tokenization_spaces=False,
    )
