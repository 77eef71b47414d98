"""This project's own warnings in the log of the flow run in which they occur."""

from __future__ import annotations

import logging

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler


class FlowRunLog(APILogHandler):
    """Sends what is logged within a flow run to its log, and nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        if FlowRunContext.get() or TaskRunContext.get():
            super().emit(record)


def log_to_flow_runs() -> None:
    """Send the warnings of this project to the log of the flow run in which they occur."""
    for name in ("ddpo", "ddpo_workflow"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, FlowRunLog) for handler in logger.handlers):
            logger.addHandler(FlowRunLog())
