"""Prompts of the training images, and a small CLIP tokenizer that knows their words."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from transformers import CLIPTokenizer

from ddpo.basics.english import plural
from ddpo.starter.glyphs import ANIMALS, OTHERS

MAX_TOKENS = 24
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

PLURALS: tuple[str, ...] = tuple(plural(animal) for animal in ANIMALS)

PHRASES = (
    "a an one two three four five six seven eight nine ten and of the with in on photo picture "
    "washing the dishes riding a bike playing chess"
)
WORDS: tuple[str, ...] = tuple(dict.fromkeys([*PHRASES.split(), *ANIMALS, *PLURALS, *OTHERS]))
"""Words that are one token each. Others are split into pieces, down to bytes."""


def byte_characters() -> list[str]:
    """Return the printable stand-in of every byte, as byte-level BPE (GPT-2, CLIP) writes them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _apply(merges: list[tuple[str, str]], word: str) -> list[str]:
    """Split a word into pieces by BPE, applying the earliest merge first."""
    pieces = [*word[:-1], word[-1] + WORD_END]
    rank = {pair: index for index, pair in enumerate(merges)}
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in rank]
        if not pairs:
            return pieces
        best = min(pairs, key=rank.__getitem__)
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return merges under which each word is one token.

    A merge is only ever appended, so it applies after all earlier ones, and words that were whole
    before stay whole.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        while len(pieces := _apply(merges, word)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer: 512 byte tokens, the merges of `WORDS`, then start and end of text.

    The end of text also pads, as in Stable Diffusion 1.x.
    """
    merges = learn_merges(WORDS)
    characters = byte_characters()
    tokens = [
        *characters,
        *(character + WORD_END for character in characters),
        *(first + second for first, second in merges),
        BOS,
        EOS,
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    # transformers annotates merges as strings, but accepts pairs.
    known: dict[str, Any] = {"vocab": vocab, "merges": merges}
    return CLIPTokenizer(**known, model_max_length=MAX_TOKENS)
