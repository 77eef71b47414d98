"""What both ends of a served reward agree on: the JSON that passes, and the token."""

from __future__ import annotations

import os
import re

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError

from ddpo.errors import ConfigError
from ddpo.rewards.identity import RewardIdentity

TOKEN_VARIABLE = "DDPO_REWARD_TOKEN"

_SHOWN = 3  # problems of one message


class PromptMessage(BaseModel):
    """What the picture of the same index was asked for."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: str = Field(min_length=1)
    """The words; not blank."""
    metadata: dict[str, JsonValue] = {}
    """What a reward knows about them beside the words."""


class IdentityMessage(BaseModel):
    """A reward's identity, as a service tells it."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, JsonValue] = {}
    revisions: dict[str, str] = {}
    version: str
    digest: str = ""
    """The sha256 of the other four, for people; a client computes its own."""

    @classmethod
    def of(cls, identity: RewardIdentity) -> IdentityMessage:
        """Return what a service tells of an identity."""
        return cls(
            name=identity.name,
            parameters=dict(identity.parameters),
            revisions=dict(identity.revisions),
            version=identity.version,
            digest=identity.digest,
        )


class ScoresMessage(BaseModel):
    """The scores of B pictures, as a service tells them. JSON has no nan: null stands for it."""

    model_config = ConfigDict(strict=True)

    values: list[FiniteFloat | None]
    """Rewards [B], float32 written out in full; null where the sample failed."""
    failed: list[bool]
    """Samples that could not be scored, [B]."""
    columns: dict[str, list[JsonValue]] = {}
    """The reward's own findings by name, [B] each; null is nan."""
    identity: IdentityMessage
    """What scored them."""


def what_is_wrong(error: ValidationError, whole: str = "the body") -> str:
    """Say what is wrong with a message, without repeating any of it: a token may stand there.

    Args:
        error: What its validation raised.
        whole: What the message is called, where all of it is wrong.
    """
    return "; ".join(
        f"{'.'.join(map(str, item['loc'])) or whole}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False)[:_SHOWN]
    )


def read_token(variable: str, parameter: str = "token_variable") -> str | None:
    """Return the bearer token that an environment variable holds.

    Args:
        variable: Its name.
        parameter: Name of the parameter that it comes from.

    Returns:
        The token without white space around it, or None where the variable is unset or empty.

    Raises:
        ConfigError: No name of a variable, or no bearer token (RFC 6750). Neither is quoted: a
            token may have been put in the place of a name.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ConfigError(
            f"{parameter} is no name of an environment variable (capitals, digits, '_'); name "
            "the variable that holds the token, and never write the token itself into a config"
        )
    token = os.environ.get(variable, "").strip()
    if token and not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise ConfigError(
            f"the environment variable {variable} holds what is no bearer token; expected letters, "
            "digits and - . _ ~ + /, with = at the end only"
        )
    return token or None
