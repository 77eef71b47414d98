"""CPU, memory, disk, network and GPU use of a run, logged from a thread of MLflow."""

from __future__ import annotations

import logging

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

_logger = logging.getLogger(__name__)


class SystemMetrics:
    """The system metrics of one MLflow run. What goes wrong with them is a warning.

    Args:
        tracking_uri: MLflow's tracking URI.
        mlflow_run_id: MLflow's id of the run.
        interval_s: Seconds between samples.
    """

    def __init__(self, tracking_uri: str, mlflow_run_id: str, interval_s: int) -> None:
        self._uri, self._run_id, self._interval_s = tracking_uri, mlflow_run_id, interval_s
        self._monitor: SystemMetricsMonitor | None = None

    def start(self) -> None:
        """Start the thread, or replace it, and continue the curves.

        It ends by itself if MLflow does not answer when it asks, once an interval.
        """
        previous, self._monitor = self._monitor, None
        try:
            if previous is not None:
                previous.finish()
            self._monitor = SystemMetricsMonitor(
                self._run_id,
                sampling_interval=self._interval_s,
                resume_logging=True,
                tracking_uri=self._uri,
            )
            self._monitor.start()
        except Exception as error:
            _logger.warning("System metrics are not logged: %s", error)

    def stop(self) -> None:
        """Stop the thread and log the last values."""
        monitor, self._monitor = self._monitor, None
        if monitor is None:
            return
        try:
            monitor.finish()
            monitor.collect_metrics()
            if rest := monitor.aggregate_metrics():
                monitor.publish_metrics(rest)
                monitor.mlflow_logger.flush()
        except Exception as error:
            _logger.warning("The last system metrics were not logged: %s", error)
