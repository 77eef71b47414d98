"""This project's own warnings and progress in the log of the flow run in which they occur."""

from __future__ import annotations

import logging

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from ddpo_workflow.tasks.progress import LOGGER, OWN_LOGGERS


class FlowRunLog(APILogHandler):
    """Sends what is logged within a flow run to its log, and nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        if FlowRunContext.get() or TaskRunContext.get():
            super().emit(record)


def log_to_flow_runs() -> None:
    """Send the warnings and the progress of this project to the log of their flow run."""
    logging.getLogger(LOGGER).setLevel(logging.INFO)
    for name in OWN_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, FlowRunLog) for handler in logger.handlers):
            logger.addHandler(FlowRunLog())
