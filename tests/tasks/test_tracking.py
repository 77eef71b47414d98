"""What a run promises to show in MLflow, against a real SQLite store."""

import json
import re
import shutil
import socket
import time
from pathlib import Path

import mlflow.diffusers
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.exceptions import BAD_REQUEST, MlflowException
from mlflow.tracking import MlflowClient

from ddpo.errors import ConfigError
from ddpo_workflow.flows.cli.ui import serve_pages
from ddpo_workflow.tasks.tracking.metrics import image_key, legend
from ddpo_workflow.tasks.tracking.tracker import RunTracker, TrackingError
from tests.configs import parse

# A lone surrogate is no text that could be stored.
PROMPT_CHARACTERS = st.characters(exclude_categories=["Cs"])


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to create."""
    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    (tmp_path / "tracking").mkdir()
    shutil.copy(empty_database, tmp_path / "tracking")
    return f"sqlite:///{tmp_path}/tracking/mlflow.db"


def open_tracker(uri: str, run_id: str = "night-1", **changes) -> RunTracker:
    settings = {"experiment": "ddpo", "params": {"seed": 7}, "tags": {"engine": "local"}}
    settings |= {"uid": "1a2b"}
    return RunTracker.open(tracking_uri=uri, run_id=run_id, **{**settings, **changes})


def history(uri: str, tracker: RunTracker, key: str) -> list[tuple[int, float]]:
    found = MlflowClient(uri).get_metric_history(tracker.mlflow_run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def picture(shade: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (16, 16), (shade, 0, 0))


@pytest.fixture
def lora_file(tmp_path: Path) -> Path:
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    safetensors.numpy.save_file({"unet.x.lora_A.weight": np.ones((4, 8), np.float32)}, file)
    return file


def test_a_resumed_run_continues_its_mlflow_run(uri: str):
    first = open_tracker(uri)
    first.finish("FAILED")
    second = open_tracker(uri)
    other = open_tracker(uri, run_id="night-2")
    run = MlflowClient(uri).get_run(first.mlflow_run_id)
    assert second.mlflow_run_id == first.mlflow_run_id != other.mlflow_run_id
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "night-1"
    assert run.data.tags["ddpo.run_id"] == "night-1"


def test_another_run_of_the_same_name_has_a_page_of_its_own(uri: str):
    first = open_tracker(uri)
    first.log_metrics({"reward/mean": 1.0}, 0)
    other = open_tracker(uri, uid="3c4d")
    other.log_metrics({"reward/mean": 2.0}, 0)
    assert history(uri, first, "reward/mean") == [(0, 1.0)]
    assert history(uri, other, "reward/mean") == [(0, 2.0)]
    assert open_tracker(uri).mlflow_run_id == first.mlflow_run_id


def test_a_page_is_nested_below_one_that_is_found_by_tags_with_quotes(uri: str):
    root = "file:///data/o'brien"
    open_tracker(uri, uid="3c4d", tags={"ddpo.storage_root": "file:///data/others"})
    above = open_tracker(uri, uid="5e6f", tags={"ddpo.storage_root": root})
    parent = {"ddpo.run_id": "night-1", "ddpo.storage_root": root}
    below = open_tracker(uri, run_id="night-2", parent=parent)
    tags = MlflowClient(uri).get_run(below.mlflow_run_id).data.tags
    assert tags["mlflow.parentRunId"] == above.mlflow_run_id


def test_a_parameter_keeps_its_first_value_and_a_tag_takes_the_newest(uri: str):
    open_tracker(uri)
    tracker = open_tracker(uri, params={"seed": 8, "lr": 1e-4}, tags={"engine": "ray"})
    run = MlflowClient(uri).get_run(tracker.mlflow_run_id)
    assert run.data.params == {"seed": "7", "lr": "0.0001"}
    assert run.data.tags["engine"] == "ray"


def test_more_than_a_batch_of_params_and_a_long_one_are_logged(uri: str):
    long = "a cat, " * 2000
    params = {f"p{i}": i for i in range(250)} | {"prompts": long}
    tracker = open_tracker(uri, params=params)
    client = MlflowClient(uri)
    logged = client.get_run(tracker.mlflow_run_id).data.params
    assert len(logged) == 251
    assert len(logged["prompts"]) <= 500
    attached = client.download_artifacts(tracker.mlflow_run_id, "parameters/prompts.txt")
    assert Path(attached).read_text() == long


def test_no_secret_is_logged(uri: str, tmp_path: Path):
    tracker = open_tracker(
        uri,
        params={"s3.secret_key": "hunter1", "judge_token": "hunter2", "max_tokens": 5},
        tags={"endpoint": "https://me:hunter3@host/x?X-Amz-Signature=hunter4"},
    )
    tracker.log_dataset(
        name="rollouts",
        context="rollouts",
        digest="ab" * 32,
        source={"uri": "s3://id:hunter5@bucket/rollouts?sig=hunter6"},
    )
    database = (tmp_path / "tracking" / "mlflow.db").read_bytes()
    assert b"hunter" not in database
    run = MlflowClient(uri).get_run(tracker.mlflow_run_id)
    assert run.data.params["max_tokens"] == "5"
    assert run.data.tags["endpoint"] == "https://***@host/x"


def test_a_metric_of_a_step_is_logged_once_across_a_resume(uri: str):
    tracker = open_tracker(uri)
    for step in range(3):
        tracker.log_metrics({"reward/mean": step}, step)
    resumed = open_tracker(uri)
    for step in range(1, 4):  # the resumed run goes over steps 1 and 2 again
        resumed.log_metrics({"reward/mean": step + 100, "update/loss": step}, step)
    assert history(uri, resumed, "reward/mean") == [(0, 0), (1, 1), (2, 2), (3, 103)]
    assert history(uri, resumed, "update/loss") == [(1, 1), (2, 2), (3, 3)]


def test_a_step_that_was_left_out_can_be_logged_later(uri: str):
    tracker = open_tracker(uri)
    tracker.log_metrics({"reward/mean": 5.0}, 5)
    tracker.log_metrics({"reward/mean": 4.0}, 4)
    tracker.log_metrics({"reward/mean": 9.0}, 4)
    assert history(uri, tracker, "reward/mean") == [(4, 4.0), (5, 5.0)]


def test_pictures_have_steps_and_are_logged_once_a_step(uri: str):
    tracker = open_tracker(uri)
    for step in range(2):
        tracker.log_image("samples/a_cat", picture(step), step)
    resumed = open_tracker(uri)
    for step in range(3):
        resumed.log_image("samples/a_cat", picture(step), step)
    files = MlflowClient(uri).list_artifacts(tracker.mlflow_run_id, "images")
    steps = sorted(
        (int(Path(file.path).name.split("+")[2]), Path(file.path).suffix) for file in files
    )
    assert steps == [(step, kind) for step in range(3) for kind in (".png", ".webp")]


@given(
    prompts=st.lists(st.text(PROMPT_CHARACTERS), unique=True, max_size=8),
    seed=st.integers(0, 2**63),
)
@example(["一只猫", "一只狗", "кот", "пёс", "🐈", "", " "], 0)
@example(["a cat", "a_cat", "a  cat", "a cat ", "a/cat", "a:cat"], 1)
@example(["a very long prompt " * 4 + "of a cat", "a very long prompt " * 4 + "of a dog"], 2)
def test_every_prompt_has_a_name_of_its_own_in_the_grid(prompts: list[str], seed: int):
    keys = [image_key(prompt, seed) for prompt in prompts]
    assert len(set(keys)) == len(prompts)
    assert all(re.fullmatch(r"[a-zA-Z0-9_\-./ ]{1,150}", key) for key in keys)
    lines = legend(dict(zip(keys, prompts, strict=True))).split("\n")[:-1]
    shown = dict(line.split(": ", 1) for line in lines)
    assert [json.loads(shown[key]) for key in keys] == prompts


def test_plain_prompts_are_their_own_names():
    assert image_key("a cat, on a mat", 3).startswith("samples/a_cat_on_a_mat-")
    assert image_key("two cats", 3) == "samples/two_cats-seed-3"


def test_images_of_prompts_in_any_script_are_all_shown(uri: str):
    tracker = open_tracker(uri)
    for prompt in ("一只猫", "一只狗", "кот"):
        tracker.log_image(image_key(prompt, 0), picture(1), 0)
    files = MlflowClient(uri).list_artifacts(tracker.mlflow_run_id, "images")
    assert len({Path(file.path).name.partition("+")[0] for file in files}) == 3


def test_a_picture_that_a_kill_cut_in_half_is_completed(uri: str):
    tracker = open_tracker(uri)
    tracker.log_image("samples/a_cat", picture(1), 0)
    client = MlflowClient(uri)
    root = Path(client.get_run(tracker.mlflow_run_id).info.artifact_uri.removeprefix("file://"))
    (shown,) = (root / "images").glob("*.webp")
    shown.unlink()
    open_tracker(uri).log_image("samples/a_cat", picture(1), 0)
    assert shown.exists()
    assert len(list((root / "images").iterdir())) == 2


def test_rollouts_are_a_dataset_of_the_run_once(uri: str):
    for _ in range(2):
        open_tracker(uri).log_dataset(
            name="rollouts-epoch-00000",
            context="rollouts",
            digest="ab" * 32,
            source={"uri": "s3://bucket/rollouts/run_id=night-1/epoch=00000"},
            rows=64,
        )
    run = MlflowClient(uri).get_run(open_tracker(uri).mlflow_run_id)
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.name == "rollouts-epoch-00000"
    assert json.loads(entry.dataset.profile) == {"num_rows": 64}
    assert json.loads(entry.dataset.source) == {
        "uri": "s3://bucket/rollouts/run_id=night-1/epoch=00000"
    }
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "rollouts"}


def test_an_adapter_is_a_ready_model_of_the_run_once_a_step(uri: str, lora_file: Path):
    tracker = open_tracker(uri)
    tracker.log_metrics({"reward/mean": 0.5}, 3)
    settings = {"base_model": "org/model", "name": "adapter", "metadata": {"rank": 4}}
    logged = tracker.log_adapter(lora_file, step=3, base_model_revision="abc", **settings)
    again = open_tracker(uri).log_adapter(lora_file.parent, step=3, **settings)
    later = tracker.log_adapter(lora_file, step=4, **settings)
    assert logged == again != later
    client = MlflowClient(uri)
    model = client.get_logged_model(logged.removeprefix("models:/"))
    assert str(model.status) == "READY"
    assert model.source_run_id == tracker.mlflow_run_id
    assert model.params["base_model"] == "org/model"
    assert [(metric.key, metric.value) for metric in model.metrics] == [("reward/mean", 0.5)]
    outputs = client.get_run(tracker.mlflow_run_id).outputs.model_outputs
    assert sorted(output.step for output in outputs) == [3, 4]
    assert history(uri, tracker, "reward/mean") == [(3, 0.5)]


def test_an_adapter_that_a_kill_left_pending_is_completed(
    uri: str, lora_file: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"base_model": "org/model", "name": "adapter", "step": 1}

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", die)
        with pytest.raises(KeyboardInterrupt):
            open_tracker(uri).log_adapter(lora_file, **settings)
    model = open_tracker(uri).log_adapter(lora_file, **settings)
    found = MlflowClient(uri).search_logged_models([open_tracker(uri).experiment_id])
    assert [(entry.model_uri, str(entry.status)) for entry in found] == [(model, "READY")]


@pytest.mark.slow
def test_a_logged_adapter_loads_into_a_diffusers_pipeline(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    inputs = (torch.randn(1, 4, 4, 4), 1, torch.randn(1, 3, 8))
    plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(unet.state_dict())
    unet.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
    )
    with torch.no_grad():
        adapted = unet(*inputs).sample
        assert not torch.allclose(adapted, plain(*inputs).sample)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)

    logged = open_tracker(uri).log_adapter(
        tmp_path / "lora", base_model="org/model", name="adapter", step=1
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.diffusers.load_model(logged)
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=plain,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(loaded.adapter_path)
    assert loaded.base_model == "org/model"
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(*inputs).sample, adapted)


@pytest.mark.slow
def test_a_new_database_is_made_with_its_folder(tmp_path: Path):
    open_tracker(f"sqlite:///{tmp_path}/some/where/mlflow.db")
    assert (tmp_path / "some" / "where" / "mlflow.db").exists()


def test_artifacts_lie_beside_the_database(uri: str, tmp_path: Path):
    tracker = open_tracker(uri)
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.yaml").write_text("seed: 7")
    tracker.log_file(tmp_path / "settings" / "config.yaml", "config")
    tracker.log_folder(tmp_path / "settings", "all")
    root = tmp_path / "tracking" / "mlartifacts" / tracker.mlflow_run_id / "artifacts"
    assert (root / "config" / "config.yaml").read_text() == "seed: 7"
    assert (root / "all" / "config.yaml").exists()


def test_even_a_short_run_has_system_metrics_and_a_resumed_one_continues_them(uri: str):
    for _ in range(2):
        tracker = open_tracker(uri)
        tracker.start_system_metrics()
        tracker.finish("FINISHED")
    memory = history(uri, tracker, "system/system_memory_usage_megabytes")
    assert [step for step, _ in memory] == [0, 1]
    assert all(value > 0 for _, value in memory)
    assert MlflowClient(uri).get_run(tracker.mlflow_run_id).info.status == "FINISHED"


@pytest.mark.parametrize("folder", ["./mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_a_plain_folder_is_refused_with_the_way_out(folder: str):
    with pytest.raises(TrackingError, match=r"plain folder.*sqlite:///mlflow\.db"):
        open_tracker(folder)


@pytest.mark.parametrize("mistyped", ["sqlite:mlflow.db", "sqlite:/data/mlflow.db"])
def test_a_mistyped_address_is_refused_with_the_right_one(
    mistyped: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("signal.signal", lambda *words: None)
    with pytest.raises(TrackingError, match=r"sqlite:///mlflow\.db"):
        open_tracker(mistyped)
    with pytest.raises(ConfigError, match=r"tracking\.uri.*sqlite:///mlflow\.db"):
        parse(tracking={"uri": mistyped})
    with pytest.raises(TrackingError, match=r"sqlite:///mlflow\.db"):
        serve_pages(mistyped, mlflow_port=1, prefect_port=1)


@pytest.mark.parametrize(
    "address", ["sqlite://host:port/x", "mysql+oursql://host/x", "postgresql://host/x"]
)
def test_a_database_that_cannot_be_used_is_a_named_error(address: str):
    with pytest.raises(TrackingError, match=re.escape(address)):
        open_tracker(address)


def test_a_server_that_is_not_there_is_refused_within_seconds():
    with socket.socket() as taken:  # bound and not listening: nobody else can answer there
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(TrackingError, match="No MLflow server answers"):
            open_tracker(address)
    assert time.monotonic() - started < 8


def test_an_address_with_a_password_is_refused_and_not_quoted():
    with pytest.raises(TrackingError, match="contains a password") as caught:
        open_tracker("http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_never_replies_is_refused_within_seconds():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="No MLflow server answers"):
            open_tracker(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - started < 8


def test_what_mlflow_refuses_is_a_named_error(uri: str):
    tracker = open_tracker(uri)
    with pytest.raises(TrackingError, match="log the metrics of step 1"):
        tracker.log_metrics({"no*such$name": 1.0}, 1)
    client = MlflowClient(uri)
    client.delete_experiment(tracker.experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        open_tracker(uri)


CONFLICT = (
    "(sqlite3.IntegrityError) UNIQUE constraint failed: latest_metrics.key, latest_metrics.run_uuid"
    "\n[SQL: INSERT INTO latest_metrics (key, value) VALUES (?, ?)]\n[parameters: ('loss', 1.0)]"
)


def test_what_two_processes_log_at_once_is_logged_at_the_next_try(
    uri: str, monkeypatch: pytest.MonkeyPatch
):
    tracker, log_batch = open_tracker(uri), MlflowClient.log_batch
    attempts: list[int] = []

    def overtaken(client: MlflowClient, *words, **named) -> None:
        attempts.append(1)
        if len(attempts) == 1:
            log_batch(MlflowClient(uri), *words, **named)  # the other process's
            raise MlflowException(CONFLICT, BAD_REQUEST)
        log_batch(client, *words, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", overtaken)
    with pytest.raises(TrackingError, match=r"step 0: \(sqlite3.*run_uuid$") as told:
        tracker.log_metrics({"loss": 1.0}, 0)
    assert "SQL" not in str(told.value)
    attempts.clear()
    tracker.backlog.log(lambda: tracker.log_metrics({"loss": 2.0}, 1))
    tracker.backlog.finish()
    assert history(uri, tracker, "loss") == [(0, 1.0), (1, 2.0)]


def test_two_processes_that_start_one_run_at_once_share_its_page(
    uri: str, monkeypatch: pytest.MonkeyPatch
):
    create, others = MlflowClient.create_run, []

    def overtaken(client: MlflowClient, *words, **named):
        monkeypatch.setattr(MlflowClient, "create_run", create)
        others.append(open_tracker(uri))
        time.sleep(0.01)  # MLflow's clock counts milliseconds
        return create(client, *words, **named)

    monkeypatch.setattr(MlflowClient, "create_run", overtaken)
    own = open_tracker(uri)
    assert own.mlflow_run_id == others[0].mlflow_run_id
    assert len(MlflowClient(uri).search_runs([own.experiment_id])) == 1
