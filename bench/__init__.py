"""Measurements: each is a command that prints figures of ``docs/``."""

from ddpo_workflow.flows.cli.quiet import set_defaults

set_defaults()  # before any of them imports Prefect, MLflow or diffusers
