"""A new run from another run's checkpoint and saved samples, with another reward or settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ddpo_workflow.flows.flow import ddpo_flow
from ddpo_workflow.flows.forms import Parameters, Text, Whole
from ddpo_workflow.flows.run_requests import ForkRequest
from ddpo_workflow.flows.train import start_and_train


@ddpo_flow(name="ddpo-fork", run_name="{run_id} from epoch {epoch}")
def fork(
    run_id: str,
    epoch: int,
    reward: Text = None,
    parameters: Parameters = None,
    fork_id: Text = None,
    epochs: Whole = None,
    statistics: Literal["rebuild", "reset"] = "rebuild",
    overrides: Sequence[str] = (),
    storage: Text = None,
    trust: bool = False,
) -> str:
    """Fork a run: start a new one from its checkpoint and saved samples.

    Args:
        run_id: The run to fork.
        epoch: The fork's first epoch. It starts from the checkpoint before this epoch, and trains
            on this epoch's saved samples.
        reward: Name of the new reward. Empty: the same reward.
        parameters: Parameters of the new reward.
        fork_id: The new run's name. Empty: built from the parent's name, the epoch and the reward.
            An existing fork is resumed.
        epochs: Total number of epochs, including those before the fork. Empty: the parent's.
        statistics: Rebuild the prompt statistics by scoring the epochs before the fork, or reset
            them.
        overrides: Any other setting, one per item, such as `optimizer.learning_rate=1e-4`.
        storage: Folder or URL of the store. Empty: the worker's DDPO_ROOT, or the local store.
        trust: Allow the code, addresses and files that a run from another machine names.

    Returns:
        The new run's name.
    """
    request = ForkRequest(
        run_id=run_id,
        epoch=epoch,
        reward=reward,
        parameters=parameters,
        fork_id=fork_id,
        epochs=epochs,
        statistics=statistics,
        overrides=tuple(overrides),
        storage=storage,
        trust=trust,
    )
    return start_and_train(request.plan())
