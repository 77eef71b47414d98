"""A run in MLflow: its page, metrics, images and adapters."""
