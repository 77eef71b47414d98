"""Reward models are pinned without being fetched, loaded once, and refused with the way out."""

import hashlib
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ddpo.errors import ConfigError, RewardError
from ddpo.rewards import load_reward
from ddpo.rewards.models import pinned
from ddpo.rewards.models.pinned import PINNED, find_model, find_weights
from ddpo.rewards.models.pretrained import LoadedOnce, check_tensors, pick_device
from tests.rewards.tiny_models import PICTURES, PROMPTS, head_tensors, save_clip, save_tensors

COMMIT = "a" * 40
ADDRESS = "https://example.org/head.safetensors"
NAMES = ("laion_aesthetic", "clip_score", "pickscore", "hps_v2", "image_reward")


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*arguments, **keywords):
        raise LocalEntryNotFoundError("no network in tests\nand more")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(pinned, name, refuse)


@pytest.mark.parametrize("name", NAMES)
def test_building_a_reward_loads_nothing_and_pins_everything(name, monkeypatch):
    monkeypatch.setattr(pinned, "snapshot_download", None)
    monkeypatch.setattr(pinned, "hf_hub_download", None)
    monkeypatch.setattr(pinned.urllib.request, "urlopen", None)
    monkeypatch.setattr(torch.nn.Module, "__init__", None)
    identity = load_reward(name, {}).identity
    assert identity.version == "1"
    assert identity.parameters["device"] == "auto"
    assert identity.revisions
    for model, revision in identity.revisions.items():
        assert revision == PINNED.get("/".join(model.split("/")[:2]), revision)
        assert len(revision.removeprefix("sha256:")) in (40, 64)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_cannot_be_had_are_named_with_the_way_out(name, no_hub):
    reward = load_reward(name, {})
    with pytest.raises(
        RewardError, match=r"cannot download .* from the Hub: no network in tests.*path"
    ):
        reward(PICTURES[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "nowhere"}, "'nowhere' is neither a local folder nor a Hub id"),
        ({"model": "some/where"}, "'some/where' has the revision None; pin a commit"),
        ({"model": "some/where", "revision": "main"}, "revision 'main'; pin a commit"),
        ({"model": "starter-judge", "revision": COMMIT}, "is a folder, which has no revision"),
        ({"device": "gpu"}, "'auto', 'cpu' or 'cuda'"),
        ({"formula": "clip"}, "'clipscore' or 'cosine'"),
    ],
)
def test_models_that_are_not_pinned_are_refused_when_the_config_is_checked(parameters, message):
    with pytest.raises(ConfigError, match=message):
        load_reward("clip_score", parameters)


@pytest.mark.parametrize(
    ("name", "revision", "sha256", "message"),
    [
        ("nowhere.pt", None, None, "there is no file 'nowhere.pt'"),
        ("/no/where.pt", None, None, "there is no file '/no/where.pt'"),
        ("some/where/a.pt", None, None, "'some/where' has the revision None; pin a commit"),
        (ADDRESS, None, None, "need a sha256"),
        (ADDRESS, COMMIT, "0" * 64, "not on the Hub, so they have no revision"),
        (ADDRESS, None, "123", "'123' is not a sha256"),
    ],
)
def test_files_that_are_not_pinned_are_refused(name, revision, sha256, message):
    with pytest.raises(ConfigError, match=message):
        find_weights(name, revision, sha256)


def test_hub_files_are_pinned_by_their_commit():
    assert find_weights("some/where/folder/a.pt", COMMIT, None).revision == COMMIT
    assert find_model("some/where", COMMIT).revision == COMMIT


def test_a_local_file_is_pinned_by_its_sha256(tmp_path):
    path = save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    expected = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert find_weights(path, None, None).revision == f"sha256:{expected}"
    assert find_weights(path, None, expected).tensors().keys() == {"w"}


def test_another_sha256_than_expected_is_refused(tmp_path):
    path = save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    weights = find_weights(path, None, "0" * 64)
    with pytest.raises(RewardError, match=r"a\.safetensors has the sha256 \w{64}, expected 0000"):
        weights.tensors()


def test_a_folder_is_pinned_by_the_files_that_are_loaded(tmp_path):
    save_clip(tmp_path)
    first = find_model(str(tmp_path), None).revision
    (tmp_path / "notes.md").write_text("not loaded")
    assert find_model(str(tmp_path), None).revision == first
    save_clip(tmp_path, seed=1)
    assert find_model(str(tmp_path), None).revision != first


def test_a_folder_without_weights_is_named_with_what_is_expected(tmp_path):
    save_clip(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    reward = load_reward("clip_score", {"model": str(tmp_path)})
    with pytest.raises(RewardError, match=r"cannot load the CLIP model of .*model\.safetensors"):
        reward(PICTURES[:1], PROMPTS[:1])


def served(monkeypatch, data: bytes) -> list[str]:
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        return io.BytesIO(data)

    monkeypatch.setattr(pinned.urllib.request, "urlopen", urlopen)
    return asked


def test_an_address_is_fetched_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tensors(tmp_path / "a.safetensors", head_tensors(8))
    data = (tmp_path / "a.safetensors").read_bytes()
    asked = served(monkeypatch, data)
    weights = find_weights(ADDRESS, None, hashlib.sha256(data).hexdigest())
    assert asked == []
    assert weights.tensors().keys() == weights.tensors().keys() == head_tensors(8).keys()
    assert asked == [ADDRESS]


def test_an_address_that_serves_another_file_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    served(monkeypatch, b"a page that says no")
    with pytest.raises(RewardError, match=r"example\.org.* has the sha256 .*expected 0000.*copy"):
        find_weights(ADDRESS, None, "0" * 64).tensors()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_address_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refuse(address, timeout):
        raise URLError("no route")

    monkeypatch.setattr(pinned.urllib.request, "urlopen", refuse)
    with pytest.raises(RewardError, match=r"cannot download .*no route.*by hand"):
        find_weights(ADDRESS, None, "0" * 64).tensors()


def test_files_that_hold_something_else_are_refused(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    weights = find_weights(str(tmp_path / "a.pt"), None, None)
    assert weights.tensors(inside="state_dict").keys() == {"w"}
    with pytest.raises(RewardError, match=r"more than named tensors: epoch, state_dict"):
        weights.tensors()
    (tmp_path / "b.safetensors").write_bytes(b"no such thing")
    with pytest.raises(RewardError, match=r"cannot read .* as safetensors"):
        find_weights(str(tmp_path / "b.safetensors"), None, None).tensors()


def test_tensors_that_do_not_fit_are_listed_shortly():
    found = {"a": torch.ones(2), "b": torch.ones(3), **{f"x{i}": torch.ones(1) for i in range(9)}}
    with pytest.raises(
        RewardError,
        match=r"weights of M .*missing: c; unexpected: x0, x1, x2 and 6 more; "
        r"of another shape: b \[3\] not \[4\]\)",
    ):
        check_tensors("M", found, {"a": [2], "b": [4], "c": [1]})


def test_threads_load_once():
    loads = []

    def load():
        loads.append(threading.get_ident())
        time.sleep(0.05)
        return object()

    once = LoadedOnce(load)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: id(once.get()), range(8)))
    assert len(loads) == len(found) == 1


def test_a_load_that_failed_is_tried_again():
    answers = iter([RewardError("no network"), "loaded"])

    def load():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    once = LoadedOnce(load)
    with pytest.raises(RewardError, match="no network"):
        once.get()
    assert once.get() == "loaded"


def test_cuda_that_is_absent_is_refused_and_auto_falls_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RewardError, match=r"'cuda'.*set it to 'auto' or 'cpu'"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    assert pick_device("cpu").type == "cpu"
