"""Text in pictures: whether the words that a prompt asks for can be read (Tesseract).

As published for text rendering (Flow-GRPO, arXiv 2505.05470): one minus the number of edits between
what is read and what was asked for, over the length of the latter, and never below 0. The reader
there is PaddleOCR; Tesseract is one small program without a Python package of its own.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from ddpo.basics.digests import sha256_bytes
from ddpo.errors import ConfigError, RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores

PROGRAM = "tesseract"
DOTS_PER_INCH = 300
"""What Tesseract is told of every picture; otherwise it guesses from what it sees."""

_PAGE_MODES = {"sparse": 11, "page": 3, "block": 6, "line": 7}
_INSTALL = (
    "Install it (Debian, Ubuntu: apt-get install tesseract-ocr; macOS: brew install tesseract) on "
    "every machine that scores, and see that it is on the PATH"
)
# Single quotes are apostrophes too: they count where no letter or digit touches them outside.
_QUOTED = re.compile(
    r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|‘([^’]+)’(?!\w)|' r"(?<!\w)'([^']+)'(?!\w)"
)


def asked_text(prompt: Prompt) -> str | None:
    """Return the text that a picture should show.

    Args:
        prompt: Its metadata's ``text`` goes before its words; of those, what stands in quotes
            counts ("...", “...”, '...', «...»), several joined by a space.

    Returns:
        The text; None where the prompt asks for none.
    """
    told = prompt.metadata.get("text")
    if isinstance(told, str):
        return told if fold(told) else None
    quoted = ["".join(found) for found in _QUOTED.findall(prompt.text)]
    text = " ".join(quoted)
    return text if fold(text) else None


def fold(text: str) -> str:
    """Return a text as it is compared: without white space, case and Unicode's look-alikes.

    NFKC, then case folding, then all white space is dropped: what lies apart in a picture has no
    certain number of spaces between. Punctuation counts.
    """
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(first: str, second: str) -> int:
    """Return how many insertions, deletions and substitutions of characters lie between two texts.

    Levenshtein's distance, over code points.
    """
    above = list(range(len(second) + 1))
    for row, left in enumerate(first, start=1):
        here = [row]
        for column, right in enumerate(second, start=1):
            replaced = above[column - 1] + (left != right)
            here.append(min(replaced, above[column] + 1, here[-1] + 1))
        above = here
    return above[-1]


@dataclass(frozen=True)
class _Reading:
    text: str = ""
    error: str = ""


class OcrText:
    """Reward = 1 - edits between the text read and the text asked for / its length; at least 0.

    The text asked for is the prompt's metadata ``text``, else what the prompt has in quotes. Case
    and white space do not count (`fold`). Columns: ``ocr_text`` as it was read, ``ocr_asked``,
    ``ocr_distance`` (edits; nan where failed), and ``ocr_error``, which says why a sample failed: a
    prompt that asks for no text, or a picture that Tesseract could not work on. A picture without
    readable text does not fail: its reward is 0.

    One Tesseract a picture, each with a single thread: the same picture always reads the same, and
    what is scored together plays no part.

    Args:
        language: Tesseract's name of it (``eng``, ``deu``); several as ``eng+deu``.
        page_mode: ``sparse`` looks for text anywhere; ``page``, ``block`` and ``line`` expect a
            page, one block or one line that fills the picture.
        timeout_s: Seconds that a picture may take.

    Raises:
        ConfigError: There is no Tesseract, or it lacks the language.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "the program tesseract; text in the prompt's quotes or metadata"

    def __init__(
        self,
        language: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_+]*$")] = "eng",
        page_mode: Literal["sparse", "page", "block", "line"] = "sparse",
        timeout_s: Annotated[float, Field(gt=0)] = 30.0,
    ) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise ConfigError(f"the program {PROGRAM} is not installed. {_INSTALL}")
        self._program = program
        self._options = ["-l", language, "--psm", str(_PAGE_MODES[page_mode])]
        self._timeout_s = timeout_s
        self.revisions = _revisions(program, language.split("+"))

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images.

        Raises:
            RewardError: Tesseract cannot be started at all.
        """
        asked = [asked_text(prompt) for prompt in prompts]
        # Threads only wait here: each picture is a process of its own.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            readings = list(pool.map(self._read, images))
        errors = [
            reading.error or ("" if text else "the prompt asks for no text: put it in quotes")
            for reading, text in zip(readings, asked, strict=True)
        ]
        distances, values = [], []
        for reading, text, error in zip(readings, asked, errors, strict=True):
            wanted = fold(text or "")
            distance = math.nan if error else edit_distance(fold(reading.text), wanted)
            distances.append(float(distance))
            values.append(math.nan if error else 1 - min(distance, len(wanted)) / len(wanted))
        return Scores(
            np.array(values, np.float32),
            failed=np.array([bool(error) for error in errors], bool),
            columns={
                "ocr_text": [reading.text for reading in readings],
                "ocr_asked": [text or "" for text in asked],
                "ocr_distance": distances,
                "ocr_error": errors,
            },
        )

    def _read(self, image: Image.Image) -> _Reading:
        try:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="PPM")
        except (OSError, ValueError) as error:  # a damaged or empty picture
            return _Reading(error=f"the picture cannot be decoded: {error}")
        command = [self._program, "stdin", "stdout", "--dpi", str(DOTS_PER_INCH), *self._options]
        try:
            done = subprocess.run(
                command,
                input=buffer.getvalue(),
                capture_output=True,
                env=_one_thread(),
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return _Reading(error=f"{PROGRAM} took more than {self._timeout_s:g} s")
        except OSError as error:
            raise RewardError(f"{command[0]} cannot be started: {error}. {_INSTALL}") from error
        if done.returncode != 0:
            return _Reading(error=f"{PROGRAM} ended with {done.returncode}: {_last(done.stderr)}")
        return _Reading(text=" ".join(done.stdout.decode("utf-8", "replace").split()))


def _revisions(program: str, languages: Sequence[str]) -> dict[str, str]:
    """Return what decides a reading: Tesseract's version, and a digest of each language's data."""
    version = _ask(program, "--version").split("\n")[0].removeprefix(PROGRAM).strip()
    head, *installed = _ask(program, "--list-langs").splitlines()
    lacking = sorted(set(languages) - set(installed))
    if lacking:
        raise ConfigError(
            f"{program} does not know the language {', '.join(lacking)}; it has "
            f"{', '.join(sorted(installed))}. On Debian and Ubuntu: apt-get install "
            f"tesseract-ocr-{lacking[0].replace('_', '-')}"
        )
    revisions = {PROGRAM: version}
    folder = re.search(r'"(.+)"', head)
    for language in languages:
        data = Path(folder[1]) / f"{language}.traineddata" if folder else None
        if data is not None and data.is_file():
            revisions[data.name] = sha256_bytes(data.read_bytes())
    return revisions


def _ask(program: str, question: str) -> str:
    try:
        done = subprocess.run(
            [program, question], capture_output=True, timeout=60, check=True, env=_one_thread()
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{program} {question} failed: {error}. {_INSTALL}") from error
    return (done.stdout or done.stderr).decode("utf-8", "replace").strip()


def _one_thread() -> Mapping[str, str]:
    return {**os.environ, "OMP_THREAD_LIMIT": "1"}


def _last(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
