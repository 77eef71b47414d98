"""Rewards by name and of one's own, and what makes two the same."""

import importlib
import re
import shutil
import sys

import pytest
from PIL import Image

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, available_rewards, load_reward, score_images

IMAGES = [Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8))]
PROMPTS = [Prompt("a"), Prompt("bbb")]

OWN = """
from __future__ import annotations
from typing import TYPE_CHECKING
import numpy as np
from ddpo.rewards import RewardIdentity, Scores

if TYPE_CHECKING:
    from collections.abc import Sequence

def length(images: Sequence, prompts: Sequence, scale: float = 1.0) -> Sequence:
    return [scale * len(prompt.text) for prompt in prompts]

class Redness:
    def __init__(self, channel: int, offset: float = 0.0):
        self.channel, self.offset = channel, offset
    def __call__(self, images, prompts):
        red = np.array([np.asarray(i)[..., self.channel].mean() for i in images])
        return Scores(red + self.offset, columns={"raw": red})

def factory(name: str = "red"):
    return Redness(channel=["red", "green", "blue"].index(name))

built = Redness(0, offset=1.0)

class Versioned(Redness):
    version = "2024-01"
    revisions = {"org/model": "abc"}

class Service:
    def __init__(self, address: str):
        self.identity = RewardIdentity("told", {"k": 1}, {}, "9")
    def __call__(self, images, prompts):
        return [0.0] * len(images)

class Broken:
    def __init__(self):
        raise OSError("no weights")

class Exits:
    def __init__(self):
        raise SystemExit("no licence")

def not_a_reward():
    return 3

def ported(images, prompts, metadata, scale: float = 1.0):
    return [scale * len(p.upper()) + m.get("n", 0) for p, m in zip(prompts, metadata)], {}

class Ported:
    def __call__(self, images, prompts, metadata):
        return ported(images, prompts, metadata)

def ported_factory():
    def reward(images, prompts, metadata):
        return ported(images, prompts, metadata)
    return reward

def other_names(imgs, texts):
    return [0.0] * len(imgs)

class OneImage:
    def __call__(self, image):
        return 0.0

ODD_VERSION = type("B", (), {"version": 2, "__call__": lambda self, images, prompts: []})
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits within a second must show
    (tmp_path / "own_rewards_fixture.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards_fixture", raising=False)
    yield "own_rewards_fixture"
    sys.modules.pop("own_rewards_fixture", None)


def values(name, /, **parameters):
    return score_images(load_reward(name, parameters), IMAGES, PROMPTS).values.tolist()


def test_plain_function_is_a_reward(own):
    assert values(f"{own}:length") == [1, 3]
    assert values(f"{own}:length", scale=2) == [2, 6]


def test_class_factory_and_object_are_rewards(own):
    assert values(f"{own}:Redness", channel=0) == [200, 0]
    assert values(f"{own}:Redness", channel=0, offset=0.5) == [200.5, 0.5]
    assert values(f"{own}:factory", name="green") == [0, 0]
    assert values(f"{own}:built") == [201, 1]


NEEDED = {"weighted": {"rewards": [{"name": "colorfulness"}]}}


def test_every_registered_reward_keeps_the_protocol():
    assert {"jpeg_compressibility", "jpeg_incompressibility"} <= set(available_rewards())
    for name in available_rewards():
        if name in ("http", "openai_vlm"):  # need a service: test_http_reward, test_openai_vlm
            continue
        if name == "ocr_text" and shutil.which("tesseract") is None:
            continue
        reward = load_reward(name, NEEDED.get(name, {}))
        assert isinstance(reward, Reward)
        assert re.fullmatch(rf"{name}-[0-9a-f]{{8}}", reward.identity.reward_id)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("jpeg_compressability", {}, "did you mean 'jpeg_compressibility'.*jpeg_incompressib"),
        ("jpeg_compressibility", {"quality": 9}, "no parameter 'quality'. It takes none"),
        ("OWN:Rednes", {}, "did you mean 'Redness'"),
        ("OWN:Redness", {}, "needs 'channel'"),
        ("OWN:Redness", {"chanel": 0}, "'chanel'; did you mean 'channel'"),
        ("OWN:Redness", {"channel": "0"}, "'channel' is '0'.*integer"),
        ("OWN:length", {"images": []}, "no parameter 'images'"),
        ("OWN:length", {"scale": None}, "'scale' is None.*number"),
        ("OWN:built", {"channel": 0}, "already built"),
        ("OWN:not_a_reward", {}, "returns 3, which cannot be called.*images, prompts"),
        ("OWN:other_names", {}, "name its first parameters `images, prompts`"),
        ("OWN:OneImage", {}, r"called with \(image\); a reward is called with \(images, prompts\)"),
        ("OWN:ported", {"metadata": []}, "no parameter 'metadata'"),
        ("OWN:ODD_VERSION", {}, "`version` must be a string"),
        ("OWN:OWN.x", {}, "has no 'OWN.x'"),
        ("OWN:", {}, "not an import path"),
        ("nowhere_at_all.module:Thing", {}, "no module 'nowhere_at_all'.*PYTHONPATH"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_way_out(own, name, parameters, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(name.replace("OWN:", f"{own}:"), parameters)


@pytest.mark.parametrize("name", ["ported", "Ported", "ported_factory"])
def test_rewards_of_other_trainers_get_texts_and_metadata(own, name):
    reward = load_reward(f"{own}:{name}", {})
    prompts = [Prompt("a"), Prompt("bbb", {"n": 10})]
    assert score_images(reward, IMAGES, prompts).values.tolist() == [1, 13]
    if name == "ported":
        assert values(f"{own}:ported", scale=2) == [2, 6]
        assert reward.identity.parameters == {"scale": 1.0}


def test_module_that_fails_to_import_says_which_import_failed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_needs_more.py").write_text("import not_installed_here\n")
    (tmp_path / "own_has_a_bug.py").write_text("1 / 0\n")
    (tmp_path / "own_is_a_script.py").write_text("import sys\nsys.exit('usage: score IMAGE')\n")
    with pytest.raises(ConfigError, match=r"own_is_a_script failed: SystemExit: usage: score"):
        load_reward("own_is_a_script:Thing", {})
    with pytest.raises(ConfigError, match=r"own_needs_more imports 'not_installed_here'.*install"):
        load_reward("own_needs_more:Thing", {})
    with pytest.raises(ConfigError, match="importing own_has_a_bug failed: ZeroDivisionError"):
        load_reward("own_has_a_bug:Thing", {})


def test_reward_that_cannot_be_built_is_named(own):
    with pytest.raises(RewardError, match=r"Broken.*could not be built: OSError: no weights"):
        load_reward(f"{own}:Broken", {})
    with pytest.raises(RewardError, match=r"Exits.*could not be built: SystemExit: no licence"):
        load_reward(f"{own}:Exits", {})


def test_entry_points_are_names(own, tmp_path):
    info = tmp_path / "own_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ddpo.rewards]\nprompt_length = {own}:length\n")
    assert "prompt_length" in available_rewards()
    assert values("prompt_length", scale=3) == [3, 9]
    other = tmp_path / "rival-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text(f"[ddpo.rewards]\nprompt_length = {own}:factory\n")
    with pytest.raises(ConfigError, match=r"claimed by .*own-package.*rival|rival.*own-package"):
        load_reward("prompt_length", {})


def identity(name, /, **parameters):
    return load_reward(name, parameters).identity


def test_identity_changes_with_name_parameters_and_source(own, tmp_path):
    before = identity(f"{own}:length")
    assert before == identity(f"{own}:length")
    digests = {
        before.digest,
        identity(f"{own}:length", scale=2.0).digest,
        identity(f"{own}:factory").digest,
    }
    assert len(digests) == 3
    (tmp_path / f"{own}.py").write_text(OWN.replace("scale * len", "-scale * len"))
    assert identity(f"{own}:length") == before  # the loaded code is still the old one
    importlib.invalidate_caches()
    importlib.reload(sys.modules[own])
    after = identity(f"{own}:length")
    assert values(f"{own}:length") == [-1, -3]
    assert after.digest not in digests
    assert (after.name, after.parameters) == (before.name, before.parameters)


def test_a_default_spelled_out_is_the_same_reward(own):
    assert identity(f"{own}:length") == identity(f"{own}:length", scale=1)
    assert identity(f"{own}:length").parameters == {"scale": 1.0}


def test_version_of_ones_own_replaces_the_digest_of_the_source(own, tmp_path):
    before = identity(f"{own}:Versioned", channel=0)
    assert (before.version, before.revisions) == ("2024-01", {"org/model": "abc"})
    (tmp_path / f"{own}.py").write_text(OWN + "\n# edited\n")
    importlib.reload(sys.modules[own])
    assert identity(f"{own}:Versioned", channel=0).digest == before.digest


def test_reward_that_reports_its_identity_keeps_it(own):
    here, there = (identity(f"{own}:Service", address=a) for a in ("http://a", "http://b"))
    assert here == there
    assert (here.name, here.parameters, here.version) == ("told", {"k": 1}, "9")


def test_reward_id_is_safe_in_a_storage_key(own):
    reward_id = identity(f"{own}:Redness", channel=0).reward_id
    assert re.fullmatch(r"own_rewards_fixture-Redness-[0-9a-f]{8}", reward_id)


def test_identity_is_the_same_in_every_process():
    # Pinned: a change here makes every stored reward table a stranger to its own config.
    assert load_reward("jpeg_compressibility", {}).identity.reward_id == (
        "jpeg_compressibility-81925b61"
    )
