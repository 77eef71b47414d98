"""`evaluate`, and evaluations in the course of a run: by the flows, with Prefect's server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from ddpo.analysis.evaluation.plan import evaluation_set, same_evaluation_set
from ddpo.analysis.history import History
from ddpo.analysis.query import query
from ddpo.basics.images import decode_image
from ddpo.config import EvaluationConfig, NamedConfig
from ddpo.errors import ConfigError, RunNotFound
from ddpo.prompts import Prompt
from ddpo.runs import Run, check_run, open_run, start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EVALUATION, EVALUATION_SHARD
from ddpo.store.objects import Store
from ddpo_workflow.flows import evaluate as flow
from ddpo_workflow.flows.evaluate import evaluate, evaluate_checkpoint
from ddpo_workflow.flows.run_requests import EvaluateRequest
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks.evaluate import sample_evaluation
from ddpo_workflow.tasks.evaluated import metrics_of, summary_id
from tests.night import Place
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

EPOCHS = 3
EVALUATION_PART: dict[str, Any] = {
    "every": 2,
    "count": 2,
    "seeds": [0, 1],
    "steps": 3,
    "rewards": [{"name": f"{__name__}:redness"}],
    "kl_samples": 2,
}
_asked: list[int] = []


def redness(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[float]:
    """Reward = the mean of the red channel."""
    _asked.append(len(images))
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def record(
    model: Path, database: Path, folder: Path, keep: int | None = 2, **changes: Any
) -> Place:
    """Train for three epochs of eight samples, with an average of the weights."""
    shutil.copy(database, folder / "mlflow.db")
    config = tiny_config(
        model,
        prompts={"name": "prompt_list", "parameters": {"prompts": ["a cat", "a dog", "a fox"]}},
        sampler={"steps": 2},
        rollouts={"samples_per_epoch": 8, "shard_size": 4},
        optimizer={"learning_rate": 1e-2, "ema_decay": 0.5},
        storage={"root": str(folder / "store"), "keep_newest_checkpoints": keep},
        tracking={"uri": f"sqlite:///{folder}/mlflow.db"},
        outputs=str(folder / "outputs"),
        epochs=EPOCHS,
        **changes,
    )
    file = folder / "config.yaml"
    file.write_text(config.model_dump_json())
    train(str(file), run_id="r")
    return Place(Store.open(str(folder / "store")), config.tracking.uri)


@pytest.fixture(scope="module")
def places(
    tiny_model: Path, mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Place]:
    """The same run without and with evaluations."""
    _asked.clear()
    folders = {name: tmp_path_factory.mktemp(name) for name in ("without", "with")}
    return {
        "without": record(tiny_model, mlflow_database, folders["without"]),
        "with": record(tiny_model, mlflow_database, folders["with"], evaluation=EVALUATION_PART),
    }


def part(run: Run) -> EvaluationConfig:
    assert run.config.evaluation
    return run.config.evaluation


def test_training_is_the_same_to_the_byte_with_and_without(places: dict[str, Place]) -> None:
    """But for what retention keeps: with evaluations, also the best checkpoint."""
    contents = [
        {
            key: place.store.read(key)
            for key in place.store.list()
            if "evaluations/" not in key and not key.startswith("runs/r/starts")
        }
        for place in (places["without"], places["with"])
    ]
    retired, kept = [
        contents[this].keys() - contents[other].keys() for this, other in ((0, 1), (1, 0))
    ]
    assert all(key.startswith("manifests/retired/checkpoints/") for key in retired)
    assert all(key.startswith("checkpoints/") for key in kept)
    both = contents[0].keys() & contents[1].keys()
    assert len(both) > 50
    assert all(contents[0][key] == contents[1][key] for key in both)


def test_the_first_every_second_and_the_last_checkpoint_are_evaluated_against_the_first(
    places: dict[str, Place],
) -> None:
    run = places["with"].run("r")
    summaries = {epoch: metrics_of(run, part(run), epoch) for epoch in [0, 2, 3]}
    assert [w.epoch for w in EVALUATION.partitions_of(run.store, "r")].count(0) == 1
    assert summaries[0]["kl_to_base"] == 0 and summaries[3]["kl_to_base"] > 0
    assert "redness/gain" not in summaries[0]
    assert summaries[3]["redness/gain"] != 0
    assert summaries[3]["redness/gain"] == pytest.approx(
        summaries[3]["redness/mean"] - summaries[0]["redness/mean"]
    )
    average = evaluation_set(run, part(run), "average")
    name = summary_id(run, part(run), average)
    averaged = EVALUATION.require(run.store, Partition("r", 3, images_id=name)).metrics
    assert averaged["redness/gain"] not in (0, summaries[3]["redness/gain"])


def test_images_are_those_of_inference_settings(places: dict[str, Place]) -> None:
    run = places["with"].run("r")
    images = evaluation_set(run, part(run))
    assert [text for text, _ in images.prompts] == ["a cat", "a fox"] or len(images.prompts) == 2
    assert images.sampler.steps == 3 and not images.sampler.stochastic
    shard = EVALUATION_SHARD.require(run.store, Partition("r", 2, 0, images_id=images.set_id))
    rows = shard.rows()
    assert [row.prompt for row in rows] == [prompt.text for prompt, _ in images.rows]
    assert all(row.log_prob_mean is None for row in rows)  # no step draws noise


def test_its_metrics_are_on_the_runs_page(places: dict[str, Place]) -> None:
    place = places["with"]
    client, page = MlflowClient(place.uri), place.page("r").info.run_id
    for name, steps in (
        ("evaluation/redness/mean", [0, 2, 3]),
        ("evaluation/redness/gain", [2, 3]),
        ("evaluation/images/dark", [0, 2, 3]),
        ("evaluation/diversity", [0, 2, 3]),
        ("evaluation/alarms", [0, 2, 3]),
        ("evaluation_average/redness/mean", [2, 3]),
    ):
        assert [m.step for m in client.get_metric_history(page, name)] == steps, name


def test_nothing_is_sampled_or_asked_twice(places: dict[str, Place]) -> None:
    """By the command with the run's own settings; the first checkpoint is retired since."""
    place = places["with"]
    before = {key: place.store.read(key) for key in place.store.list("evaluations")}
    asked = len(_asked)
    summaries = evaluate("r", storage=place.store.root, epochs="2:")
    assert len(_asked) == asked
    assert {key: place.store.read(key) for key in place.store.list("evaluations")} == before
    run = place.run("r")
    assert summaries[0] == metrics_of(run, part(run), 2)
    (page,) = [
        found
        for found in MlflowClient(place.uri).search_runs(["1"])
        if found.data.tags.get("ddpo.evaluated_run") == "r"
    ]
    assert page.data.tags["mlflow.parentRunId"] == place.page("r").info.run_id


def test_a_run_without_evaluations_is_evaluated_by_the_command(places: dict[str, Place]) -> None:
    place = places["without"]
    summaries = evaluate(
        "r",
        rewards=[f"{__name__}:redness"],
        overrides=["evaluation.count=1", "evaluation.kl_samples=0"],
        storage=place.store.root,
    )
    assert len(summaries) == 2 * 2  # two checkpoints are kept, with two sets of weights
    assert all("kl_to_base" not in summary for summary in summaries)
    assert all("redness/mean" in summary for summary in summaries)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"epochs": "7"}, r"no checkpoint 7; it keeps: 2, 3"),
        ({"epochs": "0"}, r"no checkpoint 0; it keeps: 2, 3"),
        ({"rewards": ("jpeg_compressibility",)}, "listed twice, or is the run's own reward"),
        ({"overrides": ("epochs=3",)}, "is not a setting of the evaluation"),
        ({"overrides": ("evaluation.cuont=3",)}, "did you mean `count`"),
        ({"rewards": ("no_such_reward",)}, "no_such_reward"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    places: dict[str, Place], request_: dict[str, Any], message: str
) -> None:
    request = EvaluateRequest(run_id="r", storage=places["without"].store.root, **request_)
    with pytest.raises(ConfigError, match=message):
        request.plan()


def test_what_a_run_is_evaluated_on_stays_the_same(places: dict[str, Place]) -> None:
    config = places["with"].run("r").config
    assert config.evaluation
    check_run(config.changed(evaluation=config.evaluation.changed(every=1)), "r")
    check_run(config.changed(evaluation=None), "r")
    changed = config.changed(evaluation=config.evaluation.changed(count=3))
    with pytest.raises(ConfigError, match="ddpo evaluate"):
        check_run(changed, "r")
    # A start without evaluations in between does not make it another curve.
    start_run(config.changed(evaluation=None), "r")
    with pytest.raises(ConfigError, match="ddpo evaluate"):
        check_run(changed, "r")
    start_run(config, "r")


def test_evaluations_of_a_run_that_gets_them_late_are_resumed(
    tiny_model: Path, mlflow_database: Path, tmp_path: Path
) -> None:
    """Its earlier checkpoints are evaluated as well, those that are kept, against the first."""
    place = record(tiny_model, mlflow_database, tmp_path, keep=None)
    for epochs in (3, 4, 4):
        train(
            str(tmp_path / "config.yaml"),
            run_id="r",
            epochs=epochs,
            overrides=[f"evaluation={json.dumps({**EVALUATION_PART, 'every': 1})}"],
        )
    run = place.run("r")
    summaries = {epoch: metrics_of(run, part(run), epoch) for epoch in range(5)}
    assert all("redness/gain" in summaries[epoch] for epoch in range(1, 5))


def test_a_resume_evaluates_what_is_not_committed_and_logs_what_the_page_lacks(
    tiny_model: Path,
    mlflow_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every_one = {**EVALUATION_PART, "every": 1}
    place = record(tiny_model, mlflow_database, tmp_path, keep=None, evaluation=every_one)
    began: list[int] = []

    def spy(run: Run, tracking: Any, config: EvaluationConfig, epoch: int) -> Any:
        began.append(epoch)
        return evaluate_checkpoint(run, tracking, config, epoch)

    monkeypatch.setattr(flow, "evaluate_checkpoint", spy)
    shutil.copy(mlflow_database, tmp_path / "other.db")
    other = f"tracking.uri=sqlite:///{tmp_path}/other.db"
    train(str(tmp_path / "config.yaml"), run_id="r", overrides=[other])
    assert began == [2, 3]  # those beside the last epoch and after it, whatever their number
    shown = Place(place.store, f"sqlite:///{tmp_path}/other.db")
    client, page = MlflowClient(shown.uri), shown.page("r").info.run_id
    for name, steps in (
        ("evaluation/redness/mean", [0, 1, 2, 3]),
        ("evaluation_average/redness/mean", [1, 2, 3]),
    ):
        assert [m.step for m in client.get_metric_history(page, name)] == steps, name

    run = place.run("r")
    average = summary_id(run, part(run), evaluation_set(run, part(run), "average"))
    lost = EVALUATION.key(Partition("r", 1, images_id=average))
    before = json.loads(place.store.read(lost))["objects"]
    place.store.delete(lost)
    began.clear()
    train(str(tmp_path / "config.yaml"), run_id="r")
    assert began == [1, 2, 3]
    assert json.loads(place.store.read(lost))["objects"] == before


def test_more_steps_than_the_model_has_are_refused_by_the_evaluations_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    store = {"root": str(tmp_path / "store")}
    config = tiny_config(tiny_model, storage=store, evaluation={"steps": 5000})
    with pytest.raises(ConfigError, match=r"^evaluation: .*5000"):
        check_run(config, "r")


def test_images_of_another_size_leave_the_runs_own_alone(places: dict[str, Place]) -> None:
    place = places["without"]
    overrides = ["evaluation.count=1", "evaluation.kl_samples=0", "evaluation.resolution=[32, 16]"]
    run = place.run("r")
    for given, size in ((overrides, (32, 16)), (overrides[:2], (16, 16))):
        evaluate("r", epochs="3", overrides=given, storage=place.store.root)
        resolution = size if given is overrides else None
        config = EvaluationConfig(count=1, kl_samples=0, resolution=resolution)
        images = evaluation_set(run, config)
        shard = EVALUATION_SHARD.require(run.store, Partition("r", 3, 0, images_id=images.set_id))
        assert {decode_image(row.image_png).size for row in shard.rows()} == {size}
    with pytest.raises(ConfigError, match=r"evaluation: resolution 33x33 is not a multiple"):
        check_run(run.config.changed(evaluation=EvaluationConfig(resolution=33)), "r")


def test_prompts_that_change_under_an_evaluation_are_named(
    places: dict[str, Place], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n")
    run = places["without"].run("r")
    config = EvaluationConfig(prompts=NamedConfig(name="text_file", parameters={"path": str(file)}))
    began = evaluation_set(run, config).digest
    file.write_text("a cat\na dog\n")
    with pytest.raises(ConfigError, match=r"evaluation\.prompts.* were changed"):
        same_evaluation_set(run, config, "trained", began)
    checkpoint = CHECKPOINT.find(run.store, Partition("r", 3))
    assert checkpoint
    with pytest.raises(ConfigError, match=r"evaluation\.prompts.* were changed"):
        sample_evaluation.fn(run.handle, checkpoint, config, "trained", began, 3, 0)


def test_a_prompt_or_a_seed_gives_no_image_twice(places: dict[str, Place]) -> None:
    run = places["without"].run("r")
    repeated = NamedConfig(name="prompt_list", parameters={"prompts": ["a", "b", "a"]})
    images = evaluation_set(run, EvaluationConfig(prompts=repeated))
    assert [text for text, _ in images.prompts] == ["a", "b"]
    with pytest.raises(ValueError, match="a seed appears twice"):
        EvaluationConfig(seeds=(1, 1))


def test_a_run_with_a_judge_that_cannot_be_loaded_takes_no_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    for rewards, message in (
        ([{"name": "no_such_reward"}], "no_such_reward"),
        ([{"name": "jpeg_compressibility"}], "the run's own reward"),
    ):
        config = tiny_config(
            tiny_model,
            storage={"root": str(tmp_path / "store")},
            evaluation={"rewards": rewards},
        )
        with pytest.raises(ConfigError, match=message):
            check_run(config, "r")
    with pytest.raises(RunNotFound):
        open_run(Store.open(str(tmp_path / "store")), "r")


def test_evaluations_are_queried_in_sql(places: dict[str, Place]) -> None:
    run = places["with"].run("r")
    name = summary_id(run, part(run), evaluation_set(run, part(run)))
    sql = (
        'select epoch, count(*), avg(dark), avg("score.redness") from evaluations '
        f"where evaluation = '{name}' group by epoch order by epoch"
    )
    with query(History(run), sql) as answer:
        found = list(answer.rows)
    summaries = {epoch: metrics_of(run, part(run), epoch) for epoch in [0, 2, 3]}
    assert [row[:2] for row in found] == [(0, 4), (2, 4), (3, 4)]
    for epoch, _, dark, redness_ in found:
        assert dark == pytest.approx(summaries[epoch]["images/dark"])
        assert redness_ == pytest.approx(summaries[epoch]["redness/mean"])
