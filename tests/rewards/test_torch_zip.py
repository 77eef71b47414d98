"""Files of torch.save are read as data: every tensor of them, and nothing that they would run."""

import os
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from ddpo.errors import RewardError
from ddpo.rewards.models.torch_zip import read_torch_zip

BASE = torch.arange(12.0)
TREE = {
    "state_dict": torch.nn.Linear(3, 2).state_dict(),
    "half": torch.arange(6).half().view(2, 3).T,
    "bfloat16": torch.ones(2).bfloat16(),
    "long": torch.tensor([2**40, -1]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "base": BASE,
    "view": BASE[4:10:2],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "nested": [1, (2.5, None, True), {"deep": torch.tensor([False, True])}],
    "name": "ViT-H-14",
    "big": 2**40,
}


def assert_same(found, expected):
    assert type(found) is type(expected) or isinstance(expected, dict | torch.Tensor)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_it_reads_what_torch_reads(tmp_path, protocol):
    torch.save(TREE, tmp_path / "a.pt", pickle_protocol=protocol)
    expected = torch.load(tmp_path / "a.pt", weights_only=False)
    assert_same(read_torch_zip(tmp_path / "a.pt"), expected)


class Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_that_the_file_names_is_called(tmp_path):
    proof = tmp_path / "proof"
    torch.save({"bad": Touches(proof), "good": torch.ones(2)}, tmp_path / "a.pt")
    assert torch.equal(read_torch_zip(tmp_path / "a.pt")["good"], torch.ones(2))
    assert not proof.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert proof.exists()  # so the file was indeed dangerous


def test_objects_of_other_kinds_do_not_hide_the_tensors_beside_them(tmp_path):
    torch.save({"args": Namespace(lr=1, inner=[2]), "w": torch.ones(2)}, tmp_path / "a.pt")
    assert torch.equal(read_torch_zip(tmp_path / "a.pt")["w"], torch.ones(2))


def test_the_format_before_1_6_is_refused_with_a_way_out(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(RewardError, match=r"(?s)a\.pt is not a zip.*safetensors"):
        read_torch_zip(tmp_path / "a.pt")


def test_a_tensor_alone_is_refused(tmp_path):
    torch.save(torch.ones(2), tmp_path / "a.pt")
    with pytest.raises(RewardError, match="not contain a mapping of tensors"):
        read_torch_zip(tmp_path / "a.pt")


def rewritten(path: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """Copy a zip; ``change`` gives each entry's new bytes, or None to leave it out."""
    copy = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w", compression) as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return copy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name, data: None if name.endswith("data.pkl") else data, "no data.pkl"),
        (lambda name, data: None if name.endswith("data/0") else data, "KeyError"),
        (lambda name, data: data[:8] if name.endswith("data/0") else data, "storage"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "big-endian"),
        (lambda name, data: data[:-9] if name.endswith("data.pkl") else data, "a.*"),
        (lambda name, data: b"\xff" + data if name.endswith("data.pkl") else data, "ValueError"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, change, reason):
    torch.save({"w": torch.ones(4)}, tmp_path / "a.pt")
    with pytest.raises(RewardError, match=rf"(?s)cannot read .*changed\.pt.*{reason}"):
        read_torch_zip(rewritten(tmp_path / "a.pt", change))


def test_compressed_storages_are_refused(tmp_path):
    torch.save({"w": torch.zeros(4096)}, tmp_path / "a.pt")
    with pytest.raises(RewardError, match="compressed"):
        read_torch_zip(rewritten(tmp_path / "a.pt", lambda _, data: data, zipfile.ZIP_DEFLATED))


def test_a_file_cut_short_is_refused(tmp_path):
    torch.save({"w": torch.zeros(4096)}, tmp_path / "a.pt")
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pt")
    os.truncate(tmp_path / "b.pt", 9000)
    with pytest.raises(RewardError, match=r"b\.pt"):
        read_torch_zip(tmp_path / "b.pt")
