"""Checks of a set-up before a night is spent on it: `ddpo doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from ddpo.basics.redaction import hide_credentials
from ddpo.config import RunConfig
from ddpo.errors import DdpoError
from ddpo.models import check_model
from ddpo.models.numerics import resolve_numerics
from ddpo.prompts import load_prompts
from ddpo.rewards import load_reward
from ddpo.runs.run import storage_root
from ddpo.store.objects import Store
from ddpo.store.upkeep.probe import probe
from ddpo_workflow.tasks.tracking.connection import connect, find_or_create_experiment

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        what: The part that was looked at.
        ok: Whether a run can use it.
        said: What was found; of a failure also the way out.
    """

    what: str
    ok: bool
    said: str


class SetupError(DdpoError):
    """A part of the set-up cannot be used: the message says how to mend it."""


def examine(config: RunConfig) -> Iterator[Finding]:
    """Look at every part that a run needs, one after the other.

    Args:
        config: Of the run.

    Yields:
        A finding a part, as soon as it is made; a failure does not end the examination.
    """
    checks: dict[str, Callable[[RunConfig], str]] = {
        "prompts": _prompts,
        "reward": _reward,
        "storage": _storage,
        "model": _model,
        "device": _device,
        "MLflow": _mlflow,
        "Prefect": _prefect,
    }
    for what, check in checks.items():
        try:
            yield Finding(what, True, check(config))
        except DdpoError as error:
            yield Finding(what, False, str(error))
        except Exception as error:  # a broken driver, a library's own error: the rest is looked at
            yield Finding(what, False, f"{type(error).__name__}: {hide_credentials(str(error))}")


def _prompts(config: RunConfig) -> str:
    prompts = load_prompts(config.prompts.name, config.prompts.parameters)
    return f"{config.prompts.name}: {len(prompts)} prompts, such as {prompts[0].text!r}"


def _reward(config: RunConfig) -> str:
    return load_reward(config.reward.name, config.reward.parameters).identity.reward_id


def _storage(config: RunConfig) -> str:
    store = Store.open(storage_root(config.storage.root), config.storage.s3)
    probe(store)
    return f"{store.root}: writes, creates exclusively, reads back, deletes"


def _model(config: RunConfig) -> str:
    check_model(config.model)
    return f"{config.model.path} can be had"


def _device(config: RunConfig) -> str:
    numerics = resolve_numerics(config.numerics)
    if numerics.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    else:
        memory = f"{psutil.virtual_memory().available / GIB:.1f} GiB of memory free"
    return f"{numerics.device} ({numerics.device_name}), {numerics.dtype}, {memory}"


def _mlflow(config: RunConfig) -> str:
    client = connect(config.tracking.uri)
    find_or_create_experiment(client, config.tracking.experiment)
    return f"{hide_credentials(config.tracking.uri)}, experiment {config.tracking.experiment!r}"


def _prefect(config: RunConfig) -> str:
    del config
    url = get_current_settings().api.url
    if url is None:
        return "no PREFECT_API_URL: a temporary server starts with the run, and ends with it"
    shown = hide_credentials(str(url))
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        raise SetupError(
            f"the server at PREFECT_API_URL {shown} does not answer as it should "
            f"({type(problem).__name__}: {hide_credentials(str(problem))}); start it with "
            "`prefect server start`, check PREFECT_API_KEY, or unset the variable for a temporary "
            "server"
        )
    return f"{shown} answers"
