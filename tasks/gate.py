"""The gate of a run: the task that ends training if a checkpoint has passed a limit."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.basics.digests import canonical_json, json_digest
from ddpo.config import EvaluationConfig
from ddpo.store.artefacts import GateDecision
from ddpo.store.keys import Partition
from ddpo.store.kinds import GATE_DECISION, committed
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks.evaluated import alarms_of, evaluation_ref
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened


@task(name="gate", task_run_name="gate checkpoint {epoch}", cache_policy=NO_CACHE, **STORAGE)
def pass_gate(handle: RunHandle, config: EvaluationConfig, epoch: int) -> Ref[GateDecision] | None:
    """Commit the decision to end training after a checkpoint's evaluation, or find it.

    Args:
        handle: The run.
        config: The evaluation's settings, with those of the gate.
        epoch: The checkpoint, whose trained weights are evaluated.

    Returns:
        The decision; None if training goes on, because no limit is passed or the gate only warns.
    """
    run, gate = opened(handle), config.gate
    if gate.then == "warn" or not (reasons := alarms_of(run, config, epoch)):
        return None
    evaluation = evaluation_ref(run, config, epoch)
    # Another gate, set by a later start, decides for itself.
    name = json_digest([evaluation.key, gate.model_dump(mode="json")])[:8]
    return committed(
        run.store,
        GATE_DECISION,
        Partition(run.run_id, epoch, images_id=name),
        {"evaluation": evaluation},
        lambda: {"decision": canonical_json({"reasons": reasons, "then": gate.then})},
    )
