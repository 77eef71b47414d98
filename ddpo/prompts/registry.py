"""Prompt sets by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddpo.basics import plugins
from ddpo.errors import ConfigError, DdpoError
from ddpo.prompts.base import Prompt

ENTRY_POINT_GROUP = "ddpo.prompts"
"""Packages register prompt sets of their own here."""

_OURS = {
    name: f"ddpo.prompts.sets:{name}"
    for name in (
        "animal_activities",
        "counting",
        "imagenet_animals",
        "prompt_list",
        "simple_animals",
        "starter_scenes",
        "text_file",
    )
}


def available_prompt_sets() -> tuple[str, ...]:
    """Return the names of prompt sets, sorted, entry points among them."""
    return plugins.available(_OURS, ENTRY_POINT_GROUP)


def load_prompts(name: str, parameters: Mapping[str, Any]) -> tuple[Prompt, ...]:
    """Build a prompt set.

    Args:
        name: One of ``available_prompt_sets()``, or the import path ``my_package.my_module:name``
            of a function that returns strings or `Prompt`s.
        parameters: Passed to the set's function by keyword, after a check of names and types.

    Returns:
        The prompts, all to be drawn with equal chance; at least one. What is listed twice is in
        it twice.

    Raises:
        ConfigError: No such set, parameters that do not fit it, no prompts, or something else
            than prompts.
    """
    plugin = plugins.resolve("prompt set", name, _OURS, ENTRY_POINT_GROUP)
    what = f"prompt set {name!r}"
    if not callable(plugin.target):
        raise ConfigError(
            f"{what} is a {type(plugin.target).__name__}; name a function that returns the prompts"
        )
    checked = plugins.check_parameters(what, plugin.target, parameters)
    try:
        made = plugin.target(**checked.values)
        if isinstance(made, str) or not isinstance(made, Iterable):
            raise ConfigError(f"it returned {made!r}; return a list of strings or of Prompts")
        prompts = tuple(_as_prompt(item) for item in made)
    except DdpoError as error:
        raise ConfigError(f"{what}: {error}") from error
    except Exception as error:
        raise ConfigError(f"{what} failed: {type(error).__name__}: {error}") from error
    if not prompts:
        raise ConfigError(f"{what} is empty; give it at least one prompt")
    return prompts


def _as_prompt(item: Any) -> Prompt:
    return item if isinstance(item, Prompt) else Prompt(item)
