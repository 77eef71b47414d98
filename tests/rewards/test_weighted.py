"""Several rewards in one: the sum, its columns, its failures and its identity."""

import sys

import numpy as np
import pytest
from PIL import Image

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, load_reward, score_images
from ddpo.store.tables import RewardRow, decode_rewards, encode_rewards

RNG = np.random.default_rng(0)
IMAGES = [
    Image.new("RGB", (16, 16), (200, 0, 0)),
    Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8)),
    Image.new("RGB", (16, 16), (90, 90, 90)),
]
PROMPTS = [Prompt("a"), Prompt("bbb"), Prompt("cc")]

OWN = """
import numpy as np
from ddpo.rewards import Scores, load_reward

def reward(images, prompts, scale: float = 1.0):
    return [scale * len(prompt.text) for prompt in prompts]

class Versioned:
    version = "1"
    revisions = {"org/model": "abc"}
    def __call__(self, images, prompts):
        return [1.0] * len(images)

class Fails:
    version = "1"
    def __init__(self, on: str):
        self.on = on
    def __call__(self, images, prompts):
        failed = np.array([prompt.text in self.on.split(",") for prompt in prompts])
        return Scores(np.ones(len(images)), failed, {"why": ["gone" if f else "" for f in failed]})

def breaks(images, prompts):
    raise ValueError("no such thing")

def endless():
    return load_reward("weighted", {"rewards": [{"name": "own_parts_fixture:endless"}]})
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_parts_fixture.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts_fixture", raising=False)
    yield "own_parts_fixture"
    sys.modules.pop("own_parts_fixture", None)


def weighted(*components):
    return load_reward("weighted", {"rewards": list(components)})


def alone(name, **parameters):
    return score_images(load_reward(name, parameters), IMAGES, PROMPTS)


def test_the_sum_of_standardised_values():
    jpeg = {"name": "jpeg_compressibility", "weight": 0.5, "mean": -0.7, "std": 0.2}
    colour = {"name": "colorfulness", "weight": -2, "mean": 40, "std": 25}
    scores = score_images(weighted(jpeg, colour), IMAGES, PROMPTS)
    kb = alone("jpeg_compressibility").values.astype(float)
    m3 = alone("colorfulness").values.astype(float)
    np.testing.assert_array_equal(
        scores.values, np.float32(0.5 * (kb + 0.7) / 0.2 - 2 * (m3 - 40) / 25)
    )
    bare = score_images(weighted({"name": "colorfulness"}), IMAGES, PROMPTS)
    np.testing.assert_array_equal(bare.values, alone("colorfulness").values)


def test_large_terms_that_cancel_leave_the_small_ones(own):
    large = {"name": f"{own}:reward", "weight": 1e8}
    scores = score_images(
        weighted(large, {"name": "colorfulness"}, {**large, "weight": -1e8}), IMAGES, PROMPTS
    )
    np.testing.assert_allclose(scores.values, alone("colorfulness").values, rtol=1e-6, atol=1e-6)


def test_components_and_their_columns_are_kept_under_their_label():
    scores = score_images(
        weighted({"name": "jpeg_compressibility"}, {"name": "colorfulness", "label": "colour"}),
        IMAGES,
        PROMPTS,
    )
    m3 = alone("colorfulness")
    assert (
        scores.columns["jpeg_compressibility.jpeg_kb"]
        == alone("jpeg_compressibility").columns["jpeg_kb"]
    )
    assert scores.columns["jpeg_compressibility"] == alone("jpeg_compressibility").values.tolist()
    assert scores.columns["colour"] == m3.values.tolist()
    assert scores.columns["colour.rg_std"] == m3.columns["rg_std"]
    assert scores.columns["failed_components"] == [""] * 3
    assert len(scores.columns) == 1 + 2 + 5


def test_names_that_collide_are_numbered_and_no_column_is_lost(own):
    reward = weighted(
        {"name": "colorfulness"},
        {"name": f"{own}:reward"},  # a column of the table itself is called so
        {"name": "colorfulness", "weight": 3.0},
        {"name": "jpeg_compressibility", "label": "colorfulness_2"},
    )
    columns = score_images(reward, IMAGES, PROMPTS).columns
    values = {name: column for name, column in columns.items() if "." not in name}
    assert set(values) == {
        "colorfulness_1", "reward_1", "colorfulness_3", "colorfulness_2", "failed_components",
    }  # fmt: skip
    assert (
        values["colorfulness_1"]
        == values["colorfulness_3"]
        == alone("colorfulness").values.tolist()
    )
    assert values["reward_1"] == [1, 3, 2]
    assert values["colorfulness_2"] == alone("jpeg_compressibility").values.tolist()


def test_names_that_are_no_label_are_made_one(own, tmp_path):
    """Of plain characters, and short enough that a number fits within the 40 of a label."""
    long = "b" * 50
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    points = "".join(f"{name} = {own}:reward\n" for name in ("3 words, long", long))
    (info / "entry_points.txt").write_text(f"[ddpo.rewards]\n{points}")
    names = ("3 words, long", long, long)
    columns = score_images(weighted(*({"name": n} for n in names)), IMAGES, PROMPTS).columns
    labels = ["_3_words_long", "b" * 36 + "_1", "b" * 36 + "_2", "failed_components"]
    assert list(columns) == labels
    chosen = [{"name": f"{own}:reward", "label": label} for label in labels[:3]]
    again = score_images(weighted(*chosen), IMAGES, PROMPTS)  # each could have been given as one
    assert again.columns == columns


@pytest.mark.parametrize("label", ["epoch", "failed_components", "twice"])
def test_labels_that_cannot_be_are_refused(label):
    with pytest.raises(ConfigError, match=f"label '{label}'"):
        weighted(*[{"name": "colorfulness", "label": label}] * 2)


def test_a_sample_fails_if_any_component_failed_on_it(own):
    first = {"name": f"{own}:Fails", "parameters": {"on": "a,cc"}, "label": "first"}
    second = {"name": f"{own}:Fails", "parameters": {"on": "cc"}, "label": "second"}
    scores = score_images(weighted(first, {"name": "colorfulness"}, second), IMAGES, PROMPTS)
    assert scores.failed.tolist() == [True, False, True]
    assert scores.values[1] == alone("colorfulness").values[1] + 2
    assert scores.columns["failed_components"] == ["first", "", "first, second"]
    assert scores.columns["first.why"] == ["gone", "", "gone"]
    assert [value is None for value in scores.columns["first"]] == [True, False, True]
    assert scores.columns["second"][0] == 1


def test_a_component_of_weight_0_adds_nothing_and_fails_its_samples_all_the_same(own):
    shown = {"name": f"{own}:Fails", "parameters": {"on": "a"}, "label": "shown", "weight": 0}
    scores = score_images(weighted({"name": "colorfulness"}, shown), IMAGES, PROMPTS)
    assert scores.failed.tolist() == [True, False, False]
    assert scores.columns["failed_components"] == ["shown", "", ""]
    assert scores.values[1:].tolist() == alone("colorfulness").values[1:].tolist()


def test_a_component_that_raises_is_named(own):
    with pytest.raises(
        RewardError, match=r"weighted-\w+: reward own_parts_fixture-breaks.*no such"
    ):
        score_images(weighted({"name": f"{own}:breaks"}), IMAGES, PROMPTS)


def test_sums_may_lie_within_sums(own):
    inner = {"rewards": [{"name": f"{own}:reward", "weight": 2.0}, {"name": "colorfulness"}]}
    outer = {"name": "weighted", "parameters": inner, "weight": 10.0, "mean": 1.0}
    scores = score_images(weighted(outer), IMAGES, PROMPTS)
    m3 = alone("colorfulness").values.astype(float)
    expected = 10 * (np.float32(2 * np.array([1, 3, 2]) + m3).astype(float) - 1)
    np.testing.assert_array_equal(scores.values, np.float32(expected))
    assert scores.columns["weighted.reward_1"] == [1, 3, 2]
    assert scores.columns["weighted.colorfulness.rg_mean"][0] == 200


def test_all_columns_can_be_stored(own):
    inner = {"rewards": [{"name": f"{own}:Fails", "parameters": {"on": "a"}}]}
    reward = weighted({"name": "weighted", "parameters": inner}, {"name": f"{own}:reward"})
    scores = score_images(reward, IMAGES, PROMPTS)
    columns = [
        {name: c[i] for name, c in scores.columns.items() if c[i] is not None} for i in range(3)
    ]
    rows = [RewardRow(f"s{i}", None, "ok", of_sample) for i, of_sample in enumerate(columns)]
    assert decode_rewards(encode_rewards(rows))[1] == rows[1]


def test_a_reward_that_has_itself_in_it_is_refused(own):
    with pytest.raises(ConfigError, match=r"nested more than 4 levels deep: .*contains itself"):
        load_reward(f"{own}:endless", {})
    # and that is not remembered
    nested = {"name": "colorfulness"}
    for _ in range(4):
        nested = {"name": "weighted", "parameters": {"rewards": [nested]}}
    np.testing.assert_array_equal(
        score_images(load_reward(nested["name"], nested["parameters"]), IMAGES, PROMPTS).values,
        alone("colorfulness").values,
    )


def test_identity_holds_that_of_its_components(own, monkeypatch):
    def digest(**changes):
        component = {"name": f"{own}:Versioned", "weight": 1.0, **changes}
        reward = weighted({"name": "colorfulness"}, component)
        assert isinstance(reward, Reward)
        assert reward.identity.reward_id.startswith("weighted-")
        return reward.identity.digest

    before = digest()
    assert digest(mean=0.0, std=1, parameters={}) == before  # defaults spelled out
    digests = {before, digest(weight=2.0), digest(mean=1.0), digest(std=2.0), digest(label="x")}
    versioned = sys.modules[own].Versioned
    monkeypatch.setattr(versioned, "version", "2")
    digests.add(digest())
    monkeypatch.setattr(versioned, "version", "1")
    monkeypatch.setattr(versioned, "revisions", {"org/model": "def"})
    digests.add(digest())
    assert len(digests) == 7


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (None, "needs 'rewards'"),
        ([], "at least 1 item"),
        ([{"name": "colorfulness", "wieght": 1}], r"\[0\]\['wieght'\] Extra inputs"),
        ([{"name": "colorfulness", "std": 0}], r"\[0\]\['std'\].*greater than 0"),
        ([{"name": "colorfulness", "weight": "1"}], r"\[0\]\['weight'\].*valid number"),
        ([{"name": "colorfulness", "label": "a.b"}], r"\[0\]\['label'\].*match pattern"),
        ([{"weight": 1}], r"\[0\]\['name'\] Field required"),
        ([{"name": "colourfulness"}], "did you mean 'colorfulness'"),
        ([{"name": "colorfulness", "parameters": {"x": 1}}], "'colorfulness' takes no parameter"),
    ],
)
def test_components_that_do_not_fit_are_refused(rewards, message):
    with pytest.raises(ConfigError, match=message):
        load_reward("weighted", {} if rewards is None else {"rewards": rewards})
