"""A calm screen: what libraries say about themselves goes to the logs, or nowhere."""

from __future__ import annotations

import os

_DEFAULTS = {
    # The console shows ours; Prefect's own lines stay in its database and UI.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # Nothing is reported to anyone but the user's own servers.
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
    """Set the environment's defaults; before Prefect, MLflow or diffusers are imported."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
