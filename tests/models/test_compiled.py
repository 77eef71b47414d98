"""`numerics.compile`: what compiled blocks compute, and which promises hold with them.

Kernels are kept in torch's cache on this machine: a first run of these tests takes minutes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._inductor import config as inductor

from ddpo.config import RunConfig
from ddpo.errors import ConfigError
from ddpo.models import Policy
from ddpo.models.compiled import check_compiler
from ddpo.models.numerics import resolve_elsewhere, resolve_numerics
from ddpo.runs.start import check_run
from ddpo.training.loop import initial_state, update
from ddpo.training.state import TrainState
from tests.checks import check_initial_ratio_is_one, take_gradients
from tests.configs import parse
from tests.epochs import run_epoch
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    build_tiny_model,
    draw,
    flat,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)
from tests.tiny_families import SETTINGS, build_tiny_sd3

BATCH = 4  # as in `tiny_config`


def config_of(folder: Path, /, *, compiled: bool = True, **numerics: Any) -> RunConfig:
    settings = SETTINGS["sd3"] if (folder / "transformer").exists() else {}
    model = {"path": str(folder), **settings.get("model", {})}
    numerics = {"compile": compiled, **numerics}
    return tiny_config(folder, **{**settings, "model": model, "numerics": numerics})


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sd3(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("unet") / "model")


def grown(config: RunConfig) -> Policy:
    policy = load_policy(config)
    grow_adapter(policy)
    return policy


def predict(policy: Policy, batch: int = BATCH) -> Tensor:
    latents = torch.randn(batch, *policy.latent_shape, generator=torch.Generator().manual_seed(3))
    times = torch.linspace(100, 900, batch)
    conditioning = policy.encode([PROMPTS[i] for i in range(batch)])
    return policy.predict(latents, times, conditioning, 3.0)  # as the samplers: the same kernels


@torch.no_grad()
def foresee(policy: Policy, **settings: Any) -> Tensor:
    return predict(policy, **settings)


# What is computed


@pytest.mark.faults  # minutes of compilers
@pytest.mark.parametrize("family", ["sd3", "unet"])
def test_predictions_and_gradients_are_those_without_compiling(
    request: pytest.FixtureRequest, family: str
) -> None:
    found = []
    for compiled in (True, False):
        policy = grown(config_of(request.getfixturevalue(family), compiled=compiled))
        output = predict(policy)
        output.square().mean().backward()
        found.append((output.detach(), flat(take_gradients(policy))))
        # Sampling runs the very kernels of the update.
        assert torch.equal(foresee(policy), found[-1][0])
        assert not foresee(policy).requires_grad
    (output, gradient), (plain, expected) = found
    assert not torch.equal(output, plain), "nothing was compiled"
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.faults  # minutes of compilers
def test_a_batch_of_another_size_computes_as_without_compiling(sd3: Path) -> None:
    compiled, plain = (grown(config_of(sd3, compiled=each)) for each in (True, False))
    assert torch.equal(foresee(compiled, batch=3), foresee(plain, batch=3))
    assert not torch.equal(foresee(compiled), foresee(plain))


@pytest.mark.faults  # minutes of compilers
def test_every_set_of_weights_is_computed_with(sd3: Path) -> None:
    found = []
    for compiled in (True, False):
        policy = grown(config_of(sd3, compiled=compiled))
        trained = foresee(policy)
        other = {name: 2 * value.detach().clone() for name, value in policy.weights.state().items()}
        policy.weights.keep("average", other)
        policy.weights.keep("old", {name: value / 8 for name, value in other.items()})
        sets = [trained]
        for name in ("base", "average", "old"):
            with policy.weights.use(name):
                sets.append(foresee(policy))
        assert torch.equal(foresee(policy), trained)
        found.append(sets)
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
    for i, one in enumerate(found[0]):  # and no two are alike
        assert all(float((one - each).abs().max()) > 1e-3 for each in found[0][i + 1 :])


@pytest.mark.faults  # minutes of compilers
def test_gradient_checkpointing_changes_no_bit(sd3: Path) -> None:
    found = []
    for checkpointing in (False, True):
        policy = grown(config_of(sd3, gradient_checkpointing=checkpointing))
        predict(policy).square().mean().backward()
        found.append(take_gradients(policy))
    assert_same_tensors(found[1], found[0])


@pytest.mark.faults  # minutes of compilers
def test_gradient_checkpointing_of_a_unet_changes_rounding_alone(unet: Path) -> None:
    """It compiles smaller blocks."""
    found = []
    for compiled in (True, False):
        config = config_of(unet, compiled=compiled, gradient_checkpointing=True)
        policy = grown(config)
        predict(policy).square().mean().backward()
        found.append(flat(take_gradients(policy)))
    assert 0 < float((found[0] - found[1]).norm() / found[1].norm()) < 1e-5


# What is promised


@pytest.mark.faults  # minutes of compilers
def test_the_initial_ratio_is_exactly_1_where_the_update_sees_the_samplers_batches(
    sd3: Path,
) -> None:
    config = config_of(sd3)
    check_initial_ratio_is_one(grown(config), config)


@pytest.mark.faults  # minutes of compilers
def test_the_initial_ratio_is_1_within_rounding_otherwise(sd3: Path) -> None:
    config = config_of(sd3)
    policy = grown(config)
    drawn, credit = rollouts_of(draw(policy, config)), as_credit(alternating_advantages(8))
    other = config_of(sd3, micro_batch_size=40)  # more than there are: they are not compiled
    policy = grown(other)
    _, metrics = update(policy, initial_state(policy), drawn, credit, {}, other)
    assert 0 < metrics["initial_ratio_deviation"]["max"] < 5e-6


@pytest.mark.faults  # minutes of compilers
def test_weights_and_exports_have_the_names_that_they_have_without(
    sd3: Path, tmp_path: Path
) -> None:
    names = []
    for compiled in (True, False):
        config = config_of(sd3, compiled=compiled)
        policy = grown(config)
        state = run_epoch(policy, initial_state(policy), config).state
        policy.export(tmp_path / str(compiled))
        exported = load_file(tmp_path / str(compiled) / "pytorch_lora_weights.safetensors")
        network = policy.weights.network.state_dict()
        names.append([list(each) for each in (state.weights, state.optimizer, exported, network)])
    assert names[0] == names[1]
    assert not [name for each in names[0] for name in each if "_orig_mod" in name]


@pytest.mark.faults  # minutes of compilers
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_another_process_continues_in_the_same_bytes(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    config = config_of(sd3)
    policy = load_policy(config)
    first = run_epoch(policy, initial_state(policy), config)
    straight = run_epoch(policy, first.state, config)
    save_file(dict(first.state.weights), tmp_path / "weights.safetensors")
    save_file(dict(first.state.optimizer), tmp_path / "optimizer.safetensors")
    if cache == "cold":  # as on a machine that has never compiled
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        resumed = pool.apply(second_epoch, (config.whole(), tmp_path, first.state.updates))
    assert resumed == straight.digest != first.digest


def second_epoch(whole: dict[str, Any], folder: Path, updates: int) -> str:
    config = RunConfig.model_validate(whole)
    weights = load_file(folder / "weights.safetensors")
    optimizer = load_file(folder / "optimizer.safetensors")
    policy = load_policy(config)
    foresee(policy, batch=3)  # another process need not see the same batches in the same order
    policy.weights.load(weights)
    state = TrainState(weights, optimizer, {}, epoch=1, updates=updates, samples=8)
    return run_epoch(policy, state, config).digest


# Where it cannot be


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    check_compiler.cache_clear()
    yield
    check_compiler.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_nothing_starts(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_model,
        numerics={"compile": True},
        storage={"root": str(tmp_path / "store")},
        outputs=str(tmp_path / "outputs"),
    )
    with pytest.raises(ConfigError) as caught:
        check_run(config, "compiled")
    message = str(caught.value)
    assert "no-such-compiler" in message and "numerics.compile: false" in message
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        load_policy(config)


def test_another_device_computes_without() -> None:
    numerics = resolve_numerics(parse(numerics={"device": "cpu", "compile": True}).numerics)
    assert numerics.compile
    there = numerics.model_copy(update={"device": "cuda", "device_name": "a GPU"})
    assert not resolve_elsewhere(there, "cpu").compile


def test_off_is_no_part_of_a_runs_numerics() -> None:
    off, on = (
        resolve_numerics(parse(numerics={"device": "cpu", "compile": each}).numerics)
        for each in (False, True)
    )
    assert "compile" not in off.model_dump(mode="json")
    assert on.model_dump(mode="json")["compile"] is True
    assert off != on


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_full_fine_tuning_by_several_processes_is_refused(engine: str) -> None:
    changes: dict[str, Any] = {
        "trainable": {"type": "full"},
        "engine": {"type": engine, "workers": 2},
        "optimizer": {"learning_rate": 1e-5},
    }
    assert not parse(**changes).numerics.compile
    with pytest.raises(ConfigError, match=r"set engine\.type to local"):
        parse(**changes, numerics={"compile": True})
    assert parse(**{**changes, "engine": "local"}, numerics={"compile": True}).numerics.compile
