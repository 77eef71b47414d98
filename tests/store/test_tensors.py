from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpo.basics.digests import sha256_bytes
from ddpo.errors import UnreadableData
from ddpo.store import tensors as module
from ddpo.store.objects import Store
from ddpo.store.tensors import read_tensors, tensors_in, write_tensors
from tests.store.store_samples import encode_tensors, state


def decoded(folder: Path, data: bytes) -> tuple[dict[str, torch.Tensor], object]:
    file = folder / "tensors"
    file.write_bytes(data)
    return read_tensors(file)


def in_memory(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), np.uint8)


def test_tensors_and_metadata_come_back_bit_for_bit(tmp_path: Path) -> None:
    metadata = {"b": [1, 2.5, None], "a": "ü"}
    data = encode_tensors(state(), metadata)
    mapped, found = decoded(tmp_path, data)
    assert found == metadata
    expected = state()
    for tensors in (mapped, tensors_in(in_memory(data))):
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(tensors[name], tensor)


def test_views_of_one_batch_are_written_apart(tmp_path: Path) -> None:
    batch = torch.arange(6.0)
    views = {"first": batch[:3], "second": batch[3:], "all": batch, "grad": batch.requires_grad_()}
    tensors, metadata = decoded(tmp_path, encode_tensors(views))
    assert metadata is None
    assert all(torch.equal(tensors[name], view) for name, view in views.items())


def test_bytes_do_not_depend_on_the_order_of_names_or_keys() -> None:
    tensors, metadata = state(), {"b": 1, "a": {"d": 1, "c": 2}}
    backwards = dict(reversed(tensors.items()))
    assert encode_tensors(tensors, metadata) == encode_tensors(
        backwards, {"a": {"c": 2, "d": 1}, "b": 1}
    )


def test_the_header_has_one_metadata_key_of_canonical_json() -> None:
    data = encode_tensors(state(), {"b": 1, "a": [1]})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"ddpo": '{"a":[1],"b":1}'}


def test_the_digest_of_a_file_is_told_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HASHED_BYTES", 8)  # less than a tensor
    names = ['"', "é", "a\n\\", "🦊", "z"]
    every = {
        f"{name} {ours}": torch.arange(6).reshape(2, 3).to(getattr(torch, ours))
        for name, ours in itertools.product(names, module._DTYPES.values())
    }
    file = tmp_path / "tensors"
    file.touch()
    for tensors in (every, state(), {}):
        for metadata in (None, {"ü": [1, "\x7f"]}):
            told = write_tensors(tensors, file, metadata)
            assert told is not None
            assert told.result() == sha256_bytes(file.read_bytes())


def test_a_file_whose_header_is_not_foreseen_has_the_digest_of_its_bytes(
    local_store: Store, tmp_path: Path
) -> None:
    tensors = {"a": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.ones(3)}
    file = tmp_path / "tensors"
    file.touch()
    assert write_tensors(tensors, file) is None
    stored = local_store.put("a", ".bin", partial(write_tensors, tensors))
    assert local_store.get(stored) == file.read_bytes()


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_bytes_that_are_no_safetensors_are_named(tmp_path: Path, cut: int) -> None:
    with pytest.raises(UnreadableData, match="safetensors"):
        decoded(tmp_path, encode_tensors(state())[:cut])
    with pytest.raises(UnreadableData, match="safetensors"):
        tensors_in(in_memory(encode_tensors(state())[:cut]))
