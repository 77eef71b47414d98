from __future__ import annotations

import hashlib
import json

import pytest
import torch

from ddpo.basics.digests import canonical_json, json_digest, sha256_bytes, tensors_digest


def test_canonical_json_is_one_form_whatever_the_order_of_the_keys() -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": True, "c": (1,)}}
    expected = '{"a":{"c":[1],"ü":true},"b":[1,2.5,null]}'.encode()
    assert canonical_json(value) == expected
    assert canonical_json(dict(reversed(value.items()))) == expected
    assert canonical_json(json.loads(expected)) == expected
    assert json_digest(value) == hashlib.sha256(expected).hexdigest()


def test_canonical_json_tells_numbers_and_truth_values_apart() -> None:
    assert len({json_digest(value) for value in (1, 1.0, True, "1")}) == 4


@pytest.mark.parametrize("value", [float("nan"), {"a": [float("inf")]}, "\ud800"])
def test_canonical_json_refuses_what_json_cannot_say(value: object) -> None:
    with pytest.raises(ValueError):
        canonical_json(value)


@pytest.mark.parametrize("value", [{1: "a"}, {"a": [{None: 1}]}, {"a": {1, 2}}, torch.zeros(1)])
def test_canonical_json_refuses_keys_and_values_of_other_types(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_digest_of_bytes_is_sha256_in_hex() -> None:
    assert sha256_bytes(b"abc").startswith("ba7816bf8f01cfea")


def test_digest_of_tensors_ignores_order_strides_and_gradients() -> None:
    a, b = torch.randn(3, 4), torch.randn(2)
    strided = a.t().contiguous().t()
    assert not strided.is_contiguous()
    leaf = b.clone().requires_grad_()
    assert tensors_digest({"a": a, "b": b}) == tensors_digest({"b": leaf, "a": strided})


def test_digest_of_tensors_sees_name_dtype_shape_and_every_bit() -> None:
    base = torch.zeros(2, 3)
    bit = base.clone()
    bit.view(torch.int32)[1, 2] = 1
    variants = [
        {"a": base},
        {"b": base},
        {"a": bit},
        {"a": base.reshape(3, 2)},
        {"a": base.to(torch.int32)},
        {"a": base[:1], "b": base[1:]},
        {"a": torch.zeros(0)},
        {"a": torch.tensor(0.0)},
        {"a": torch.tensor([0.0])},
        {},
    ]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)


def test_digest_of_tensors_is_over_the_documented_bytes() -> None:
    value = torch.tensor([1.0, -2.0]).to(torch.bfloat16)  # 0x3f80, 0xc000
    stream = b'["w","bfloat16",[2]]\n' + bytes.fromhex("803f00c0")
    assert tensors_digest({"w": value}) == hashlib.sha256(stream).hexdigest()
