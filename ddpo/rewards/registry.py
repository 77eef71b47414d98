"""Find and build rewards by name, entry point or import path."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from PIL import Image
from pydantic import JsonValue

from ddpo.basics import plugins, trust
from ddpo.basics.digests import json_digest
from ddpo.errors import ConfigError, DdpoError, RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Reward, Scores
from ddpo.rewards.identity import SOURCE, RewardIdentity, source_digest
from ddpo.rewards.scoring import FAULTS, as_scores

ENTRY_POINT_GROUP = "ddpo.rewards"
"""Entry point group in which other packages register their rewards."""

BUILTIN = {
    "clip_score": "ddpo.rewards.builtin.clip_score:ClipScore",
    "colorfulness": "ddpo.rewards.builtin.colorfulness:Colorfulness",
    "disc_match": "ddpo.rewards.builtin.disc_match:DiscMatch",
    "hps_v2": "ddpo.rewards.builtin.hps_v2:HpsV2",
    "http": "ddpo.rewards.builtin.http:HttpReward",
    "image_reward": "ddpo.rewards.builtin.image_reward:ImageReward",
    "jpeg_compressibility": "ddpo.rewards.builtin.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "ddpo.rewards.builtin.jpeg:JpegIncompressibility",
    "laion_aesthetic": "ddpo.rewards.builtin.laion_aesthetic:LaionAesthetic",
    "ocr_text": "ddpo.rewards.builtin.ocr:OcrText",
    "openai_vlm": "ddpo.rewards.builtin.openai_vlm:OpenaiVlm",
    "pickscore": "ddpo.rewards.builtin.pickscore:PickScore",
    "preference": "ddpo.rewards.builtin.preference:Preference",
    "starter_vqa": "ddpo.rewards.builtin.starter_vqa:StarterVqa",
    "vlm_alignment": "ddpo.rewards.builtin.vlm_alignment:VlmAlignment",
    "vlm_vqa": "ddpo.rewards.builtin.vlm_vqa:VlmVqa",
    "weighted": "ddpo.rewards.builtin.weighted:Weighted",
}
"""The rewards that come with the project. To add one: a file in `builtin/`, and its line here."""

_SCORED = ("images", "prompts")  # first parameters of a plain function that is itself the reward
_METADATA = "metadata"  # its third, if it was written for another trainer


def available_rewards() -> tuple[str, ...]:
    """Return the names of all rewards, including those of entry points, sorted."""
    return plugins.available(BUILTIN, ENTRY_POINT_GROUP)


def find_reward(name: str) -> tuple[Any, list[inspect.Parameter]]:
    """Import what a reward's name stands for, without building it.

    Returns:
        What `load_reward` would build or call, and the parameters that a config may set.

    Raises:
        ConfigError: There is no such reward, or it cannot be imported.
    """
    target = plugins.resolve("reward", name, BUILTIN, ENTRY_POINT_GROUP).target
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        return target, []  # already built: it takes none
    parameters = list(inspect.signature(target).parameters.values())
    if not inspect.isclass(target) and _scores_itself(target):
        parameters = parameters[len(_taken(target)) :]
    return target, parameters


def source_files(name: str) -> list[str]:
    """Return the source files whose content is the version of a reward that states none.

    Raises:
        ConfigError: There is no such reward, or it cannot be imported.
    """
    plugin = plugins.resolve("reward", name, BUILTIN, ENTRY_POINT_GROUP)
    modules = (sys.modules[module] for module in {plugin.module, _module(plugin.target)})
    return sorted({module.__file__ or module.__name__ for module in modules})


_loading = threading.RLock()
"""Held while a reward is built; a weighted sum builds its components meanwhile."""
_loaded: WeakValueDictionary[tuple[int, str], _Loaded] = WeakValueDictionary()
"""The rewards of this process that are in use, by target and parameters."""
_turns: dict[str, threading.RLock] = {}
"""One lock for each class or function that is called by one thread at a time."""


def load_reward(name: str, parameters: Mapping[str, Any]) -> Reward:
    """Build a reward, or return the one in use that is the same.

    A name or import path may refer to

    - a class, which is instantiated with the parameters and then called with ``(images, prompts)``;
    - a function whose first parameters are ``images, prompts``, which is the reward itself; its
      further parameters come from the config;
    - any other function, which is called with the parameters and returns the reward;
    - any other callable object, which is the reward itself and takes no parameters.

    A reward whose third parameter is ``metadata`` is given the metadata of the B prompts there.

    A reward returns `Scores`, or what `as_scores` converts to them. Its identity is its attribute
    ``identity`` (a `RewardIdentity`) if it has one. Otherwise it consists of name, parameters, the
    reward's attribute ``revisions`` (model name to revision) and its attribute ``version``, which
    defaults to a digest of its module's source.

    It is built and called by one thread at a time, unless its attribute ``thread_safe`` is True.
    A process has one of each identity, so that a model is in memory once.

    Args:
        name: One of ``available_rewards()``, or an import path ``my_package.my_module:MyReward``.
        parameters: From the config; names and types are checked before anything is called.

    Raises:
        ConfigError: There is no such reward, the parameters do not fit, or it is not a reward.
        RewardError: Building it failed.
        NotTrusted: A stored run that is not trusted names code or addresses of its own.
    """
    with _loading, trust.building(name):
        plugin = plugins.resolve("reward", name, BUILTIN, ENTRY_POINT_GROUP)
        what = f"reward {name!r}"
        checked = _check(what, plugin.target, parameters)
        key = id(plugin.target), json_digest([name, checked.identity])
        found = _loaded.get(key)
        if found is not None and found.fixed:
            return found
        new = _identified(what, plugin, _build(what, plugin.target, checked), checked.identity)
        if found is not None and found.same_as(new):
            return found
        _loaded[key] = new
        return new


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A reward as the rest of the project sees it."""

    score: Callable[..., Any]
    identity: RewardIdentity
    fixed: bool
    """Whether building it again would give the same identity, for as long as its target lives."""
    target: Any
    """What it was built from; held, since a dead object's id may be another's."""
    turn: threading.RLock | None
    """Held during a call; None for a reward that is thread-safe."""
    wants_metadata: bool
    """Whether it is called with the metadata of the prompts as its third argument."""

    @property
    def thread_safe(self) -> bool:
        """Whether several threads may call it at once; otherwise they wait for each other."""
        return self.turn is None

    @property
    def connection(self) -> Any:
        """Where it is reached, if a service computes it."""
        return getattr(self.score, "connection", None)

    @property
    def group_weights(self) -> Any:
        """Weights of its columns, if each is normalised in its group before they are summed."""
        return getattr(self.score, "group_weights", None)

    def same_as(self, other: _Loaded) -> bool:
        """Return whether another one gives the same scores from the same place."""
        return (self.identity.digest, self.connection) == (other.identity.digest, other.connection)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        more = [[dict(prompt.metadata) for prompt in prompts]] if self.wants_metadata else []
        with self.turn or nullcontext():
            return as_scores(self.score(images, prompts, *more))


def _identified(
    what: str,
    plugin: plugins.Plugin,
    score: Callable[..., Any],
    in_force: Mapping[str, JsonValue],
) -> _Loaded:
    described = score if not isinstance(score, functools.partial) else plugin.target
    turn = None if _is_thread_safe(what, described) else _turn_of(plugin.target)
    wants_metadata = _wants_metadata(what, score)
    identity = getattr(score, "identity", None)
    if isinstance(identity, RewardIdentity):
        return _Loaded(score, identity, False, plugin.target, turn, wants_metadata)
    version = getattr(described, "version", None)
    if version is None:
        version = f"{SOURCE}{source_digest(described, {plugin.module, _module(plugin.target)})}"
    revisions = getattr(described, "revisions", {})
    if not isinstance(version, str) or not _is_text_by_text(revisions):
        raise ConfigError(
            f"{what}: `version` must be a string and `revisions` must map model names to strings; "
            f"they are {version!r} and {revisions!r}"
        )
    identity = RewardIdentity(plugin.name, in_force, dict(revisions), version)
    # Revisions that an instance finds out, such as digests of files, may be others next time.
    fixed = isinstance(inspect.getattr_static(type(described), "revisions", {}), Mapping)
    fixed = fixed and "revisions" not in getattr(described, "__dict__", {})
    return _Loaded(score, identity, fixed, plugin.target, turn, wants_metadata)


def _wants_metadata(what: str, score: Callable[..., Any]) -> bool:
    """Return whether a reward's third parameter is the prompts' metadata.

    Raises:
        ConfigError: It cannot be called with images and prompts.
    """
    try:
        signature = inspect.signature(score)
    except (TypeError, ValueError):  # not written in Python
        return False
    wants_metadata = list(signature.parameters)[len(_SCORED) :][:1] == [_METADATA]
    try:
        signature.bind(*_SCORED, *[_METADATA] * wants_metadata)
    except TypeError as error:
        raise ConfigError(
            f"{what} is called with {signature}; a reward is called with (images, prompts), or "
            f"with (images, prompts, metadata): {error}"
        ) from None
    return wants_metadata


def _is_thread_safe(what: str, reward: Any) -> bool:
    declared = getattr(reward, "thread_safe", False)
    if not isinstance(declared, bool):
        raise ConfigError(f"{what}: `thread_safe` must be True or False; it is {declared!r}")
    return declared


def _turn_of(target: Any) -> threading.RLock:
    """Return the lock of a class or function: state may be its own, and not an instance's."""
    inner = inspect.unwrap(target)
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return _turns.setdefault(f"{_module(target)}:{name}", threading.RLock())


def _check(what: str, target: Any, parameters: Mapping[str, Any]) -> plugins.CheckedParameters:
    """Check a reward's parameters before any of its code is called."""
    if not callable(target):
        raise ConfigError(
            f"{what} is a {type(target).__name__}; name a class or function that scores "
            "(images, prompts)"
        )
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        if parameters:
            raise ConfigError(
                f"{what} is an object that takes no parameters, since it is already built; name "
                "its class instead"
            )
        return plugins.CheckedParameters({}, {})
    if inspect.isclass(target):
        return plugins.check_parameters(what, target, parameters)
    if _scores_itself(target):
        return plugins.check_parameters(what, target, parameters, _taken(target))
    try:
        return plugins.check_parameters(what, target, parameters)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. It is called with its parameters and returns the reward; if the function "
            "itself scores, name its first parameters `images, prompts`"
        ) from error


def _build(what: str, target: Any, checked: plugins.CheckedParameters) -> Callable[..., Any]:
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        return target
    if not inspect.isclass(target) and _scores_itself(target):
        return functools.partial(target, **checked.values)
    try:
        score = target(**checked.values)
    except DdpoError:
        raise
    except FAULTS as error:
        raise RewardError(f"{what} could not be built: {type(error).__name__}: {error}") from error
    if not callable(score):
        raise ConfigError(
            f"{what} returns {score!r}, which cannot be called with (images, prompts); if the "
            "function itself is the reward, name its first parameters `images, prompts`"
        )
    return score


def _scores_itself(function: Callable[..., Any]) -> bool:
    try:
        return tuple(inspect.signature(function).parameters)[: len(_SCORED)] == _SCORED
    except (TypeError, ValueError):
        return False


def _taken(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameters of a function that scores which are not the config's to set."""
    names = list(inspect.signature(function).parameters)
    return (*_SCORED, _METADATA) if names[len(_SCORED) :][:1] == [_METADATA] else _SCORED


def _module(target: Any) -> str:
    inner = inspect.unwrap(target)
    return getattr(inner, "__module__", None) or type(inner).__module__


def _is_text_by_text(revisions: Any) -> bool:
    return isinstance(revisions, Mapping) and all(
        isinstance(text, str) for pair in revisions.items() for text in pair
    )
