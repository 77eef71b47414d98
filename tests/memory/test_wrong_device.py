"""A tensor left on the CPU is found without a GPU: with the model on `meta`, nothing may mix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.diffusion import window
from ddpo.memory.counting import LiveBytes, WrongDevice
from ddpo.memory.estimate import estimate
from ddpo.models.base import Policy
from ddpo.models.conditioning import Conditioning
from ddpo.models.numerics import resolve_numerics
from ddpo.models.schedule import NoiseSchedule
from ddpo.training.denoising import DenoisingGradient
from ddpo.training.trajectory_gradient import TrajectoryGradient
from tests.sweeps import swept
from tests.tiny import tiny_config
from tests.tiny_families import FAMILIES, SETTINGS

ALGORITHMS: Mapping[str, dict[str, Any]] = {
    "ddpo_is": {"type": "ddpo_is", "kl_weight": 0.1},
    "ddpo_sf": {"type": "ddpo_sf"},
    "guard": {"type": "ddpo_is", "ratio": "guard"},
    "kl_mask": {"type": "ddpo_is", "clip": "kl_mask", "step_weighting": "variance"},
    "rwr": {"type": "rwr"},
    "nft": {"type": "nft", "advantages": {"type": "batch"}},
    "awm": {"type": "awm", "advantages": {"type": "batch"}, "updates_per_epoch": 2},
    "dpo": {"type": "dpo"},
    "groups": {"type": "ddpo_is", "advantages": {"type": "group", "deviation": "batch"}},
    "value network": {"type": "ddpo_is", "advantages": {"type": "value"}},
}


def run_on_meta(models: Mapping[str, Path], name: str, algorithm: str) -> None:
    config = tiny_config(models[name], **SETTINGS.get(name, {}), optimizer={"ema_decay": 0.9})
    if algorithm in ("groups", "dpo"):
        config = config.changed(rollouts=config.rollouts.changed(samples_per_prompt=4))
    config = config.changed(algorithm=ALGORITHMS[algorithm])
    estimate(config, resolve_numerics(config.numerics))


@pytest.mark.parametrize(
    ("name", "algorithm"),
    swept(
        product(["sd", *FAMILIES], ALGORITHMS),
        often=lambda name, algorithm: name == "sd" or algorithm in ("ddpo_is", "nft"),
    ),
)
def test_sampling_and_updates_keep_to_one_device(
    pipelines: Mapping[str, Path], name: str, algorithm: str
) -> None:
    run_on_meta(pipelines, name, algorithm)


def _on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def misplaced(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(function(*args, **kwargs).shape)

    return misplaced


def _plant_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpo.diffusion import sampling

    monkeypatch.setattr(sampling, "_noise", _on_cpu(sampling._noise))


def _plant_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TrajectoryGradient._next_latents
    monkeypatch.setattr(TrajectoryGradient, "_next_latents", _on_cpu(own))


def _plant_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Policy.encode

    def misplaced(self: Policy, prompts: list[str]) -> Conditioning:
        found = own(self, prompts)
        return Conditioning({k: torch.zeros(v.shape) for k, v in found.tensors.items()})

    monkeypatch.setattr(Policy, "encode", misplaced)


def _plant_times(monkeypatch: pytest.MonkeyPatch) -> None:
    own = window._process

    def misplaced(*args: Any) -> Any:
        process = own(*args)
        process.times = torch.zeros(process.times.shape)
        return process

    monkeypatch.setattr(window, "_process", misplaced)


def _plant_noising(monkeypatch: pytest.MonkeyPatch) -> None:
    own = NoiseSchedule.noised

    def misplaced(self: NoiseSchedule, clean: Any, noise: Any, times: Any) -> Any:
        return own(self, clean, torch.zeros(noise.shape), times)

    monkeypatch.setattr(NoiseSchedule, "noised", misplaced)


def _plant_others(monkeypatch: pytest.MonkeyPatch) -> None:
    own = DenoisingGradient.batch

    def misplaced(self: DenoisingGradient, *args: Any) -> Any:
        batch = own(self, *args)
        others = {name: torch.zeros(value.shape) for name, value in batch.others.items()}
        return replace(batch, others=others)

    monkeypatch.setattr(DenoisingGradient, "batch", misplaced)


def _plant_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpo.training.optimizer.held_like", lambda tensor, other: tensor)


def _plant_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddpo.training.ema.held_like", lambda tensor, other: tensor)


@pytest.mark.parametrize(
    ("plant", "algorithm"),
    [
        (_plant_noise, "ddpo_is"),
        (_plant_latents, "ddpo_is"),
        (_plant_embeddings, "ddpo_is"),
        (_plant_times, "ddpo_is"),
        (_plant_moments, "ddpo_is"),
        (_plant_average, "ddpo_is"),
        (_plant_noising, "rwr"),
        (_plant_noising, "nft"),
        (_plant_others, "nft"),
        (_plant_others, "awm"),
        (_plant_others, "dpo"),
    ],
)
def test_a_tensor_that_was_left_on_the_cpu_is_found(
    pipelines: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    algorithm: str,
) -> None:
    plant(monkeypatch)
    with pytest.raises(WrongDevice):
        run_on_meta(pipelines, "sd", algorithm)


def test_what_a_gpu_accepts_of_the_cpu_is_accepted() -> None:
    device, host = torch.zeros(4, 3, device="meta"), torch.zeros(4, 3)
    with LiveBytes():
        device + torch.tensor(1.0)  # a number
        device[torch.tensor([0, 2])]
        device.copy_(host)
        for mixed in (lambda: device + host, lambda: host[torch.zeros(1, 3, device="meta").long()]):
            with pytest.raises(WrongDevice):
                mixed()
