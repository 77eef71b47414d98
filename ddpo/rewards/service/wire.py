"""What both ends of a served reward agree on: the JSON messages and the token."""

from __future__ import annotations

import os
import re

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from ddpo.errors import ConfigError
from ddpo.rewards.identity import RewardIdentity

TOKEN_VARIABLE = "DDPO_REWARD_TOKEN"
PREFIX = "DDPO_"
"""What the environment variables that a config names begin with."""
ALLOWED_VARIABLES = "DDPO_REWARD_VARIABLES"
"""Environment variable with further variables that a config may name, separated by commas."""

_SHOWN = 3  # problems of one message


class PromptMessage(BaseModel):
    """The prompt of the image with the same index."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: str = Field(min_length=1)
    """The text; not blank."""
    metadata: dict[str, JsonValue] = {}
    """What a reward knows about the prompt besides its text."""


class IdentityMessage(BaseModel):
    """A reward's identity, as a service reports it."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, JsonValue] = {}
    revisions: dict[str, str] = {}
    version: str
    digest: str = ""
    """The sha256 of the other four fields, for people; a client computes its own."""

    @classmethod
    def of(cls, identity: RewardIdentity) -> IdentityMessage:
        """Return the message for an identity."""
        return cls(
            name=identity.name,
            parameters=dict(identity.parameters),
            revisions=dict(identity.revisions),
            version=identity.version,
            digest=identity.digest,
        )


class ScoresMessage(BaseModel):
    """The scores of B images, as a service reports them. JSON has no nan; null stands for it."""

    model_config = ConfigDict(strict=True)

    values: list[FiniteFloat | None]
    """Rewards [B], float32 in full precision; null where the sample failed."""
    failed: list[bool]
    """Samples that could not be scored, [B]."""
    columns: dict[str, list[JsonValue]] = {}
    """The reward's own columns by name, [B] each; null where there is no value."""
    identity: IdentityMessage
    """The reward that computed them."""


def describe_problems(error: ValidationError, whole: str = "the body") -> str:
    """Describe what is wrong with a message without quoting it, since it may contain a token.

    Args:
        error: What validating the message raised.
        whole: What the message is called if all of it is wrong.
    """
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or whole}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)[:_SHOWN]
    )


def check_variable(variable: str, parameter: str, usual: str) -> None:
    """Refuse an environment variable that a config must not name: its value leaves this machine.

    Args:
        variable: Name of the variable.
        parameter: Name of the parameter that names it.
        usual: The parameter's default, which is always allowed.

    Raises:
        ConfigError: The name is malformed, or neither begins with `DDPO_` nor is listed in
            `DDPO_REWARD_VARIABLES`. It is not quoted: someone may have written a token in its
            place.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ConfigError(
            f"{parameter} is not the name of an environment variable (capitals, digits, '_'); name "
            "the variable that holds the value, and never write a token itself into a config"
        )
    listed = {name.strip() for name in os.environ.get(ALLOWED_VARIABLES, "").split(",")}
    if not (variable == usual or variable.startswith(PREFIX) or variable in listed):
        raise ConfigError(
            f"{parameter} names an environment variable that a config may not read, since its "
            f"value leaves this machine; expected a name that begins with {PREFIX}, or one listed "
            f"in the environment variable {ALLOWED_VARIABLES} (separated by commas)"
        )


def read_token(variable: str) -> str | None:
    """Return the bearer token in an environment variable.

    Args:
        variable: Name of the variable.

    Returns:
        The token without surrounding whitespace; None if the variable is unset or empty.

    Raises:
        ConfigError: The token (RFC 6750) is malformed. It is not quoted.
    """
    token = os.environ.get(variable, "").strip()
    if token and not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise ConfigError(
            f"the environment variable {variable} does not hold a bearer token; expected letters, "
            "digits and - . _ ~ + /, with = at the end only"
        )
    return token or None
