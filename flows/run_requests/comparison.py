"""The request that trains a model by several algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddpo_workflow.flows.run_requests.base import Request, before_models
from ddpo_workflow.flows.run_requests.runs import check_surroundings

if TYPE_CHECKING:
    from ddpo.analysis.comparison.plan import Comparison
    from ddpo.runs import RunPlan
    from ddpo.store.objects import Store


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison whose runs have passed all checks."""

    comparison: Comparison
    """The comparison."""
    runs: Mapping[str, RunPlan]
    """Its runs by name, ready to start."""

    @property
    def store(self) -> Store:
        """The store of the runs, which is waited for."""
        return self.runs[self.comparison.members[0].run_id].store

    @property
    def epochs(self) -> int:
        """Number of epochs of all runs together."""
        return sum(member.config.epochs for member in self.comparison.members)


class CompareRequest(Request[ComparisonPlan]):
    """Train a model by several algorithms and compare the results."""

    config_file: str
    """A YAML file with `base`, `variants` and `seeds`."""
    name: str | None = None
    """The comparison's name; by default the file's."""
    storage: str | None = None
    """The store."""
    tracking: str | None = None
    """MLflow's tracking URI."""
    overrides: tuple[str, ...] = ()
    """Any setting of the base, as ``sampler.steps=20``."""

    def resolve(self) -> ComparisonPlan:
        """Read the comparison and check that each of its runs can start."""
        from ddpo.analysis.comparison.plan import read_comparison

        fields = {"storage.root": self.storage, "tracking.uri": self.tracking}
        return check_comparison(
            read_comparison(self.config_file, self.name, self.overrides, fields)
        )


def check_comparison(comparison: Comparison) -> ComparisonPlan:
    """Check that all runs of a comparison can start or be resumed, before one of them does.

    Args:
        comparison: The comparison.

    Raises:
        ConfigError: One of the runs exists with other settings.
        RunBeingTrained: Another process trains one of them.
        DdpoError: One of the runs cannot start, or MLflow cannot be reached.
    """
    from ddpo.errors import ConfigError, RunIdentityMismatch
    from ddpo.runs import check_run

    plans: dict[str, RunPlan] = {}
    for member in comparison.members:
        try:
            plans[member.run_id] = check_run(
                member.config,
                member.run_id,
                awaits_parent=member.config.fork is not None,
                before_models=before_models,
            )
        except RunIdentityMismatch as error:
            shared = member is comparison.shared[member.seed]
            which = "the run with its shared samples" if shared else "its run"
            lines = "".join(f"\n  {difference}" for difference in error.differences)
            raise ConfigError(
                f"comparison {comparison.name!r} exists, and {which}, {member.run_id!r}, has other "
                f"settings:{lines}\nExisting runs stay as they are: give the changed comparison "
                "another name (--name), or undo the change"
            ) from error
    ready = check_surroundings(list(plans.values()))
    return ComparisonPlan(comparison, {plan.run_id: plan for plan in ready})
