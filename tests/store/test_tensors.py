from __future__ import annotations

import json

import pytest
import torch

from ddpo.errors import UnreadableData
from ddpo.store.tensors import decode_tensors, encode_tensors
from tests.store.store_samples import state


def test_tensors_and_metadata_come_back_bit_for_bit() -> None:
    metadata = {"b": [1, 2.5, None], "a": "ü"}
    tensors, found = decode_tensors(encode_tensors(state(), metadata))
    assert found == metadata
    expected = state()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(tensors[name], tensor)


def test_views_of_one_batch_are_written_apart() -> None:
    batch = torch.arange(6.0)
    views = {"first": batch[:3], "second": batch[3:], "all": batch, "grad": batch.requires_grad_()}
    tensors, metadata = decode_tensors(encode_tensors(views))
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
def test_bytes_that_are_no_safetensors_are_named(cut: int) -> None:
    with pytest.raises(UnreadableData, match="safetensors"):
        decode_tensors(encode_tensors(state())[:cut])
