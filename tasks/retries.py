"""How often a task is tried again."""

from __future__ import annotations

from typing import Any

from prefect.tasks import exponential_backoff

from ddpo.errors import DdpoError, RewardError, StoreCallFailed


def _worth_another_try(task: object, task_run: object, state: Any) -> bool:
    """Tell what may pass by itself from what will fail again.

    Our own errors name something a person has to mend. The exceptions are a call to the store and
    the reward, whose cause may be a server that is away for a moment.
    """
    try:
        state.result()
    except (StoreCallFailed, RewardError):
        return True
    except DdpoError:
        return False
    except Exception:
        return True
    return False


STORAGE: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=1),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _worth_another_try,
}
"""Options of tasks that talk to the store or to a reward: 1, 2 and 4 seconds, jittered."""
