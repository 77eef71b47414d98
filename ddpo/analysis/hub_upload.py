"""Upload an export to a private repository of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ddpo.errors import ConfigError, UploadFailed


def check_repository(repository: str) -> None:
    """Check, without the network, that files can be uploaded to a repository.

    Args:
        repository: Its id, ``owner/name``, or a name alone for one of the user's own.

    Raises:
        ConfigError: The id is not one, nobody is logged in, or the environment says offline.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(
            f"--push-to-hub {repository!r} is not the id of a repository; expected owner/name"
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "--push-to-hub needs the Hub, but HF_HUB_OFFLINE is set; unset it, or leave the option "
            "out"
        )
    if get_token() is None:
        raise ConfigError(
            "--push-to-hub found no token of the Hugging Face Hub; run `hf auth login`, or set "
            "HF_TOKEN to one that may write"
        )


def upload(repository: str, folder: Path, files: Sequence[str], message: str) -> str:
    """Upload files in one commit. A repository that does not exist is created, as a private one.

    Args:
        repository: As for `check_repository`.
        folder: The folder that holds the files.
        files: Their names in it.
        message: The commit's.

    Returns:
        The repository's address.

    Raises:
        UploadFailed: The Hub is unreachable or refused.
    """
    hub = HfApi()
    try:
        created = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=created.repo_id,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message=message,
        )
    except (HTTPError, OSError) as error:
        raise UploadFailed(
            f"{folder} is written, but could not be uploaded to {repository!r}: "
            f"{str(error).splitlines()[0]}. Check the name and that the token may write, then "
            "repeat the command"
        ) from error
    return str(created)
