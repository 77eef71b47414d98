"""A prompt is any Unicode text: the same in a file, the store, MLflow, SQL and an export."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient

from ddpo.analysis.hf_dataset import write_dataset
from ddpo.analysis.history import open_history
from ddpo.analysis.query import query
from ddpo.analysis.report import write_report
from ddpo.errors import ConfigError
from ddpo.prompts import Prompt, load_prompts, prompt_set_digest
from ddpo.runs import start_run
from ddpo.store.kinds import ROLLOUTS
from ddpo_workflow.tasks.pictures import picture_set
from ddpo_workflow.tasks.start import start
from ddpo_workflow.tasks.tracking.metrics import image_key
from ddpo_workflow.tasks.tracking.page import open_page
from tests.fold import as_in_a_new_process, run_epoch
from tests.tiny import tiny_config

TEXTS = st.text(min_size=1, max_size=60).filter(str.strip)
LINES = st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=60)
LINE_ENDS = "a cat\u2028and\u2029a\x85dog\x0b\x0c\x1c\x1d\x1eb"
HOSTILE = (
    LINE_ENDS,
    "[/x] [bold]$x_{$ `a` <b> {{ c }} \\ 'q' \"r\" ; drop table samples; --",
    "猫が自転車に乗る",
    "кошка на велосипеде",
    "a\u0301 á \U0001f408\u200d\u2b1b \u202eright to left",
    "a\rb\tc\nd\x00\x1b[31me\ufeff",
    "word " * 90,
)


def read(file: Path) -> list[str]:
    return [prompt.text for prompt in load_prompts("text_file", {"path": str(file)})]


@settings(deadline=None)
@given(st.lists(LINES.filter(str.strip), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_lines_of_a_text_file_end_with_lf_or_crlf_alone(lines: list[str], end: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.txt"
        file.write_bytes(("\ufeff" + "".join(line + end for line in lines)).encode())
        assert read(file) == [line.strip(" \t\r") for line in lines]


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5), st.sampled_from(["jsonl", "ndjson", "JSONL"]))
def test_lines_of_a_json_file_hold_any_text(texts: list[str], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"prompts.{kind}"
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        file.write_bytes("\n".join(rows).encode())
        assert read(file) == texts


def test_separators_that_end_no_line_are_kept(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{LINE_ENDS}\na dog\n", encoding="utf-8")
    assert read(tmp_path / "prompts.txt") == [LINE_ENDS, "a dog"]


@pytest.mark.parametrize("kind", ["json", "csv", "tsv", "parquet", "yaml", "CSV"])
def test_a_file_whose_lines_are_not_prompts_is_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"prompts.{kind}"
    file.write_text('["a cat", "a dog"]\n')
    with pytest.raises(ConfigError, match=r"with one prompt per line, or a \.jsonl file"):
        read(file)


@pytest.mark.parametrize("text", ["a \ud800 b", "\udcff"])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not Unicode text"):
        Prompt(text)
    with pytest.raises(ConfigError):
        Prompt("a cat", {"note": text})


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_texts_that_differ_are_another_set_and_another_name_in_mlflow(one: str, other: str) -> None:
    if one != other:
        assert prompt_set_digest([Prompt(one)]) != prompt_set_digest([Prompt(other)])
        assert image_key(one, 0) != image_key(other, 0)


@pytest.mark.slow
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(TEXTS, min_size=1, max_size=8, unique=True))
def test_any_text_goes_through_a_whole_epoch(texts: list[str], tiny_model: Path) -> None:
    check_epoch(texts, tiny_model)


@pytest.mark.slow
def test_hostile_texts_go_through_a_whole_epoch(tiny_model: Path) -> None:
    check_epoch(list(HOSTILE), tiny_model)


def check_epoch(texts: list[str], model: Path) -> None:
    """Sample, score and train on prompts; then read them wherever they are shown."""
    as_in_a_new_process()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = f"sqlite:///{folder}/mlflow.db"
        config = tiny_config(
            model,
            prompts={"name": "prompt_list", "parameters": {"prompts": texts}},
            sampler={"steps": 2},
            rollouts={"samples_per_epoch": 8, "shard_size": 4},
            storage={"root": str(folder / "store")},
            tracking={
                "uri": uri,
                "system_metrics": False,
                "pictures": {"prompts": texts, "seeds": [0]},
            },
        )
        run = start_run(config, "texts")
        with open_page(run) as page:
            run_epoch(run, start.fn(run.handle), 0, page.handle)
            client = MlflowClient(uri)
            grid = [file.path for file in client.list_artifacts(page.mlflow_run_id, "images")]
            assert len(grid) >= len(texts)
        drawn = [
            row.prompt
            for where in ROLLOUTS.partitions_of(run.store, "texts")
            for row in ROLLOUTS.require(run.store, where).rows()
        ]
        assert len(drawn) == 8 and set(drawn) <= set(texts)

        history = open_history(run.store.root, "texts")
        assert history.samples().column("prompt").to_pylist() == drawn
        with query(history, "select prompt from samples order by sample_id") as answer:
            assert [row[0] for row in answer.rows] == drawn
        pictures = picture_set(run, config.tracking.pictures).pictures_id
        assert write_report(run, pictures, folder / "report.png").stat().st_size
        write_dataset(history, folder / "exported")
        exported = datasets.load_dataset(
            str(folder / "exported"), split="train", cache_dir=str(folder / "cache")
        )
        assert exported["prompt"][:] == drawn
