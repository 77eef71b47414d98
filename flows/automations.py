"""Prefect automations of this project, set up by `prefect deploy` as a build step."""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import (
    AutomationCore,
    ChangeFlowRunState,
    EventTrigger,
    Posture,
    ResourceSpecification,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType

NAME = "ddpo: mark dead flow runs as crashed"
SILENCE_S = 600.0
"""Three heartbeats of Prefect's default frequency, and longer than a run waits for its server."""

_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = ("Completed", "Failed", "Cancelled", "Crashed", "TimedOut")


def mark_dead_flow_runs(silence_s: float = SILENCE_S) -> None:
    """Let Prefect's server mark flow runs of this project as crashed once their heartbeats end.

    The automation is created, or changed if it exists; one that was turned off stays so. It is
    about flow runs that have sent a heartbeat: those of deployments do, and their epochs, which are
    flow runs too, do not.

    Args:
        silence_s: How long after its last heartbeat a flow run is marked.
    """
    with get_client(sync_client=True) as client:
        existing = client.read_automations_by_name(NAME)
        if not existing:
            client.create_automation(_automation(silence_s))
        for automation in existing:
            assert automation.id is not None
            client.update_automation(automation.id, _automation(silence_s, automation.enabled))


def _automation(silence_s: float, enabled: bool = True) -> AutomationCore:
    return AutomationCore(
        name=NAME,
        enabled=enabled,
        description="The process or the machine is gone. Committed work is kept: resume the run.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *(f"prefect.flow-run.{state}" for state in _ENDS)},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": "ddpo-*"}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_s),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                message=f"No heartbeat for {silence_s:.0f} s. Committed work is kept: continue "
                "with Retry, or with `ddpo resume`",
                force=False,
            )
        ],
    )
