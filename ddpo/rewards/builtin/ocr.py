"""Text in images: whether the text that a prompt asks for is legible to Tesseract.

As published for text rendering (Flow-GRPO, arXiv 2505.05470): one minus the number of edits between
the recognised and the requested text over the length of the latter, and never below 0. The OCR
there is PaddleOCR; Tesseract is a single small program without a Python package of its own.
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
"""Resolution given to Tesseract, which would otherwise estimate it from the image."""

_PAGE_MODES = {"sparse": 11, "page": 3, "block": 6, "line": 7}
_INSTALL = (
    "Install it (Debian, Ubuntu: apt-get install tesseract-ocr; macOS: brew install tesseract) on "
    "every machine that scores, and check that it is on the PATH"
)
# A single quote may be an apostrophe: it counts only without a letter or digit on its outer side.
_QUOTED = re.compile(
    r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|‘([^’]+)’(?!\w)|' r"(?<!\w)'([^']+)'(?!\w)"
)


def asked_text(prompt: Prompt) -> str | None:
    """Return the text that an image should show, or None if its prompt asks for none.

    That is the metadata ``text`` if there is one, otherwise what the prompt has in quotes ("...",
    “...”, '...', «...»); several quotes are joined by a space.
    """
    explicit = prompt.metadata.get("text")
    if isinstance(explicit, str):
        return explicit if fold(explicit) else None
    quoted = ["".join(groups) for groups in _QUOTED.findall(prompt.text)]
    text = " ".join(quoted)
    return text if fold(text) else None


def fold(text: str) -> str:
    """Normalise a text for comparison: ignore whitespace, case and Unicode look-alikes.

    NFKC, then case folding, then all whitespace is removed, since the number of spaces between
    words of an image is undefined. Punctuation counts.
    """
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance of two texts, over code points."""
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
    """Reward = 1 - edits between recognised and requested text / length of the latter; at least 0.

    The requested text is the prompt's metadata ``text``, otherwise what the prompt has in quotes.
    Case and whitespace are ignored (`fold`). Columns: ``ocr_text`` as recognised, ``ocr_asked``,
    ``ocr_distance`` (edits; nan if failed), and ``ocr_error``, which says why a sample failed: its
    prompt asks for no text, or Tesseract could not process the image. An image without legible text
    does not fail: its reward is 0.

    Each image is read by one Tesseract process with a single thread, so that the same image always
    gives the same text, whatever it is scored with.

    Args:
        language: Tesseract's name of the language (``eng``, ``deu``); several as ``eng+deu``.
        page_mode: ``sparse`` looks for text anywhere; ``page``, ``block`` and ``line`` expect a
            page, one block or one line that fills the image.
        timeout_s: Time limit per image, in seconds.

    Raises:
        ConfigError: Tesseract or the language is not installed.
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
            RewardError: Tesseract cannot be started.
        """
        asked = [asked_text(prompt) for prompt in prompts]
        # The threads only wait: each image is a process of its own.
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
        except (OSError, ValueError) as error:  # a damaged or empty image
            return _Reading(error=f"cannot decode the image: {error}")
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
            raise RewardError(f"cannot start {command[0]}: {error}. {_INSTALL}") from error
        if done.returncode != 0:
            return _Reading(error=f"{PROGRAM} ended with {done.returncode}: {_last(done.stderr)}")
        return _Reading(text=" ".join(done.stdout.decode("utf-8", "replace").split()))


def _revisions(program: str, languages: Sequence[str]) -> dict[str, str]:
    """Return what decides the result: Tesseract's version and a digest per language's data."""
    version = _ask(program, "--version").split("\n")[0].removeprefix(PROGRAM).strip()
    head, *installed = _ask(program, "--list-langs").splitlines()
    missing = sorted(set(languages) - set(installed))
    if missing:
        raise ConfigError(
            f"{program} does not have the language {', '.join(missing)}; it has "
            f"{', '.join(sorted(installed))}. On Debian and Ubuntu: apt-get install "
            f"tesseract-ocr-{missing[0].replace('_', '-')}"
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
    return lines[-1] if lines else "no message"
