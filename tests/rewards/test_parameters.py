"""Parameters are checked against a signature before anything runs."""

from pathlib import Path
from typing import Literal

import pytest

from ddpo.basics.plugins import check_parameters
from ddpo.errors import ConfigError


class Opaque:
    pass


def never_run(
    size: float,
    device: Literal["cpu", "cuda"] = "cpu",
    *,
    pair: tuple[int, int] = (1, 2),
    folder: Path = Path("a/b"),
    cap: float = float("inf"),
    opaque: Opaque = Opaque(),  # noqa: B008
    anything=None,
):
    raise AssertionError("a check of parameters must not call")


def check(factory=never_run, /, **parameters):
    return check_parameters("reward 'r'", factory, parameters)


def test_json_values_become_the_annotated_types():
    values = check(size=1, pair=[3, 4], folder="c", anything={"x": [1]}).values
    assert values == {"size": 1.0, "pair": (3, 4), "folder": Path("c"), "anything": {"x": [1]}}
    assert type(values["size"]) is float


def test_identity_holds_everything_in_force_that_json_can_say():
    assert check(size=1).identity == {
        "anything": None,
        "device": "cpu",
        "folder": "a/b",
        "pair": [1, 2],
        "size": 1.0,
    }


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "reward 'r' needs 'size'"),
        ({"size": "1"}, "'size' is '1'.*valid number"),
        ({"size": float("nan")}, "'size' is nan.*JSON cannot represent"),
        ({"size": 1, "device": "gpu"}, "'device' is 'gpu'.*'cpu' or 'cuda'"),
        ({"size": 1, "pair": [1, "2"]}, r"'pair' is .*\[1\] .*integer"),
        (
            {"size": 1, "pairs": [1, 2]},
            r"no parameter 'pairs'; did you mean 'pair'\?.*It takes: size",
        ),
        ({"size": 1, "opaque": {}}, "'opaque' is annotated .*Opaque.*a config cannot set"),
        ({"size": 1, "anything": object()}, "'anything' is .*JSON cannot represent"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        check(**parameters)


def test_double_star_takes_any_name_but_keeps_its_type():
    def options(known: int = 1, **rest: str):
        raise AssertionError

    assert check(options, other="x").values == {"other": "x"}
    with pytest.raises(ConfigError, match="'other' is 3"):
        check(options, other=3)


def test_what_has_no_signature_is_refused():
    with pytest.raises(ConfigError, match="written in Python"):
        check(type, x=1)


def test_annotations_that_cannot_be_read_are_refused():
    def unreadable(size: "Nowhere"):  # noqa: F821
        raise AssertionError

    with pytest.raises(ConfigError, match=r"cannot evaluate its annotations: .*Nowhere"):
        check(unreadable, size=1)
