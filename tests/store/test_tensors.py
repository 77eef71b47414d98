from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddpo.errors import UnreadableData
from ddpo.store.tensors import read_tensors
from tests.store.store_samples import encode_tensors, state


def decoded(folder: Path, data: bytes) -> tuple[dict[str, torch.Tensor], object]:
    file = folder / "tensors"
    file.write_bytes(data)
    return read_tensors(file)


def test_tensors_and_metadata_come_back_bit_for_bit(tmp_path: Path) -> None:
    metadata = {"b": [1, 2.5, None], "a": "ü"}
    tensors, found = decoded(tmp_path, encode_tensors(state(), metadata))
    assert found == metadata
    expected = state()
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


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_bytes_that_are_no_safetensors_are_named(tmp_path: Path, cut: int) -> None:
    with pytest.raises(UnreadableData, match="safetensors"):
        decoded(tmp_path, encode_tensors(state())[:cut])
