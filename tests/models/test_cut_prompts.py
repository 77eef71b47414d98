"""Prompts that are longer than the text encoder reads are counted, once a run starts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ddpo.runs import start_run
from ddpo_workflow.tasks.start import start
from tests.fold import as_in_a_new_process
from tests.tiny import tiny_config

LONG = "cat " * 100


def warnings_of_start(
    model: Path, root: Path, caplog: pytest.LogCaptureFixture, prompts: list[str]
) -> list[str]:
    as_in_a_new_process()
    config = tiny_config(
        model,
        prompts={"name": "prompt_list", "parameters": {"prompts": prompts}},
        storage={"root": str(root)},
        tracking={"pictures": {"prompts": ["a fox", LONG + "dog"]}} if len(prompts) > 1 else {},
    )
    run = start_run(config, "cut")
    with caplog.at_level(logging.WARNING, "ddpo"):
        start.fn(run.handle)
    return [record.getMessage() for record in caplog.records if record.name.startswith("ddpo")]


def test_prompts_that_are_cut_are_counted_at_the_start(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (told,) = warnings_of_start(tiny_model, tmp_path, caplog, ["a cat", LONG, "a dog", LONG])
    assert told.startswith("2 of 5 prompts are longer than the")
    assert LONG in told


def test_nothing_is_said_where_all_prompts_are_read(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of_start(tiny_model, tmp_path, caplog, ["a cat"]) == []
