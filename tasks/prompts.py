"""Which prompt each sample of a shard was drawn for.

Advantages need it beside the scores, and it stands in the table with the pictures, which are most
of a shard's bytes. A process that has read and verified a shard to score it remembers its prompts,
so that it need not read all of it a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ddpo.runs.run import Run
from ddpo.store import manifests
from ddpo.store.manifests import Ref
from ddpo.store.tables import decode_prompts

_MOST_SHARDS = 1024
_writing = threading.Lock()
_remembered: dict[Ref, Mapping[str, str]] = {}


def prompts_of(run: Run, rollouts: Ref) -> Mapping[str, str]:
    """Return the prompts of a shard by `sample_id`.

    Args:
        run: Any run of the store.
        rollouts: The shard's manifest, by digest.
    """
    known = _remembered.get(rollouts)
    if known is not None:
        return known
    stored = manifests.load(run.store, rollouts).objects["rollouts"]
    return decode_prompts(run.store.get(stored))


def remember_prompts(rollouts: Ref, prompts: Mapping[str, str]) -> None:
    """Keep the prompts of a shard that has been read; the oldest give way.

    Args:
        rollouts: The shard's manifest.
        prompts: By `sample_id`.
    """
    with _writing:
        while len(_remembered) >= _MOST_SHARDS:
            _remembered.pop(next(iter(_remembered)))
        _remembered[rollouts] = prompts
