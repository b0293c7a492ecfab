# SPDX-License-Identifier: BSD-3-Clause
"""The demo's task: real Python text, notes scattered in it, and lines that recall them later.

A note is the line ``# note KEY = VALUE``, its recall the line ``# recall KEY = VALUE``; key and
value are six random hex digits, so a value can be known only by looking the note up.
``examples/train_recall_lm.py`` teaches the same lines with the names defined here.

The text is the source of a few modules of the running Python's standard library, which training
leaves out. It differs a little between Python versions and is the same in every run of one.
"""

import random
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = 0, 1
NOTE, RECALL, EQUALS = "\n# note", "\n# recall", " ="

HELD_OUT = (
    "argparse",
    "calendar",
    "configparser",
    "fractions",
    "shlex",
    "statistics",
    "tarfile",
    "textwrap",
)
"""Modules that training never sees: single files in every supported Python."""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt and where its notes and answers are."""

    tokens: list[int]
    """Token ids, `BOS` first."""
    notes: list[int]
    """Where each note's line begins."""
    recalls: list[tuple[int, int]]
    """`(start, stop)` of the value's tokens in the recall line of each note."""


@dataclass(frozen=True)
class Score:
    """How well a model predicts a prompt, every token given those before it."""

    loss: float
    """Mean cross entropy of all tokens but the first, in nats."""
    recall: float
    """Share of the recall lines in which every value token is the most likely one."""


def standard_library() -> Path:
    """Folder of the running Python's standard library sources."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_texts(folder: Path | None = None) -> list[str]:
    """Sources of the held-out modules, in the order of `HELD_OUT`; missing ones are passed over.

    Raises:
        FileNotFoundError: None of them is there as source.
    """
    folder = standard_library() if folder is None else folder
    paths = [folder / f"{name}.py" for name in HELD_OUT]
    texts = [path.read_text("utf-8") for path in paths if path.is_file()]
    if not texts:
        raise FileNotFoundError(
            f"the demo's text is the standard library's source, and {folder} holds none of "
            f"{', '.join(path.name for path in paths)}; use a Python that ships its sources"
        )
    return texts


def random_hex(rng: random.Random, count: int) -> list[str]:
    """`count` different strings of six lower-case hex digits."""
    return [f"{number:06x}" for number in rng.sample(range(1 << 24), count)]


def line_breaks(tokenizer: "Tokenizer") -> set[int]:
    """Ids of the byte-level tokens that begin with a newline; a line can go in before one."""
    return {token for piece, token in tokenizer.get_vocab().items() if piece.startswith("\u010a")}


def build_prompt(
    tokenizer: "Tokenizer",
    texts: Sequence[str],
    *,
    tokens: int = 8192,
    notes: int = 40,
    seed: int = 0,
) -> Prompt:
    """Put notes into the first part of a text, and recall lines into its last part and at its end.

    Lines go in where the text breaks a line, so that the token ids are those of the resulting
    string. Every second recall line stands at the end, the others are scattered behind all notes.

    Args:
        tokenizer: A byte-level tokenizer.
        texts: Sources to take the text from; where it starts depends on `seed`.
        tokens: Length of the prompt.
        notes: How many notes, each recalled once.
        seed: Chooses the text's start, keys, values and places.

    Raises:
        ValueError: `tokens` is too small for the notes, or larger than the text.
    """

    def encode(string: str) -> list[int]:
        return tokenizer.encode(string).ids

    rng = random.Random(seed)
    strings = random_hex(rng, 2 * notes)
    keys = [encode(f" {key}") for key in strings[:notes]]
    values = [encode(f" {value}") for value in strings[notes:]]
    equals = encode(EQUALS)
    bodies = [[*key, *equals, *value] for key, value in zip(keys, values)]
    note_lines = [[*encode(NOTE), *body] for body in bodies]
    recall_lines = [[*encode(RECALL), *body] for body in bodies]
    room = tokens - 1 - sum(map(len, note_lines)) - sum(map(len, recall_lines))
    if 3 * room < tokens:
        raise ValueError(
            f"tokens must leave a third of the prompt to the text, got tokens={tokens} with {notes} notes; raise tokens"
        )
    text = _text_window(encode, texts, room, rng)
    newlines = line_breaks(tokenizer)
    breaks = [at for at in range(1, room) if text[at] in newlines]
    early = [at for at in breaks if at < 0.55 * room]
    late = [at for at in breaks if at > 0.65 * room]
    # (place in the text, note before recall, a random order among equals, which note)
    lines = [(rng.choice(early), 0, rng.random(), n) for n in range(notes)]
    lines += [(room if n % 2 else rng.choice(late), 1, rng.random(), n) for n in range(notes)]

    out, done = [BOS], 0
    note_at, recall_at = [0] * notes, [(0, 0)] * notes
    for at, is_recall, _, n in sorted(lines):
        out += text[done:at]
        done = at
        if is_recall:
            out += recall_lines[n]
            recall_at[n] = (len(out) - len(values[n]), len(out))
        else:
            note_at[n] = len(out)
            out += note_lines[n]
    return Prompt(out, note_at, recall_at)


def _text_window(
    encode: Callable[[str], list[int]], texts: Sequence[str], length: int, rng: random.Random
) -> list[int]:
    """`length` tokens out of whole files joined by `EOS`."""
    first = rng.randrange(len(texts))
    stream: list[int] = []
    for text in (*texts[first:], *texts[:first]):
        stream += [*encode(text), EOS]
        if len(stream) >= 2 * length:
            break
    if len(stream) < length:
        raise ValueError(
            f"tokens must not exceed the text, which has {len(stream)} tokens where {length} are needed; lower tokens"
        )
    start = rng.randrange(len(stream) - length + 1)
    return stream[start : start + length]


def score(logits: Tensor, prompt: Prompt) -> Score:
    """Score teacher-forced logits `[S, V]` of a prompt of S tokens."""
    targets = torch.tensor(prompt.tokens, device=logits.device)
    predicted = logits.argmax(-1)
    exact = [(predicted[start - 1 : stop - 1] == targets[start:stop]).all() for start, stop in prompt.recalls]
    loss = cross_entropy(logits[:-1].float(), targets[1:])
    return Score(loss.item(), sum(map(int, exact)) / len(exact))
