"""What the commands share: the screen, the options that many take, how a run is found.

Heavy libraries are imported by the commands that need them: a misspelt key is answered at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ddpo.runs.run import Run

console = Console()

Root = Annotated[
    str | None,
    typer.Option("--root", help="The store. By default DDPO_ROOT, else ddpo-data/store."),
]
RunId = Annotated[str, typer.Argument(help="A run's name; `ddpo runs` lists them.")]
Epochs = Annotated[
    str | None,
    typer.Option(
        help="Which: one, or a:b, b not among them; a or b may be left out. By default all."
    ),
]
ConfigFile = Annotated[str, typer.Argument(help="A YAML file; configs/ holds some.")]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", help="A parameter of the reward, as a=value; may be repeated."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, as a.b=value; may be repeated."),
]


def say(text: str) -> None:
    """Print a line as it is: keys and errors may look like markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def saved_run(run_id: str, root: str | None) -> Run:
    """Open a run of the store.

    Args:
        run_id: The run's name.
        root: The store, as `--root` gives it.

    Raises:
        DdpoError: The store has no such run, or cannot be read.
    """
    from ddpo.runs.run import open_run, storage_root
    from ddpo.store.objects import Store

    return open_run(Store.open(storage_root(root)), run_id)


def overrides(settings: list[str] | None, root: str | None) -> list[str]:
    """Return the settings of `--set`, with `--root` as the last, which wins."""
    return [*(settings or ()), *([f"storage.root={root}"] if root else ())]


def read_parameters(given: Sequence[str]) -> dict[str, Any]:
    """Read parameters written as a=value.

    Args:
        given: One an item, the value as YAML.

    Returns:
        Values by name.

    Raises:
        ConfigError: One of them is nothing of the kind.
    """
    import yaml

    from ddpo.errors import ConfigError

    parameters = {}
    for each in given:
        name, separator, text = each.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--param {each!r} is no `a=value`")
        try:
            parameters[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--param {each!r} cannot be read as YAML: {error}") from error
    return parameters
