"""The half of a config that may change under a run_id: where a run is remembered and shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from ddpo.basics.part import Part, is_off
from ddpo.config.s3 import S3Options

Keep = Literal["everything", "images_and_scores", "checkpoints"]


class RetentionConfig(Part):
    """What is kept of old epochs. Checkpoints have settings of their own, beside this."""

    keep: Keep = "everything"
    """`images_and_scores` drops trajectories, which are most of the bytes; such epochs can be
    scored again, but not trained on again. `checkpoints` drops pictures and scores too; what is
    left beside checkpoints is each sample's reward and advantage, and the pictures of fixed
    prompts."""
    older_than: PositiveInt = 10
    """So many of the newest epochs keep everything."""


class StorageConfig(Part):
    """Where a run is remembered."""

    root: str | None = None
    """Folder or fsspec URL (`s3://bucket/prefix`). By default DDPO_ROOT, else `ddpo-data/store`."""
    s3: S3Options = S3Options()
    """How a bucket is reached; what is not said here comes from the usual AWS variables."""
    keep_newest_checkpoints: PositiveInt | None = None
    """Keep this many of the newest checkpoints; by default all. A whole UNet's are about 10 GB
    each."""
    keep_every_checkpoint: PositiveInt | None = None
    """Of the older ones keep each n-th."""
    retention: RetentionConfig = RetentionConfig()
    """What is kept of old epochs' rollouts; by default everything."""


class PicturesConfig(Part):
    """The same prompts and seeds drawn before every epoch, to watch the model change."""

    prompts: tuple[str, ...] = ()
    """By default the first four of the run's own prompt set."""
    seeds: tuple[int, ...] = (0,)
    """Each prompt is drawn with each seed."""


class TrackingConfig(Part):
    """Where a run is shown (MLflow)."""

    uri: str = "sqlite:///ddpo-data/mlflow.db"
    """MLflow's tracking URI: a SQLite file or a server. Holds no password: a server's stands in
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "ddpo"
    """MLflow experiment that the run appears in."""
    parent: str | None = Field(default=None, exclude_if=is_off)
    """Name of the run, or of the comparison, below whose page this run's is shown. By default that
    of the run that it branches off, if any."""
    pictures: PicturesConfig = PicturesConfig()
    """What is drawn at every step."""
    adapter_every: PositiveInt = 10
    """Log the adapter every so many epochs, and after the last."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use."""

    @field_validator("uri")
    @classmethod
    def _has_no_password(cls, value: str) -> str:
        # Up to the last '@': a password may hold any character.
        user, at, _ = value.partition("://")[2].rpartition("@")
        if at and ":" in user:
            raise ValueError(
                "a password does not belong in a config; a server's stands in "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a database's where its "
                "driver looks for it (PGPASSWORD)"
            )
        return value
