"""What belongs into the log of a flow run: from this project, from libraries, and from Python."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TextIO

from ddpo_workflow.tasks.progress import LOGGER, OWN_LOGGERS

PYTHON = "python"
"""The logger of Python's own warnings, which nothing but a flow run's log gets from it."""

# Those of libraries that hand nothing to the root logger.
_APART = ("diffusers", "mlflow", "transformers")
_PREFECT = "prefect"


def listen(handler: logging.Handler) -> None:
    """Give a handler all that belongs into a flow run's log, unless one of its kind has it already.

    That is the progress and the warnings of this project, and the warnings of everything else
    except Prefect, which sends its own.

    Args:
        handler: The handler.
    """
    import prefect.main  # noqa: F401  # now: it takes the handlers of the root logger away

    handler.addFilter(_belongs)
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    logging.getLogger(PYTHON).propagate = False
    for name in ("", *_APART, PYTHON):
        logger = logging.getLogger(name)
        if not any(isinstance(each, type(handler)) for each in logger.handlers):
            logger.addHandler(handler)
    if not isinstance(warnings.showwarning, _Shown):
        warnings.showwarning = _Shown(warnings.showwarning)


def _belongs(record: logging.LogRecord) -> bool:
    package = record.name.partition(".")[0]
    if package in OWN_LOGGERS:
        return True
    return record.levelno >= logging.WARNING and package != _PREFECT


class _Shown:
    """Logs what Python warns of, besides showing it as before."""

    def __init__(self, before: Callable[..., None]) -> None:
        self._before = before

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Show one warning; see `warnings.showwarning`."""
        self._before(message, category, filename, lineno, file, line)
        if file is None:
            text = warnings.formatwarning(message, category, filename, lineno, line)
            logging.getLogger(PYTHON).warning("%s", text.strip())
