"""What the commands share: common options, and opening a run.

Heavy libraries are imported by the commands that need them, so that typos are reported at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ddpo.runs import Run

Root = Annotated[
    str | None,
    typer.Option("--root", help="The store. By default DDPO_ROOT, or else ddpo-data/store."),
]
ConfigRoot = Annotated[
    str | None,
    typer.Option(
        "--root",
        help="The store. By default the config's storage.root, or else DDPO_ROOT, or else "
        "ddpo-data/store.",
    ),
]
RunId = Annotated[str, typer.Argument(help="The run's name, as `ddpo runs` lists it.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Allow the code, addresses and files that a run from elsewhere names. This machine "
        "remembers it.",
    ),
]
Epochs = Annotated[
    str | None,
    typer.Option(
        help="One epoch, or a range a:b that excludes b; a or b may be omitted. By default all."
    ),
]
ConfigFile = Annotated[str, typer.Argument(help="A YAML file; configs/ has examples.")]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        help="A parameter of the reward, as name=value; may be repeated. The last value of a name "
        "wins.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting, such as sampler.steps=20; may be repeated. The last value of a key "
        "wins.",
    ),
]


def saved_run(run_id: str, root: str | None) -> Run:
    """Open a run.

    Args:
        run_id: The run's name.
        root: The value of `--root`.

    Raises:
        DdpoError: The store has no such run, or cannot be read.
    """
    from ddpo.runs import open_run, storage_root
    from ddpo.store.objects import Store

    return open_run(Store.open(storage_root(root)), run_id)


def read_parameters(given: Sequence[str]) -> dict[str, Any]:
    """Return the parameters given by `--param`, by name.

    Args:
        given: Parameters as ``name=value``, with the value in YAML; the last value of a name wins.

    Raises:
        ConfigError: One of them cannot be read.
    """
    from ddpo.config.yaml_text import read_typed
    from ddpo.errors import ConfigError

    parameters = {}
    for item in given:
        name, separator, text = item.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--param expects NAME=VALUE; got {item!r}")
        try:
            parameters[name.strip()] = read_typed(text)
        except ValueError as error:
            raise ConfigError(f"--param {item!r} is not valid YAML: {error}") from None
    return parameters
