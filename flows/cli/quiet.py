"""Environment defaults: what libraries and servers need, and what keeps them off the screen."""

from __future__ import annotations

import os

from ddpo.basics.loopback import never_proxy_loopback

_DEFAULTS = {
    # Prefect's log lines go to its database and UI, not to the console.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # By default each task run is written at once, which locks SQLite and delays the next flow by 2
    # to 6 s. In batches, once a second, the delay is 0.2 s.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    # Its pages look for its API on port 4200, whichever port it listens on.
    "PREFECT_UI_API_URL": "/api",
    # A server that is restarted is waited for, 8 minutes in all; Prefect's 5 tries take 1 minute.
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    # In its jobs, MLflow's server judges applications of language models; they are eight processes
    # and about 2 GB, also where there is nothing to judge.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # No telemetry.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def set_defaults() -> None:
    """Set the defaults; call this before Prefect, MLflow or diffusers are imported."""
    never_proxy_loopback()
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def hide_loading_bars() -> None:
    """Hide the progress bars of diffusers, which no environment variable controls."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
