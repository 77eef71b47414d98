"""`ddpo export-lora`: a folder for other programs and other people, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ddpo.analysis.lora_plan import plan_export
from ddpo.analysis.model_card import write_card
from ddpo.analysis.report import checkpoint_pictures
from ddpo.analysis.rewards import reward_curve
from ddpo.config import ModelConfig, PicturesConfig
from ddpo.diffusion import PlainScheduler
from ddpo.models.hub import on_hub
from ddpo.runs import Run, start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.tasks.pictures import draw_pictures, picture_set
from tests.models.test_exports import assert_same_images, images_of, plain
from tests.recorded import EPOCHS, SAMPLES, folder_of, record_run
from tests.tiny import tiny_config

DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "mine-kohya.safetensors"
PROMPTS = ("a cat", "<b>two</b> | `dogs`\n# at once")
Command = Callable[..., tuple[int, str]]


def pictured(run: Run, *epochs: int) -> str:
    """Generate the images of the fixed prompts, as a run does before each epoch."""
    pictures = picture_set(run, PicturesConfig(prompts=PROMPTS, seeds=(0,)))
    for epoch in epochs:
        ref = CHECKPOINT.find(run.store, Partition(run.run_id, epoch))
        assert ref is not None
        draw_pictures.fn(run.handle, ref, pictures, epoch)
    return pictures.pictures_id


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody changes, with alpha / rank = 2, and images at both ends."""
    root = tmp_path_factory.mktemp("exported") / "store"
    trainable = {"type": "lora", "rank": 4, "alpha": 8.0}
    optimizer = {"ema_decay": 0.5, "learning_rate": 0.05}
    run = record_run(tiny_model, root, trainable=trainable, optimizer=optimizer)
    pictured(run, 0, EPOCHS)
    return run


@pytest.fixture
def ddpo(
    recorded: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs the command in this process; gives exit status and what the screen showed."""
    monkeypatch.setenv("DDPO_ROOT", recorded.store.root)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), " ".join(capsys.readouterr().out.split())

    return run


def folded(run: Run, epoch: int) -> dict[str, np.ndarray]:
    """Return a checkpoint's averaged weights as the files should hold them."""
    state = CHECKPOINT.require(run.store, Partition(run.run_id, epoch)).state()
    return {
        f"unet.{name}": np.asarray(2 * value if "lora_B" in name else value)
        for name, value in (state.ema or state.weights).items()
    }


@pytest.mark.parametrize("epoch", [None, 1])
def test_plain_diffusers_draws_the_checkpoint(
    ddpo: Command, recorded: Run, tmp_path: Path, epoch: int | None
) -> None:
    out = tmp_path / "new" / "lora"
    chosen = () if epoch is None else ("--epoch", epoch)
    status, screen = ddpo("export-lora", "mine", "--out", out, *chosen)
    assert status == 0, screen
    assert f"mine after {epoch or EPOCHS} epochs" in screen
    found = load_file(out / DIFFUSERS)
    expected = folded(recorded, epoch or EPOCHS)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name].numpy(), value) for name, value in expected.items())
    model = Path(recorded.config.model.path)
    images = images_of(plain(model, out))
    pipeline = plain(model)
    pipeline.load_lora_weights(out, weight_name=KOHYA)
    assert_same_images(images_of(pipeline), images)
    assert [path.name for path in out.parent.iterdir()] == ["lora"]  # and no scratch folder


def test_the_headers_say_where_the_weights_are_from(
    ddpo: Command, recorded: Run, tmp_path: Path
) -> None:
    ddpo("export-lora", "mine", "--out", tmp_path / "lora")
    for name in (DIFFUSERS, KOHYA):
        with safe_open(tmp_path / "lora" / name, "np") as file:
            header = file.metadata()
        assert header["ddpo.run"] == "mine" and header["ddpo.epoch"] == str(EPOCHS)
        assert (header["ddpo.rank"], header["ddpo.alpha"]) == ("4", "8.0")
        assert header["ddpo.reward"] == recorded.reward_id


def test_the_card_shows_reward_images_and_how_to_load(
    ddpo: Command, recorded: Run, tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    ddpo("export-lora", "mine", "--out", out)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image"
    assert {"lora", "reinforcement-learning", "ddpo"} <= set(card.data.tags)
    assert card.data.base_model is None and card.data.license is None  # neither is known
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert front["instance_prompt"] is None
    assert [shown["text"] for shown in front["widget"]] == list(PROMPTS)
    for point in reward_curve(recorded):
        assert f"| {point.epoch} | {point.mean:.4g} | {point.std:.4g} | {SAMPLES} |" in card.text
    for line in (
        f"| run | `mine`, checkpoint after {EPOCHS} epochs |",
        f"| base model | `{Path(recorded.config.model.path).name}` |",
        f"| reward | `{recorded.reward_id}` (higher is better) |",
        "| algorithm | `ddpo_is` (updates_per_epoch: 2) |",
        "| LoRA | rank 4, alpha 8.0, on to_q, to_k, to_v, to_out.0 |",
        "| weights | moving average, decay 0.5 |",
        "<td>&lt;b&gt;two&lt;/b&gt; | `dogs` # at once</td>",
    ):
        assert line in card.text
    assert str(Path(recorded.config.model.path).parent) not in card.content  # private
    assert str(tmp_path) not in card.content
    assert DIFFUSERS in card.text
    assert "1.x, 2.x and XL, and this base\nmodel is none of them" in card.text
    linked = set(re.findall(r"images/[\w.-]+", card.content))
    assert linked == {f"images/{path.name}" for path in (out / "images").iterdir()}
    assert Image.open(out / "images" / "reward.png").size[0] <= 800


def test_a_base_that_other_programs_know_is_named_to_them(
    ddpo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a base model with Stable Diffusion 2.x's text encoder."""
    monkeypatch.setattr("ddpo.models.lora_files._BASES", {16: "sd_v2"})
    ddpo("export-lora", "mine", "--out", tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"copy `{KOHYA}` to `ComfyUI/models/loras`" in card
    assert "`<lora:mine-kohya:1>`" in card
    with safe_open(tmp_path / "lora" / KOHYA, "np") as file:
        header = file.metadata()
    assert (header["ss_base_model_version"], header["ss_v2"]) == ("sd_v2", "True")


def test_a_base_model_of_the_hub_is_linked(recorded: Run, tmp_path: Path) -> None:
    model = ModelConfig(path="owner/stable", revision="abc")
    run = replace(recorded, config=recorded.config.model_copy(update={"model": model}))
    export = plan_export(run, tmp_path / "lora", repository="me/mine")
    settings = {"solver_order": 2, "prediction_type": "flow_prediction"}
    write_card(
        export,
        tmp_path,
        pipeline="StableDiffusionPipeline",
        scheduler=PlainScheduler("UniPCMultistepScheduler", settings),
        other_programs=True,
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert "from diffusers import UniPCMultistepScheduler, StableDiffusionPipeline" in card.text
    expected = "solver_order=2, prediction_type='flow_prediction'"
    made = f"UniPCMultistepScheduler.from_config( pipeline.scheduler.config, {expected} )"
    assert f"pipeline.scheduler = {made}" in " ".join(card.text.split())
    assert card.data.base_model == "owner/stable"
    assert "see <https://huggingface.co/owner/stable>" in card.text
    assert "| base model | `owner/stable` at revision `abc` |" in card.text
    assert 'from_pretrained("owner/stable", revision="abc")' in card.text
    assert 'load_lora_weights("me/mine", ' in card.text


def test_a_base_model_in_one_file_is_called_by_its_name(recorded: Run, tmp_path: Path) -> None:
    file = tmp_path / "private" / "sd.safetensors"
    file.parent.mkdir()
    file.touch()
    config = recorded.config.model_copy(update={"model": ModelConfig(path=str(file))})
    run = replace(recorded, config=config)
    write_card(
        plan_export(run, tmp_path / "lora"),
        tmp_path,
        pipeline="StableDiffusionPipeline",
        scheduler=None,
        other_programs=True,
    )
    card = (tmp_path / "README.md").read_text()
    assert 'from_single_file("path/to/sd.safetensors")' in card
    assert "base_model" not in card and "private" not in card


@pytest.mark.parametrize(
    ("path", "expected"),
    [("starter", False), (".", False), (__file__, False), ("owner/name", True)],
)
def test_what_is_neither_here_nor_the_starter_is_the_hubs(path: str, expected: bool) -> None:
    assert on_hub(ModelConfig(path=path)) is expected


def test_the_cards_images_are_the_stores(ddpo: Command, recorded: Run, tmp_path: Path) -> None:
    ddpo("export-lora", "mine", "--out", tmp_path / "lora")
    pictures = picture_set(recorded, PicturesConfig(prompts=PROMPTS, seeds=(0,))).pictures_id
    for label, epoch in (("before", 0), ("after", EPOCHS)):
        for index, row in enumerate(checkpoint_pictures(recorded, pictures, epoch)):
            file = tmp_path / "lora" / "images" / f"{label}-{index:02d}.png"
            assert file.read_bytes() == row.image_png


def test_a_checkpoint_without_images_has_a_card_that_says_so(ddpo: Command, tmp_path: Path) -> None:
    assert ddpo("export-lora", "mine", "--epoch", 1, "--out", tmp_path / "lora")[0] == 0
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "no images of fixed prompts" in card
    assert "| 0 | " in card and "| 1 | " not in card  # the rewards of the epochs before it
    assert ddpo("export-lora", "mine", "--epoch", 0, "--out", tmp_path / "base")[0] == 0
    assert "No epoch was trained" in (tmp_path / "base" / "README.md").read_text()


def test_the_code_of_the_card_runs(
    ddpo: Command, recorded: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ddpo("export-lora", "mine", "--out", tmp_path / "lora")
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "lora" / "README.md").read_text(), re.S
    )
    model = Path(recorded.config.model.path)
    assert f"path/to/{model.name}" in code
    monkeypatch.chdir(tmp_path / "lora")
    names: dict[str, object] = {}
    exec(code.replace(f"path/to/{model.name}", str(model)), names)
    assert isinstance(names["image"], Image.Image)


def test_an_earlier_export_of_the_run_is_replaced(ddpo: Command, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    ddpo("export-lora", "mine", "--out", out)
    (out / "notes.txt").write_text("my own")
    latest = (out / DIFFUSERS).read_bytes()
    assert ddpo("export-lora", "mine", "--epoch", 1, "--out", out)[0] == 0
    assert (out / DIFFUSERS).read_bytes() != latest
    assert "checkpoint after 1 epochs" in (out / "README.md").read_text()
    assert [path.name for path in (out / "images").iterdir()] == ["reward.png"]
    assert (out / "notes.txt").read_text() == "my own"


def test_a_base_model_that_has_changed_is_refused(
    ddpo: Command, recorded: Run, tiny_model: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    run = record_run(moved, tmp_path / "store")
    file = moved / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text() + "\n")
    status, screen = ddpo(
        "export-lora", "mine", "--out", tmp_path / "lora", "--root", folder_of(run)
    )
    assert status == 2 and screen.startswith("PolicyMismatch")
    assert not (tmp_path / "lora").exists()


# What is refused before anything is loaded


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ddpo.models.base.Policy.__init__", load)


@pytest.mark.usefixtures("never_loads")
def test_a_full_fine_tune_has_no_lora(ddpo: Command, tiny_model: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    config = tiny_config(
        tiny_model,
        trainable={"type": "full"},
        storage={"root": str(tmp_path / "store")},
        outputs=str(outputs),
    )
    start_run(config, "whole")
    words = ("export-lora", "whole", "--out", tmp_path / "lora", "--root", tmp_path / "store")
    status, screen = ddpo(*words)
    assert status == 2
    assert "trainable.type: full" in screen and f"{outputs}/whole" in screen
    assert not (tmp_path / "lora").exists()


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mind", "--out", "NEW"], "Did you mean mine?"),
        (["mine", "--out", "NEW", "--epoch", "7"], "no checkpoint 7; it has 0 to 2"),
        (["mine", "--out", "FULL"], "neither an empty folder nor an earlier export of run 'mine'"),
        (["mine", "--out", "FULL/file"], "neither an empty folder"),
        (["mine", "--out", "FULL/file/x"], "cannot be written"),
        (["mine", "--out", "NEW", "--push-to-hub", "a/b/c"], "expected owner/name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_one_message_and_writes_nothing(
    ddpo: Command, tmp_path: Path, words: list[str], told: str
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    names = {"NEW": str(tmp_path / "new"), "FULL": str(full)}
    given = [re.sub("^(NEW|FULL)", lambda found: names[found[0]], word) for word in words]
    status, screen = ddpo("export-lora", *given)
    assert status == 2
    assert told in screen and "Traceback" not in screen
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["file"]


def test_the_export_of_another_run_of_the_name_is_left_alone(
    ddpo: Command, tiny_model: Path, tmp_path: Path
) -> None:
    other = record_run(tiny_model, tmp_path / "store")
    ddpo("export-lora", "mine", "--out", tmp_path / "lora")
    before = (tmp_path / "lora" / DIFFUSERS).read_bytes()
    words = ("export-lora", "mine", "--out", tmp_path / "lora", "--root", folder_of(other))
    status, screen = ddpo(*words)
    assert status == 2 and "nor an earlier export" in screen
    assert (tmp_path / "lora" / DIFFUSERS).read_bytes() == before


# Uploading, to a Hub on this machine


class FakeHub(ThreadingHTTPServer):
    """Answers as the Hub does where an upload asks, and remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[tuple[str, str]] = []
        self.created: dict[str, object] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path))
        self._answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(("POST", self.path))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self._answer({"error": "You may not"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer({"url": f"{self.server.address}/me/mine"})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": file["path"], **mode} for file in asked]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
            url = f"{self.server.address}/me/mine/commit/{'1' * 40}"
            self._answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        else:
            self._answer({})  # such as the check of the card's YAML

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_upload_is_private_and_holds_what_was_exported(
    ddpo: Command, hub: FakeHub, tmp_path: Path
) -> None:
    out = tmp_path / "lora"
    ddpo("export-lora", "mine", "--out", out)
    assert not hub.asked  # without the option, nothing is
    (out / "notes.txt").write_text("my own")
    status, screen = ddpo("export-lora", "mine", "--out", out, "--push-to-hub", "me/mine")
    assert status == 0, screen
    assert f"uploaded to {hub.address}/me/mine" in screen
    assert hub.created["visibility"] == "private"
    assert hub.tokens == {"Bearer hf_of_this_test"}
    expected = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "notes.txt"
    }
    assert hub.files == expected
    assert 'pipeline.load_lora_weights("me/mine"' in (out / "README.md").read_text()


def test_a_refused_upload_leaves_the_export(ddpo: Command, hub: FakeHub, tmp_path: Path) -> None:
    hub.refuses = True
    out = tmp_path / "lora"
    status, screen = ddpo("export-lora", "mine", "--out", out, "--push-to-hub", "me/mine")
    assert status == 2 and "UploadFailed" in screen
    assert "could not be uploaded" in screen and "403" in screen
    assert "hf_of_this_test" not in screen
    assert (out / DIFFUSERS).is_file()


@pytest.mark.usefixtures("never_loads")
def test_an_upload_that_cannot_be_is_refused_at_once(
    ddpo: Command, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("export-lora", "mine", "--out", tmp_path / "lora", "--push-to-hub", "me/mine")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        status, screen = ddpo(*words)
        assert status == 2 and "HF_HUB_OFFLINE is set" in screen
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    status, screen = ddpo(*words)
    assert status == 2 and "hf auth login" in screen
    assert not hub.asked and not (tmp_path / "lora").exists()
