# SPDX-License-Identifier: BSD-3-Clause
"""The user's text as sequences of a length: consecutive parts of every file, each from a beginning of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sale_flex.bench.model import Checkpoint, read_text, text_files
from sale_flex.calibration.texts import Tokens


class Part(NamedTuple):
    """A sequence."""

    name: str
    """Its file, and which part of it."""
    text: Tokens
    sha256: str
    """The text's, taken once: it is asked for with every row."""


def read_sequences(paths: Sequence[Path], length: int, count: int, checkpoint: Checkpoint) -> list[Part]:
    """Up to `count` sequences of `length` tokens, from the paths in turn, so that few come of many files.

    Args:
        paths: Files, or folders of text files; the files of a folder are one text.
        length: Tokens of a sequence, the one that begins it included.
        count: How many at most.
        checkpoint: Whose tokenizer reads them.

    Raises:
        OSError: A path is not there or can not be read.
        ValueError: There is not one sequence of that length; the message says how long the longest text is.
    """
    bos = [] if checkpoint.bos is None else [checkpoint.bos]
    parts: list[list[Part]] = []
    longest = 0
    for path in paths:
        ids: list[int] = []
        for file in text_files([path], "--texts"):
            ids += checkpoint.tokenizer(read_text(file), add_special_tokens=False).input_ids
            if len(ids) >= count * length:
                break
        longest = max(longest, len(ids) + len(bos))
        step = length - len(bos)
        parts.append(
            [_sequence(path, bos + ids[at : at + step], at // step) for at in range(0, len(ids) - step + 1, step)]
        )
    found = [part[n] for n in range(max(map(len, parts), default=0)) for part in parts if n < len(part)][:count]
    if not found:
        raise ValueError(f"--texts must have {length} tokens, --lengths, and the longest has {longest}; add text.")
    return found


def _sequence(path: Path, ids: list[int], part: int) -> Part:
    text = Tokens(torch.tensor([ids]), None)
    return Part(f"{path.name} {part + 1}", text, text.sha256)


def longest_of(config: Any) -> int | None:
    """Tokens that a model was made for, None where its config does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
