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


def require_same_tokens(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuses a teacher that would take the policy's ids for other tokens.

    Its tokens are never made by its own tokenizer: ids alone must mean the same. So merges, chat template and
    which token ends a text may be others.

    Args:
        policy: the policy's tokenizer.
        teacher: the teacher's.
        rows: of the teacher's head.

    Raises:
        RapoError: an id is of different tokens, or of one tokenizer alone; or the teacher has no row for one.
    """
    own, other = (
        {number: token for token, number in tokenizer.get_vocab().items()} for tokenizer in (policy, teacher)
    )
    differing = sorted(number for number in own.keys() | other.keys() if own.get(number) != other.get(number))
    if differing:
        first = differing[0]
        told = [
            f"{whose} {tokens[first]!r}" if first in tokens else f"{whose} nothing"
            for whose, tokens in (("the policy's", own), ("the teacher's", other))
        ]
        more = f", and {len(differing) - 1:,} more differ" if len(differing) > 1 else ""
        raise RapoError(
            f"the teacher {teacher.name_or_path} has other tokens than the policy {policy.name_or_path}: id "
            f"{first} is {' and '.join(told)}{more}; choose a teacher of the same tokenizer"
        )
    if (highest := max(own)) >= rows:
        raise RapoError(
            f"the teacher {teacher.name_or_path} has a head of {rows} rows, none for token id {highest} of "
            "the tokenizer; choose a teacher that was trained with it"
        )
