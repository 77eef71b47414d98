"""How to reach an S3 bucket. Credentials are never part of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from ddpo.basics.paths import expand

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
"""Of silence within one answer, not of a whole transfer."""
ATTEMPTS = 5
"""Of every call, waiting longer each time (botocore's standard mode)."""


class S3Options(BaseModel):
    """Where an S3 server is and how to talk to it.

    Credentials come from where AWS tools find them: `AWS_ACCESS_KEY_ID` and
    `AWS_SECRET_ACCESS_KEY`, a profile, a role.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = None
    """Of a server that is not AWS, `http://host:port`. By default `AWS_ENDPOINT_URL`, else AWS."""
    region: str | None = None
    """By default `AWS_DEFAULT_REGION`."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """Whether the bucket is part of the path or of the host's name."""
    verify_tls: bool = True
    """Whether the server must show a valid certificate."""
    ca_bundle: Path | None = None
    """Certificates to trust in place of the system's; by default `AWS_CA_BUNDLE`."""

    @field_validator("endpoint_url")
    @classmethod
    def _has_no_credentials(cls, value: str | None) -> str | None:
        if value is None:
            return None
        # Before it is taken apart: a password may hold any character, and errors quote their input.
        if "@" in value or "?" in value:
            raise ValueError(
                "credentials do not belong in a config; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment instead"
            )
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not an http address; expected http://host:port or https://host")
        return value

    @model_validator(mode="after")
    def _verifies_with_a_bundle(self) -> Self:
        if self.ca_bundle and not self.verify_tls:
            raise ValueError("ca_bundle has no effect with verify_tls: false; set only one of them")
        return self

    @property
    def bundle(self) -> Path | None:
        """The file of `ca_bundle`."""
        return Path(expand(str(self.ca_bundle))) if self.ca_bundle else None

    def environment(self) -> dict[str, str]:
        """Return the AWS variables with the same meaning, for the settings that have one."""
        found = {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_CA_BUNDLE": str(self.bundle) if self.bundle else None,
        }
        return {name: value for name, value in found.items() if value}

    def filesystem_arguments(self) -> dict[str, Any]:
        """Return the arguments of s3fs."""
        client: dict[str, Any] = {}
        if self.region:
            client["region_name"] = self.region
        if not self.verify_tls:
            client["verify"] = False
        elif self.bundle:
            client["verify"] = str(self.bundle)
        # Unset options are left to ~/.aws/config, which any value here would override.
        chosen = self.addressing_style != "auto"
        return {
            "endpoint_url": self.endpoint_url,
            "client_kwargs": client,
            "config_kwargs": {
                **({"s3": {"addressing_style": self.addressing_style}} if chosen else {}),
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"mode": "standard", "total_max_attempts": ATTEMPTS},
            },
        }
