"""What the commands share: the screen, the options that many take, how a run is found.

Heavy libraries are imported by the commands that need them: a misspelt key is answered at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ddpo.run import Run

console = Console()

Root = Annotated[
    str | None,
    typer.Option("--root", help="The store. By default DDPO_ROOT, else ddpo-data/store."),
]
RunId = Annotated[str, typer.Argument(help="A run's name; `ddpo runs` lists them.")]
ConfigFile = Annotated[str, typer.Argument(help="A YAML file; configs/ holds some.")]
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
    from ddpo.run import open_run, storage_root
    from ddpo.store.objects import Store

    return open_run(Store.open(storage_root(root)), run_id)


def overrides(settings: list[str] | None, root: str | None) -> list[str]:
    """Return the settings of `--set`, with `--root` as the last, which wins."""
    return [*(settings or ()), *([f"storage.root={root}"] if root else ())]
