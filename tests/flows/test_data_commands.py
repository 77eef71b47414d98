"""`ddpo query` and `ddpo export`, as a user types them."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from ddpo.analysis.history import History, open_history
from ddpo.analysis.query import TABLES
from ddpo.analysis.query import query as ask
from ddpo.errors import QueryError
from ddpo.runs import Run
from ddpo.store.upkeep.epoch_retention import retire_epochs
from ddpo_workflow.flows.cli import app as cli
from tests.recorded import SAMPLES, folder_of, record_run, score_again

TWO_EPOCHS = [["0", "4"], ["1", "4"]]


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody changes."""
    run = record_run(tiny_model, tmp_path_factory.mktemp("recorded") / "store")
    score_again(run, "colorfulness")
    return run


@pytest.fixture(scope="module")
def history(recorded: Run) -> History:
    return open_history(recorded.store.root, "mine")


@pytest.fixture
def copied(recorded: Run, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return Path(shutil.copytree(folder_of(recorded), tmp_path / "store"))


@pytest.fixture
def ddpo(recorded: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process; gives exit status and what the screen showed."""
    monkeypatch.setenv("DDPO_ROOT", recorded.store.root)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().out

    return run


def cells(screen: str) -> list[list[str]]:
    """Return the rows of the table on a screen."""
    lines = [line for line in screen.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def opened(folder: Path, tmp_path: Path) -> datasets.Dataset:
    """Open a dataset as its user does, with a cache of this test's own."""
    return datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))


def test_a_query_groups_samples_as_arithmetic_does(ddpo, history: History):
    status, screen = ddpo(
        "query", "mine",
        "select prompt, avg(reward) as mean, count(*) n from samples group by 1 order by 1",
    )  # fmt: skip
    assert status == 0
    by_prompt = defaultdict(list)
    for row in history.samples().to_pylist():
        by_prompt[row["prompt"]].append(row["reward"])
    assert cells(screen) == [
        [prompt, f"{sum(found) / len(found):.6g}", str(len(found))]
        for prompt, found in sorted(by_prompt.items())
    ]


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("select count(*) from rollouts", [["8"]]),
        ("select epoch, count(image.bytes) from rollouts group by 1 order by 1", TWO_EPOCHS),
        ("select count(distinct reward_name), count(*) from rewards", [["2", "16"]]),
        ("select run_id, count(*) from advantages group by 1", [["mine", "8"]]),
        ("SELECT count(*) FROM Samples WHERE advantage IS NULL", [["0"]]),
        ("select null as a, '[bold]x' as b, 1/3 as c", [["", "[bold]x", "0.333333"]]),
        (
            "select count(*) from samples join rollouts using (sample_id) where "
            "samples.prompt = rollouts.prompt",
            [["8"]],
        ),
    ],
)  # fmt: skip
def test_the_tables_are_the_runs_own(ddpo, sql: str, expected: list[list[str]]):
    status, screen = ddpo("query", "mine", sql)
    assert (status, cells(screen)) == (0, expected)


def test_pictures_are_shown_by_their_size(ddpo, history: History):
    status, screen = ddpo("query", "mine", "select image from rollouts order by sample_id limit 1")
    data = history.rollouts().to_table()["image"][0].as_py()["bytes"]
    assert status == 0
    assert cells(screen) == [[f"bytes: <{len(data)} bytes>, path: 000000.png"]]


def test_a_long_answer_is_cut_and_says_where_all_of_it_is(ddpo, tmp_path: Path):
    sql = "select i, i / 3 as third, 'a,b' as t from range(1000) r(i)"
    status, screen = ddpo("query", "mine", sql)
    assert status == 0
    assert len(cells(screen)) == 200
    assert "the first 200 rows; --csv FILE writes all" in screen
    file = tmp_path / "all.csv"
    status, screen = ddpo("query", "mine", sql, "--csv", file)
    assert status == 0 and "1000 rows" in screen
    with file.open(newline="") as read:
        rows = list(csv.reader(read))
    assert rows[0] == ["i", "third", "t"]
    assert [(int(i), float(third), t) for i, third, t in rows[1:]] == [
        (i, i / 3, "a,b") for i in range(1000)
    ]


def test_a_file_has_numbers_in_full_inside_of_lists_too(ddpo, tmp_path: Path):
    file = tmp_path / "all.csv"
    sql = "select [i / 3.0, i / 7] as l, {'a': i / 3} as s from range(1, 2) t(i)"
    assert ddpo("query", "mine", sql, "--csv", file)[0] == 0
    with file.open(newline="") as read:
        (_, row) = csv.reader(read)
    assert row == [f"{1 / 3}, {1 / 7}", f"a: {1 / 3}"]


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("selec 1", "syntax error"),
        ("select * from sample", "Tables: samples, rollouts, rewards, advantages, evaluations"),
        ("select no_such from samples", "no_such"),
        ("select cast('x' as int)", "Could not convert"),
        ("select 1; select 2", "one statement"),
        ("", "one statement"),
    ],
)
def test_bad_sql_is_one_message(ddpo, sql: str, told: str):
    status, screen = ddpo("query", "mine", sql)
    assert status == 2
    assert screen.startswith("QueryError")
    assert told in " ".join(screen.split())
    assert "Traceback" not in screen


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("select * from read_text('{file}')", "Cannot access file"),
        ("select * from '{file}'", "Cannot access file"),
        ("from read_csv('http://127.0.0.1:9/x.csv')", "Cannot access file"),
        ("from glob('{folder}/*')", "Cannot access file"),
        ("copy (select 1) to '{folder}/written.csv'", "Cannot access file"),
        ("attach '{folder}/written.db'", "Cannot access file"),
        ("export database '{folder}/written'", "Cannot access"),
        ("install httpfs", "disabled by configuration"),
        ("load httpfs", "disabled through configuration"),
        ("set enable_external_access = true", "has been locked"),
        ("set temp_directory = '{folder}'", "locked|disabled by configuration"),
        ("select * from secret", "secret does not exist"),
    ],
)
def test_a_query_reaches_no_file_no_net_and_no_variable(
    history: History, tmp_path: Path, sql: str, told: str
):
    secret = history.samples()  # in this frame, where DuckDB would find it
    assert len(secret)
    file = tmp_path / "secret.csv"
    file.write_text("a\n1\n")
    asked = sql.format(file=file, folder=tmp_path)
    with pytest.raises(QueryError, match=told), ask(history, asked) as answer:
        list(answer.rows)
    assert list(tmp_path.iterdir()) == [file]


def test_a_query_reads_only_the_tables_that_it_names(copied: Path):
    shutil.rmtree(copied / "rollouts")
    shutil.rmtree(copied / "advantages")
    with ask(open_history(copied, "mine"), "select count(*) from rewards") as answer:
        assert list(answer.rows) == [(16,)]


# The history has no evaluations.
@pytest.mark.parametrize("table", [table for table in TABLES if table != "evaluations"])
def test_damage_under_a_query_is_the_stores_own_error(ddpo, copied: Path, table: str):
    file = next(iter(sorted(copied.glob(f"{table}/**/epoch=00001/*"))))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    status, screen = ddpo("query", "mine", f"select * from {table}", "--root", copied)
    assert status == 2
    assert screen.startswith("CorruptObject")
    assert file.name in screen and "Traceback" not in screen


def test_a_missing_package_is_told_with_the_way_to_it(ddpo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    status, screen = ddpo("query", "mine", "select 1")
    assert status == 2
    assert "pip install -e '.[data]'" in screen


def test_an_export_opens_with_pictures_and_scores(ddpo, history: History, tmp_path: Path):
    folder = tmp_path / "made" / "dataset"
    status, screen = ddpo("export", "mine", "--to-hf-dataset", folder)
    assert (status, screen.split()[-2:]) == (0, ["8", "samples"])
    found = opened(folder, tmp_path)
    expected = history.samples()
    assert found.column_names == [
        "sample_id", "image", "epoch", "prompt", "seed", "reward", "status", "advantage", "jpeg_kb",
    ]  # fmt: skip
    for row, wanted in zip(found, expected.to_pylist(), strict=True):
        picture = row.pop("image")
        assert picture.tobytes() == history.image(wanted["sample_id"]).tobytes()
        assert row == wanted
    assert len(list(folder.glob("data/*.parquet"))) == 4  # a file a shard
    assert [path.name for path in folder.parent.iterdir()] == ["dataset"]


def test_an_export_of_some_epochs_and_another_reward(ddpo, history: History, tmp_path: Path):
    folder = tmp_path / "dataset"
    folder.mkdir()  # an empty one will do
    status, _ = ddpo(
        "export", "mine", "--to-hf-dataset", folder, "--epochs", "1:", "--reward", "colorfulness"
    )
    assert status == 0
    found = opened(folder, tmp_path)
    assert set(found["epoch"]) == {1}
    assert list(found["reward"]) == history.samples("colorfulness", [1])["reward"].to_pylist()
    assert set(found["advantage"]) == {None}


def test_the_card_says_what_it_is(ddpo, recorded: Run, history: History, tmp_path: Path):
    folder = tmp_path / "dataset"
    ddpo("export", "mine", "--to-hf-dataset", folder)
    card = (folder / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["configs"][0]["data_files"] == [
        {"split": "train", "path": "data/*.parquet"}
    ]
    rollouts = history.rollouts().to_table(columns=["policy_digest", "sampler_digest", "epoch"])
    first = rollouts.to_pylist()[0]
    rewards = history.samples(epochs=[0])["reward"].to_pylist()
    own = recorded.reward.identity
    mean = f"{sum(rewards) / len(rewards):.4g}"
    for line in (
        "| run | `mine` |",
        f"| model | `{Path(recorded.config.model.path).name}` |",
        f"| reward | `{history.reward_id}` (higher is better) |",
        f"| the run's own reward | `{own.reward_id}`, sha256 `{own.digest}` |",
        f"| sampler digest | `{first['sampler_digest']}` |",
        f"| 0 | {SAMPLES} | {mean} | `{first['policy_digest'][:12]}` |",
    ):  # fmt: skip
        assert line in body
    assert str(Path(recorded.config.model.path).parent) not in card


def test_a_sample_without_a_reward_is_exported_as_such(ddpo, recorded: Run, copied: Path, tmp_path):
    from ddpo.runs import open_run as open_stored
    from ddpo.store.objects import Store

    run = open_stored(Store.open(str(copied)), "mine")
    for file in copied.glob("manifests/rewards/reward_name=colorf*/**/*.json"):
        file.unlink()
    score_again(run, "tests.recorded:first_fails")
    folder = tmp_path / "dataset"
    status, _ = ddpo(
        "export", "mine", "--to-hf-dataset", folder, "--root", copied,
        "--reward", "tests.recorded:first_fails",
    )  # fmt: skip
    assert status == 0
    rows = [
        row for file in sorted(folder.glob("data/*")) for row in pq.read_table(file).to_pylist()
    ]
    assert [row["reward"] for row in rows] == [None, 1.0] * 4
    assert rows[0]["status"] != "ok" and rows[1]["status"] == "ok"
    assert "| 0 | 4 | 1 |" in (folder / "README.md").read_text()


def test_a_scorers_own_image_gives_way_to_the_picture(
    ddpo, history: History, copied: Path, tmp_path: Path
):
    score_again(open_history(copied, "mine").run, "tests.recorded:describes_the_image")
    folder = tmp_path / "dataset"
    words = ("--root", copied, "--reward", "tests.recorded:describes_the_image")
    assert ddpo("export", "mine", "--to-hf-dataset", folder, *words)[0] == 0
    found = opened(folder, tmp_path)
    assert found.column_names[-1] == "reward.image"
    assert set(found["reward.image"]) == {"a picture"}
    first = history.samples()["sample_id"][0].as_py()
    assert found[0]["image"].tobytes() == history.image(first).tobytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["query", "mind", "select 1"], "Did you mean mine?"),
        (["export", "mind", "--to-hf-dataset", "OUT"], "Did you mean mine?"),
        (["export", "mine", "--to-hf-dataset", "FULL"], "is not an empty folder"),
        (["export", "mine", "--to-hf-dataset", "FULL/file"], "is not an empty folder"),
        (["export", "mine", "--to-hf-dataset", "FULL/file/x"], "cannot write"),
        (["export", "mine", "--to-hf-dataset", "OUT", "--epochs", "2:"], "Committed epochs: 0-1"),
        (["export", "mine", "--to-hf-dataset", "OUT", "--epochs", "2"], "Committed epochs: 0-1"),
        (["export", "mine", "--to-hf-dataset", "OUT", "--epochs", "-1:2"], "nor a range a:b"),
        (["export", "mine", "--to-hf-dataset", "OUT", "--reward", "beauty"], "colorfulness-"),
        (["query", "mine", "select 1", "--csv", "FULL/file/x"], "cannot be written"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:4]),
)
def test_bad_input_is_one_message_and_writes_nothing(ddpo, tmp_path: Path, words, told: str):
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    names = {"OUT": tmp_path / "out", "FULL": full}
    given = [
        str(names[w.partition("/")[0]]) + w[len(w.partition("/")[0]) :]
        if w.partition("/")[0] in names
        else w
        for w in words
    ]
    status, screen = ddpo(*given)
    assert status == 2
    assert told in " ".join(screen.split())
    assert "Traceback" not in screen
    assert os.listdir(tmp_path) == ["full"] and os.listdir(full) == ["file"]  # noqa: PTH208


def test_a_failed_export_leaves_nothing(ddpo, copied: Path, tmp_path: Path):
    file = sorted(copied.glob("rollouts/**/epoch=00001/*"))[1]
    history = open_history(copied, "mine")
    samples = history.samples()
    file.unlink()  # once the scores are read, so that some shards are written before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpo.analysis.history.History.samples", lambda *_: samples)
        status, screen = ddpo(
            "export", "mine", "--to-hf-dataset", tmp_path / "made" / "out", "--root", copied
        )
    assert status == 2
    assert screen.startswith("MissingObject")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_retired_epoch_is_left_out_or_refused_when_asked_for(
    ddpo, copied: Path, tmp_path, caplog
):
    retire_epochs(open_history(copied, "mine").run.store, "mine", keep="checkpoints", older_than=1)
    status, screen = ddpo("query", "mine", "select count(*) from samples", "--root", copied)
    assert (status, cells(screen)) == (0, [[str(SAMPLES)]])
    assert "samples of 1 of 2 epochs (0) were retired" in caplog.text
    words = ("export", "mine", "--to-hf-dataset", tmp_path / "out", "--root", copied)
    status, screen = ddpo(*words, "--epochs", "0:1")
    assert status == 2 and screen.startswith("RetiredObject")
    assert not (tmp_path / "out").exists()
    status, _ = ddpo(*words)
    assert (status, len(opened(tmp_path / "out", tmp_path))) == (0, SAMPLES)
