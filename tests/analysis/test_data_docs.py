"""Every snippet of docs/data.md, run against a real run and compared with our own reader."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from ddpo.analysis.history import History, open_history
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.flows.fork import fork
from ddpo_workflow.flows.rescore import rescore
from tests.recorded import folder_of, record_run

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SNIPPETS = [
    (re.findall(r"^##+ (.+)$", PAGE[: match.start()], re.MULTILINE)[-1], match[1], match[2])
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
]
"""Heading, language and text of each snippet."""


@pytest.fixture(scope="module")
def store(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store with a run that was rescored with another reward, and forked with its own."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copy(mlflow_database, folder / "mlflow.db")
    shown = {
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "system_metrics": False},
        "outputs": str(folder / "outputs"),
    }
    run = record_run(tiny_model, folder / "store", **shown)
    rescore("mine", "colorfulness", storage=run.store.root)
    fork("mine", 1, fork_id="forked", epochs=3, storage=run.store.root)
    return folder_of(run)


@pytest.fixture
def history(store: Path) -> History:
    return open_history(store, "mine")


@pytest.fixture
def read(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the snippets under a heading in order; return the names that they define."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DDPO_ROOT", str(store))

    def run(heading: str, at: Path = store) -> dict[str, Any]:
        names: dict[str, Any] = {}
        texts = [(language, text) for under, language, text in SNIPPETS if under == heading]
        assert texts
        for language, text in texts:
            if language == "python":
                exec(text.replace("ddpo-data/store", str(at)), names)
                continue
            for line in text.splitlines():
                monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
                with pytest.raises(SystemExit) as ended:
                    cli.main()
                assert not ended.value.code
        return names

    return run


def test_every_snippet_is_under_a_tested_heading():
    assert {heading for heading, language, _ in SNIPPETS if language != "text"} == {
        "In a notebook", "In SQL", "As a Hugging Face dataset", "DuckDB", "Polars",
        "Hugging Face datasets", "pyarrow", "Committed objects only",
    }  # fmt: skip
    assert {language for _, language, _ in SNIPPETS} == {"text", "bash", "python"}


def test_the_layout_is_that_of_a_store(store: Path):
    (layout,) = [text for heading, _, text in SNIPPETS if heading == "Layout"]
    for line in layout.splitlines():
        pattern = re.sub(r"<\w+>|\bNAME\b", "*", line.split()[0]).replace("run_id=R", "run_id=mine")
        assert list(store.glob(re.sub(r"0000\d", "00001", pattern))), line


def test_the_notebook(read, history: History):
    names = read("In a notebook")
    rows = history.samples().to_pylist()
    assert names["best"] == max(rows, key=lambda row: row["reward"])["sample_id"]
    assert names["image"].tobytes() == history.image(names["best"]).tobytes()
    assert torch.equal(names["latents"], history.latents(names["best"]))
    assert torch.equal(names["log_probs"], history.log_probs(names["best"]))
    assert names["prompts"]["prompt"].to_pylist() == [row["prompt"] for row in rows]


def test_sql(read, history: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    read("In SQL")
    screen = capsys.readouterr().out
    assert all(row["prompt"] in screen for row in history.samples().to_pylist())
    assert len((tmp_path / "rewards.csv").read_text().splitlines()) == 1 + 2 * 2


def test_the_export(read, history: History):
    names = read("As a Hugging Face dataset")
    wanted = history.samples().to_pylist()
    assert [row["reward"] for row in names["samples"]] == [row["reward"] for row in wanted]
    assert names["first"].tobytes() == history.image(wanted[0]["sample_id"]).tobytes()


def test_duckdb(read, history: History):
    by_prompt = defaultdict(list)
    for row in history.samples().to_pylist():
        by_prompt[row["prompt"]].append(row["reward"])
    assert read("DuckDB")["by_prompt"] == [
        (prompt, pytest.approx(sum(rewards) / len(rewards)))
        for prompt, rewards in sorted(by_prompt.items())
    ]


def test_polars(read, history: History):
    rows = read("Polars")["strongest"].to_dicts()
    wanted = {row["sample_id"]: row for row in history.samples().to_pylist()}
    assert len(rows) == len(wanted)
    for row in rows:
        assert row == {name: wanted[row["sample_id"]][name] for name in row}
    advantages = [row["advantage"] for row in rows]
    assert advantages == sorted(advantages, reverse=True)


def test_hugging_face_datasets(read, history: History):
    names = read("Hugging Face datasets")
    ids = history.samples()["sample_id"].to_pylist()
    assert names["samples"]["sample_id"][:] == ids
    assert names["first"].tobytes() == history.image(ids[0]).tobytes()


def test_pyarrow_and_what_a_glob_sees_beside_the_committed(read, store: Path, tmp_path: Path):
    copied = Path(shutil.copytree(store, tmp_path / "store"))
    for tree in ("rollouts", "samples"):
        shard = sorted(copied.glob(f"{tree}/run_id=mine/epoch=00000/*"))[0]
        shutil.copy(shard, shard.with_name("shard-00000-0123456789ab.parquet"))
    history = open_history(copied, "mine")
    rows = history.samples().select(["sample_id", "epoch", "prompt"]).to_pylist()
    assert read("pyarrow")["table"].to_pylist() == rows
    assert len(read("pyarrow", copied)["table"]) == len(rows) + 2
    table = read("Committed objects only", copied)["table"]
    assert table["sample_id"].to_pylist() == [row["sample_id"] for row in rows]
    assert set(table["epoch"].to_pylist()) == {0, 1}
