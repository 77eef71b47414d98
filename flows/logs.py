"""Warnings and progress in the log of the flow run in which they occur."""

from __future__ import annotations

import logging

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from ddpo_workflow.tasks.logs import listen


class FlowRunLog(APILogHandler):
    """Sends what is logged within a flow run to its log, and nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        if FlowRunContext.get() or TaskRunContext.get():
            super().emit(record)


def log_to_flow_runs() -> None:
    """Send what belongs there to the log of its flow run."""
    listen(FlowRunLog())
