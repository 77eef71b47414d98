"""The checks of `ddpo doctor`: everything that a run needs, before hours are spent on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings

from ddpo.basics.redaction import hide_credentials
from ddpo.config import PreferencesConfig, RunConfig
from ddpo.errors import DdpoError
from ddpo.memory.advice import check_fit, free_memory
from ddpo.models.compiled import check_compiler
from ddpo.models.numerics import resolve_numerics
from ddpo.prompts import load_prompts
from ddpo.rewards import load_reward
from ddpo.rewards.trial import try_out
from ddpo.runs import storage_root
from ddpo.runs.run import pair_files
from ddpo.runs.start import check_denoising
from ddpo.store.objects import Store
from ddpo.store.upkeep.probe import probe
from ddpo.training.eight_bit import check_eight_bit
from ddpo_workflow.tasks.tracking.connection import connect
from ddpo_workflow.tasks.tracking.experiment import find_or_create_experiment

_SIZE_PX = (64, 64)
"""Of an image that is read only to see that it can be."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    part: str
    """The part that was checked."""
    ok: bool
    """Whether a run can use it."""
    message: str
    """The result; for a failure also how to fix it."""


class SetupError(DdpoError):
    """A part of the setup cannot be used; the message says how to fix it."""


def examine(config: RunConfig) -> Iterator[Finding]:
    """Check every part that a run needs, one after the other.

    Args:
        config: The run's config.

    Yields:
        One finding for each part, as soon as it is known; a failure does not end the checks.
    """
    given = config.preferences
    checks: dict[str, Callable[[RunConfig], str]] = {
        "prompts": _prompts,
        "reward": _reward,
        **({"preferences": lambda _: _preferences(given)} if given else {}),
        "storage": _storage,
        "model": _model,
        "device": _device,
        "memory": _memory,
        "MLflow": _mlflow,
        "Prefect": _prefect,
    }
    for part, check in checks.items():
        try:
            yield Finding(part, True, check(config))
        except DdpoError as error:
            yield Finding(part, False, str(error))
        except Exception as error:  # a broken driver, say; the other parts are checked all the same
            yield Finding(part, False, f"{type(error).__name__}: {hide_credentials(str(error))}")


def _prompts(config: RunConfig) -> str:
    prompts = load_prompts(config.prompts.name, config.prompts.parameters)
    return f"{config.prompts.name}: {len(prompts)} prompts, such as {prompts[0].text!r}"


def _reward(config: RunConfig) -> str:
    reward = load_reward(config.reward.name, config.reward.parameters)
    try:
        prompts = load_prompts(config.prompts.name, config.prompts.parameters)
    except DdpoError:  # which is another check's finding
        return reward.identity.reward_id
    try_out(reward, prompts, config.model.size)
    return reward.identity.reward_id


def _preferences(config: PreferencesConfig) -> str:
    pairs = pair_files(config)
    (first,) = pairs.read([0], _SIZE_PX)
    return f"{len(pairs)} preference pairs in {pairs.path}, such as {first.prompt.text!r}"


def _storage(config: RunConfig) -> str:
    store = Store.open(storage_root(config.storage.root), config.storage.s3)
    probe(store)
    return f"{store.root}: writes, creates exclusively, reads back, lists, deletes"


def _model(config: RunConfig) -> str:
    width, height = check_denoising(config).size
    return f"{config.model.path} is complete and can be trained, {width} x {height} px"


def _device(config: RunConfig) -> str:
    numerics = resolve_numerics(config.smallest_batches)
    if numerics.compile:
        check_compiler(numerics.device)
    if config.optimizer.eight_bit:
        check_eight_bit(numerics.device)
    compiled = ", compiled" if numerics.compile else ""
    return f"{numerics.device} ({numerics.device_name}), {numerics.dtype}{compiled}"


def _memory(config: RunConfig) -> str:
    numerics = resolve_numerics(config.smallest_batches)
    try:
        prompts = len(load_prompts(config.prompts.name, config.prompts.parameters))
    except DdpoError:  # which is another check's finding
        prompts = None
    try:
        check_denoising(config)
    except DdpoError:  # likewise
        return "unknown, since the model cannot be used"
    fit = check_fit(config, numerics, free_memory(numerics), prompts=prompts)
    if not fit.fits:
        raise SetupError(fit.message)
    if config.numerics.searches:
        return f"{fit.message}, with the smallest batches: the first start measures which are fast"
    return fit.message


def _mlflow(config: RunConfig) -> str:
    client = connect(config.tracking.uri)
    find_or_create_experiment(client, config.tracking.experiment)
    return f"{hide_credentials(config.tracking.uri)}, experiment {config.tracking.experiment!r}"


def _prefect(config: RunConfig) -> str:
    del config
    url = get_current_settings().api.url
    if url is None:
        return "PREFECT_API_URL is not set: a temporary server starts and ends with each run"
    shown = hide_credentials(str(url))
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
    if problem is not None:
        raise SetupError(
            f"no healthy Prefect server at PREFECT_API_URL {shown} "
            f"({type(problem).__name__}: {hide_credentials(str(problem))}); start one with "
            "`prefect server start`, check PREFECT_API_KEY, or unset the variable to use a "
            "temporary server"
        )
    return f"{shown} answers"
