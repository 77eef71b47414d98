"""The `ddpo` command, assembled from the modules of this folder.

Exit status: 0 for success, 1 for a failed run, 2 for invalid input, 130 after Ctrl-C, 143 after
SIGTERM.
"""

from __future__ import annotations

import sys

import typer

from ddpo.errors import DdpoError
from ddpo_workflow.flows.cli import (
    data,
    evaluate,
    forks,
    overview,
    pages,
    rewards,
    server,
    storage,
    training,
)
from ddpo_workflow.flows.cli.once import OptionsOnce
from ddpo_workflow.flows.cli.quiet import set_defaults
from ddpo_workflow.flows.cli.screen import say, set_up
from ddpo_workflow.flows.messages import as_called

app = typer.Typer(
    help="Reinforcement learning for diffusion models, as a durable batch workflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# In the order of `ddpo --help`.
for _module in (training, overview, evaluate, forks, data, storage, pages, rewards):
    for _command in _module.app.registered_commands:
        _command.cls = OptionsOnce
    app.add_typer(_module.app)
for _command in server.app.registered_commands:
    _command.cls = OptionsOnce
app.add_typer(server.app, name="server")


def main() -> None:
    """Run the command; invalid input ends it with one message and exit status 2."""
    set_defaults()
    set_up()
    try:
        app()
    except DdpoError as error:
        say(type(error).__name__, style="bold red")
        say(as_called(str(error)))
        sys.exit(2)


if __name__ == "__main__":
    main()
