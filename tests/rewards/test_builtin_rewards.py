"""The rewards that come with the project: each in a file of its own, each the same as ever."""

from __future__ import annotations

import pytest

from ddpo.rewards import load_reward
from ddpo.rewards.registry import BUILTIN
from tests.rewards import fake_vlm

SUM = {
    "rewards": [
        {"name": "starter_vqa", "weight": 0.5},
        {"name": "jpeg_compressibility", "mean": -10.0, "std": 2.0},
    ]
}

DIGESTS = [  # first 16 digits of each
    ("jpeg_compressibility", {}, "81925b6184b79d2e"),
    ("jpeg_incompressibility", {}, "59441f2713eaf6ba"),
    ("colorfulness", {}, "a5aa1163728cd288"),
    ("disc_match", {}, "3163829dce53512c"),
    ("preference", {}, "fb3b6c1bdf6a58d7"),
    ("starter_vqa", {}, "7835cc60fa9e5855"),
    ("starter_vqa", {"questions": ["count"]}, "5b1d7d5620a6d929"),
    ("laion_aesthetic", {}, "7914431aa431570c"),
    ("clip_score", {}, "e0758efb25b6f6d9"),
    ("clip_score", {"model": "starter-judge"}, "876560e0126e9eaf"),
    ("pickscore", {}, "387a356dc7c37827"),
    ("hps_v2", {}, "9d4c18047e10c42f"),
    ("image_reward", {}, "5a9ffef587ff5204"),
    ("vlm_alignment", {}, "76a845dbd512f5b7"),
    ("vlm_vqa", {}, "9b6ebe0ff089154a"),
    ("weighted", SUM, "c648e17f69ac04e2"),
]

FROM_ELSEWHERE = {"http", "ocr_text"}
"""Their identity is the service's own, or holds the version of the installed Tesseract."""


@pytest.mark.parametrize(("name", "parameters", "digest"), DIGESTS)
def test_a_builtin_reward_keeps_its_identity(name, parameters, digest):
    """A digest is part of every stored score's key: only another scoring may change it."""
    assert load_reward(name, parameters).identity.digest[:16] == digest


def test_openai_vlm_keeps_its_identity(quick_and_unset):
    with fake_vlm.serving() as (_, url):
        identity = fake_vlm.load(url).identity
    assert identity.digest[:16] == "7331faa0b2cedf2b"


def test_every_builtin_reward_is_pinned_or_named_as_an_exception():
    assert {name for name, _, _ in DIGESTS} | FROM_ELSEWHERE | {"openai_vlm"} == {*BUILTIN}


def test_builtin_rewards_lie_in_one_folder_and_say_what_they_are():
    """Adding one is a file in there, and a line in the registry."""
    for name, path in BUILTIN.items():
        assert path.startswith("ddpo.rewards.builtin."), name
