"""Find and build prompt sets by name, entry point or import path."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddpo.basics import plugins
from ddpo.errors import ConfigError, DdpoError, NotTrusted
from ddpo.prompts.base import Prompt

ENTRY_POINT_GROUP = "ddpo.prompts"
"""Entry point group in which other packages register their prompt sets."""

_OURS = {
    name: f"ddpo.prompts.sets:{name}"
    for name in (
        "animal_activities",
        "colored_discs",
        "counting",
        "everyday_objects",
        "imagenet_animals",
        "prompt_list",
        "simple_animals",
        "starter_scenes",
        "text_file",
        "unseen_activities",
        "unseen_animals",
    )
}


def available_prompt_sets() -> tuple[str, ...]:
    """Return the names of all prompt sets, including those of entry points, sorted."""
    return plugins.available(_OURS, ENTRY_POINT_GROUP)


def load_prompts(name: str, parameters: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """Build a prompt set.

    Args:
        name: One of ``available_prompt_sets()``, or the import path ``my_package.my_module:name``
            of a function that returns strings or `Prompt`s.
        parameters: Passed to the set's function by keyword, after a check of names and types.

    Returns:
        At least one prompt, each to be sampled with equal probability; duplicates are kept.

    Raises:
        ConfigError: There is no such set, the parameters do not fit, or it does not return prompts.
        NotTrusted: A stored run that is not trusted names code or a file of its own.
    """
    plugin = plugins.resolve("prompt set", name, _OURS, ENTRY_POINT_GROUP)
    what = f"prompt set {name!r}"
    if not callable(plugin.target):
        raise ConfigError(
            f"{what} is a {type(plugin.target).__name__}; name a function that returns the prompts"
        )
    checked = plugins.check_parameters(what, plugin.target, parameters)
    try:
        items = plugin.target(**checked.values)
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise ConfigError(f"it returned {items!r}; return a list of strings or of Prompts")
        prompts = tuple(_as_prompt(item) for item in items)
    except NotTrusted:
        raise
    except DdpoError as error:
        raise ConfigError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} failed: {type(error).__name__}: {error}") from error
    if not prompts:
        raise ConfigError(f"{what} is empty; it needs at least one prompt")
    return prompts


def _as_prompt(item: Any) -> Prompt:
    return item if isinstance(item, Prompt) else Prompt(item)
