"""Requests that train one run: a new one, one to resume, a fork."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpo_workflow.flows.run_requests.base import Request, before_models, opened

if TYPE_CHECKING:
    from ddpo.config import RunConfig
    from ddpo.runs import RunPlan


class TrainRequest(Request["RunPlan"]):
    """Start a run, or resume the one of that name."""

    config_file: str
    """A YAML file."""
    run_id: str
    """The run's name."""
    epochs: int | None = None
    """Number of epochs."""
    seed: int | None = None
    """The seed of everything random."""
    learning_rate: float | None = None
    """Learning rate of AdamW."""
    storage: str | None = None
    """The store."""
    tracking: str | None = None
    """MLflow's tracking URI."""
    overrides: tuple[str, ...] = ()
    """Any other setting, as ``sampler.steps=20``."""

    def resolve(self) -> RunPlan:
        """Read the config and check that the run can start."""
        from ddpo.config.files import read_config

        fields = {
            "epochs": self.epochs,
            "seed": self.seed,
            "optimizer.learning_rate": self.learning_rate,
            "storage.root": self.storage,
            "tracking.uri": self.tracking,
        }
        return _check_start(read_config(self.config_file, self.overrides, fields), self.run_id)


class ResumeRequest(Request["RunPlan"]):
    """Resume a run with the settings of its last start."""

    run_id: str
    """The run's name."""
    storage: str | None = None
    """The store."""
    epochs: int | None = None
    """Total number of epochs; by default as before."""
    trust: bool = False
    """Allow the code, addresses and files that the run names."""

    def resolve(self) -> RunPlan:
        """Open the run and check that it can be resumed."""
        from ddpo.config.files import parse_config
        from ddpo.errors import RunNotStarted
        from ddpo.runs import storage_root

        root = storage_root(self.storage)
        run = opened(root, self.run_id, trust=self.trust)
        if run.start is None:
            raise RunNotStarted(run.run_id, run.store.root)
        raw: dict[str, Any] = run.config.whole()
        # As it is reached now; the address that an earlier start was given may be outdated.
        raw["storage"] |= {"root": root, "s3": {}}
        if self.epochs is not None:
            raw["epochs"] = self.epochs
        with run.naming():
            return _check_start(parse_config(raw, f"run {self.run_id}"), self.run_id)


class ForkRequest(Request["RunPlan"]):
    """Start a run from another one's checkpoint and saved samples."""

    run_id: str
    """The parent."""
    epoch: int
    """The fork's first epoch."""
    reward: str | None = None
    """Name of the new reward; by default the parent's reward."""
    parameters: Mapping[str, Any] | None = None
    """Parameters of the new reward."""
    fork_id: str | None = None
    """The fork's name."""
    epochs: int | None = None
    """Total number of epochs, including those before the fork."""
    statistics: Literal["rebuild", "reset"] = "rebuild"
    """Prompt statistics to start with."""
    overrides: tuple[str, ...] = ()
    """Any other setting, as ``optimizer.learning_rate=1e-4``."""
    storage: str | None = None
    """The store."""
    trust: bool = False
    """Allow the code, addresses and files that the parent names."""

    def resolve(self) -> RunPlan:
        """Plan the fork and check all that it inherits."""
        from ddpo.runs import storage_root
        from ddpo.runs.forks.plan import fork_config, fork_name

        parent = opened(storage_root(self.storage), self.run_id, trust=self.trust)
        config = fork_config(
            parent,
            self.epoch,
            reward=self.reward,
            parameters=self.parameters,
            epochs=self.epochs,
            statistics=self.statistics,
            overrides=self.overrides,
        )
        with parent.naming(chosen=() if self.reward is None else (self.reward,)):
            return _check_start(config, self.fork_id or fork_name(parent, config))


def new_run_id(config_file: str) -> str:
    """Return a new run's name, made of its config's name, the time, and a random part.

    Jobs of an array start in the same second.
    """
    return f"{run_name_stem(config_file)}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def run_name_stem(config_file: str) -> str:
    """Return what the names of a config's runs start with."""
    return Path(config_file).stem.replace("_", "-")


def check_surroundings(plans: Sequence[RunPlan]) -> list[RunPlan]:
    """Check each run's engine, GPUs and lease, MLflow, and their model, which is loaded last.

    Returns:
        The runs, with batch sizes that were `auto` found.
    """
    from ddpo.runs.lease import wait_until_free
    from ddpo_workflow.tasks.engines import check_engine, check_gpus, held_gpus
    from ddpo_workflow.tasks.tracking.connection import connect
    from ddpo_workflow.tasks.worker import check_model

    for plan in plans:
        check_engine(plan.config.engine, plan.numerics.device)
        check_gpus(plan.config.engine, plan.numerics.device)
        wait_until_free(plan.store, plan.run_id)
    connect(plans[0].config.tracking.uri)
    measured = next((plan for plan in plans if plan.awaits_sizes), None)
    if measured is None:
        return check_model(plans)
    with held_gpus(measured.config.engine, measured.numerics.device, measured.run_id):
        return check_model(plans)


def _check_start(config: RunConfig, run_id: str) -> RunPlan:
    """Check that a run can start: every way of starting one by itself comes through here."""
    from ddpo.analysis.comparison.plan import check_not_shared
    from ddpo.runs import check_run

    plan = check_run(config, run_id, before_models=before_models)
    check_not_shared(plan.store, plan.run_id)
    (plan,) = check_surroundings([plan])
    return plan
