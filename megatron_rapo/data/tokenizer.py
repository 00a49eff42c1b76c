"""The tokenizer of a HF model directory."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_rapo.errors import RapoError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        RapoError: the model directory has none that loads.
    """
    from transformers import AutoTokenizer  # takes seconds, which a run that is refused before need not wait

    remedy = "copy the tokenizer files of the model beside its weights"
    # Without them transformers makes an empty tokenizer of the family's class, in silence.
    if not any((path / name).is_file() for name in FILES):
        raise RapoError(f"model {path} has no tokenizer (none of {', '.join(FILES)}); {remedy}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exception; a damaged file, anything
        what = f"{type(error).__name__}: {error}"
        raise RapoError(
            f"model {path} has no tokenizer that transformers loads ({what}); {remedy}"
        ) from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """How many of the head's first rows are the vocabulary: up to the tokenizer's highest id.

    It is no count of tokens, since ids may have holes: rows inside that no token has are trained like the
    others, as engines sample from them like from the others. Rows behind the last token are spare.

    Args:
        tokenizer: the policy's.
        rows: of the model's head.

    Raises:
        RapoError: the head has no row for the token that ends a response.
    """
    eos = tokenizer.eos_token_id
    if eos is not None and eos >= rows:
        raise RapoError(
            f"the tokenizer {tokenizer.name_or_path} ends texts with token id {eos}, but the model's head "
            f"has {rows} rows; use the tokenizer that the model was trained with"
        )
    return min(max(tokenizer.get_vocab().values()) + 1, rows)
