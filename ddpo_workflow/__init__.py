"""The workflow: `flows` and `tasks`, the only rooms that know Prefect and MLflow."""
