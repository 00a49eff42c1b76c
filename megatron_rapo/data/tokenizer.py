"""The tokenizer of a HF model directory."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_rapo.errors import RapoError

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        RapoError: the model directory has none that loads.
    """
    remedy = "copy the tokenizer files of the model beside its weights"
    # Without them transformers makes an empty tokenizer of the family's class, in silence.
    if not any((path / name).is_file() for name in FILES):
        raise RapoError(f"model {path} has no tokenizer (none of {', '.join(FILES)}); {remedy}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise RapoError(
            f"model {path} has no tokenizer that transformers loads ({error}); {remedy}"
        ) from error
