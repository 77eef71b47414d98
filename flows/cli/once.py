"""Options that may be given only once: click would silently keep the last of several."""

from __future__ import annotations

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperOption

from ddpo.errors import ConfigError


class OptionsOnce(TyperCommand):
    """A command that rejects an option given twice, unless the option may be repeated."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what was typed.

        Args:
            ctx: The command's context.
            args: The words after the command's name.

        Raises:
            ConfigError: An option that takes one value is given twice.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in Counter(order).items():
            if times == 1 or not isinstance(option, TyperOption):
                continue
            if not (option.multiple or option.is_flag):
                raise ConfigError(
                    f"{option.opts[0]} is given {times} times, and only the last would count; "
                    "give it once"
                )
        return super().parse_args(ctx, args)
