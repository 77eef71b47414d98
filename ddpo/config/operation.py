"""The half of a config that may change between starts: storage and tracking."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, field_validator

from ddpo.basics.limits import Seed
from ddpo.basics.part import Part, is_off
from ddpo.basics.redaction import NO_PASSWORD, has_password
from ddpo.config.s3 import S3Options

_DATABRICKS = {"databricks", "databricks-uc", "uc"}

Keep = Literal["everything", "images_and_scores", "checkpoints"]


class RetentionConfig(Part):
    """What is kept of old epochs. Checkpoints have their own settings in `storage`."""

    keep: Keep = "everything"
    """`images_and_scores` deletes trajectories, which are most of the bytes; such epochs can still
    be rescored, but not trained on. `checkpoints` also deletes images and scores; besides
    checkpoints it keeps each sample's reward and advantage, and the images of fixed prompts."""
    older_than: PositiveInt = 10
    """Keep everything for this many of the most recent epochs."""


class StorageConfig(Part):
    """Where a run is stored."""

    root: str | None = None
    """Folder or fsspec URL (`s3://bucket/prefix`). By default DDPO_ROOT, else `ddpo-data/store`."""
    s3: S3Options = S3Options()
    """How to connect to a bucket; anything not set here comes from the usual AWS variables."""
    keep_newest_checkpoints: PositiveInt | None = None
    """Keep this many of the newest checkpoints; by default all. With full fine-tuning of Stable
    Diffusion 1.x, each has about 10 GB."""
    keep_every_checkpoint: PositiveInt | None = None
    """Of the older checkpoints, keep every n-th."""
    retention: RetentionConfig = RetentionConfig()
    """What is kept of old epochs; by default everything."""


class PicturesConfig(Part):
    """Fixed prompts and seeds, sampled with every checkpoint to watch the model change."""

    prompts: tuple[str, ...] = ()
    """The prompts; by default the first four of the run's prompt set."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """The seeds; each prompt is sampled with each seed."""


def check_tracking_uri(uri: str) -> str:
    """Return the address of a tracking store, checked to be none that MLflow refuses.

    Raises:
        ValueError: It is a plain folder, or no address.
    """
    scheme = urlsplit(uri).scheme
    if scheme not in ("", "file") and "://" not in uri and uri not in _DATABRICKS:
        raise ValueError(
            f"the tracking address {uri!r} has no '://'; write a database as sqlite:///mlflow.db, "
            "or with its whole path as sqlite:////data/mlflow.db"
        )
    if scheme == "file" or (not scheme and uri not in _DATABRICKS):
        raise ValueError(
            f"the tracking address {uri!r} is a plain folder, which MLflow 3.13 and later refuse; "
            "use a database, such as sqlite:///mlflow.db, or the address of an MLflow server "
            "(`mlflow migrate-filestore` moves the runs of an old folder)"
        )
    return uri


class TrackingConfig(Part):
    """Where a run is shown: MLflow."""

    uri: str = "sqlite:///ddpo-data/mlflow.db"
    """MLflow's tracking URI: a SQLite file or a server. It must not contain a password; set
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server."""
    experiment: str = "ddpo"
    """The MLflow experiment of the run."""
    parent: str | None = Field(default=None, exclude_if=is_off)
    """Name of the run or comparison below which MLflow nests this run. By default a fork's
    parent."""
    pictures: PicturesConfig = PicturesConfig()
    """The images of fixed prompts that are logged at every step."""
    adapter_every: PositiveInt = 10
    """Log the adapter every this many epochs, and after the last."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use."""

    @field_validator("uri")
    @classmethod
    def _has_no_password(cls, value: str) -> str:
        if has_password(value):
            raise ValueError(f"a config must not contain a password; {NO_PASSWORD}")
        return check_tracking_uri(value)
