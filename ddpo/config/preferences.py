"""Settings of preference pairs that people made."""

from __future__ import annotations

from ddpo.basics.part import Part


class PreferencesConfig(Part):
    """Preference pairs in Parquet files, which take the place of the run's own samples.

    Each epoch takes the next pairs, in the order of the files' names and rows, and after the last
    one the first again. Their images are scaled and cropped to the model's size, encoded once, and
    saved like samples.
    """

    path: str
    """A Parquet file, or a folder with Parquet files, such as one of Hugging Face datasets."""
    prompt: str = "prompt"
    """The column of prompts."""
    chosen: str = "chosen"
    """The column of preferred images, encoded (PNG, JPEG, ...), as `datasets` stores them."""
    rejected: str = "rejected"
    """The column of the images that they were preferred to."""
