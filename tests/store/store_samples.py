"""Rows and tensors that the tests of the store share with the processes that they spawn."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from pydantic import JsonValue

from ddpo.algorithms import DdpoIs
from ddpo.basics.digests import sha256_bytes
from ddpo.store import keys, tables
from ddpo.store.tensors import write_tensors

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


def rollout_rows(run_id: str = "R", epoch: int = 3, count: int = 4) -> list[tables.RolloutRow]:
    return [
        tables.RolloutRow(
            sample_id=keys.sample_id(run_id, epoch, index),
            shard=0,
            index=index,
            prompt="a lynx, «käse»",
            prompt_metadata={"questions": ["what is it?"], "answers": {"b": 1, "a": None}},
            seed=2**63 - 1 - index,
            policy_digest="p" * 64,
            sampler_digest="s" * 64,
            log_prob_mean=-1.25 if index else None,
            image_png=PNG + bytes([index]),
        )
        for index in range(count)
    ]


def reward_rows(count: int = 4) -> list[tables.RewardRow]:
    scored = [
        tables.RewardRow(
            sample_id=keys.sample_id("R", 3, index),
            reward=index / 4,
            status="ok",
            columns={"caption": f"a cat {index}", "aesthetic": 0.5 * index, "size_kb": index},
        )
        for index in range(count - 1)
    ]
    failed = tables.RewardRow(keys.sample_id("R", 3, count - 1), None, "timeout")
    return [*scored, failed]


def advantage_rows(count: int = 4) -> list[tables.AdvantageRow]:
    return [
        tables.AdvantageRow(
            keys.sample_id("R", 3, index),
            None if index == 1 else 0.5,
            "dropped" if index == 1 else "ok",
            7,
            {"advantage": 0.25 * index, "mean": 1 / 3, "std": 0.1},
        )
        for index in range(count)
    ]


def encode_advantages(rows: list[tables.AdvantageRow]) -> bytes:
    return tables.encode_advantages(rows, DdpoIs.columns)


def state() -> dict[str, torch.Tensor]:
    latents = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    return {
        "latents": latents,
        "transposed": latents.transpose(0, 2),
        "log_probs": torch.tensor([[0.1, -2.5]]).to(torch.bfloat16),
        "step": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
    }


def encode_tensors(tensors: dict[str, torch.Tensor], metadata: JsonValue = None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tensors")
        file.touch()
        write_tensors(tensors, file, metadata)
        return file.read_bytes()


def digests() -> list[str]:
    """Digests of everything that is written, in this process."""
    encoded = [
        tables.encode_rollouts(rollout_rows()),
        tables.encode_rewards(reward_rows()),
        encode_advantages(advantage_rows()),
        encode_tensors(state(), {"z": 1, "a": {"y": [1, 2.5], "b": "ü"}}),
    ]
    return [sha256_bytes(data) for data in encoded]


def filler(size: int, salt: int) -> bytes:
    """Bytes that tell a torn write from a whole one: the digest of the rest comes first."""
    rest = bytes([salt]) * size
    return hashlib.sha256(rest).digest() + rest


def is_whole(data: bytes) -> bool:
    return hashlib.sha256(data[32:]).digest() == data[:32]
