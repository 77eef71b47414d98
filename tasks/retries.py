"""Which failures of a task are retried, and how often."""

from __future__ import annotations

from typing import Any

from prefect.tasks import exponential_backoff

from ddpo.errors import (
    DdpoError,
    RewardError,
    RewardUnavailable,
    StoreCallFailed,
    StoreRefused,
    StoreUnavailable,
)


def _may_be_temporary(task: object, task_run: object, state: Any) -> bool:
    """Return whether a failure may be temporary.

    Our own errors name something that a person has to fix, except for some failed calls to the
    store and the reward. One that is unavailable has been waited for already.
    """
    try:
        state.result()
    except (StoreUnavailable, StoreRefused, RewardUnavailable):
        return False
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
    "retry_condition_fn": _may_be_temporary,
}
"""Options of tasks that call the store or a reward: retry after 1, 2 and 4 s, with jitter."""
