"""What is handed over: files that plain diffusers reads as they were trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddpo.errors import ModelError
from ddpo.models import Policy
from tests.models.test_policies import STILL, draw
from tests.tiny import build_tiny_model, grow_adapter, load_policy, tiny_config

LORA_FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OTHERS = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv_shortcut"]
EDGES = ["conv_in", "conv_out", "time_emb_proj", "linear_1", "linear_2", "downsamplers.0.conv"]


def adapted(model: Path, **settings: object) -> Policy:
    policy = load_policy(tiny_config(model, trainable={"type": "lora", **settings}))
    grow_adapter(policy)
    return policy


def plain(base: Path, lora: Path | None = None) -> StableDiffusionPipeline:
    """Load as a user does who has never heard of this project."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return pipeline


def images_of(pipeline: StableDiffusionPipeline) -> list[np.ndarray]:
    images = pipeline(
        ["a cat"] * 3,
        num_inference_steps=STILL.steps,
        guidance_scale=STILL.guidance_scale,
        eta=0.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
    ).images
    return [np.asarray(image) for image in images]


def assert_same_images(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "layers",
    [ATTENTION, OTHERS, [*ATTENTION, *OTHERS], [*ATTENTION, *EDGES], ["to_k", "ff.net.0.proj"]],
    ids=["attention", "others", "both", "edges", "two"],
)
def test_plain_diffusers_loads_every_tensor_of_an_adapter(
    tiny_model: Path, tmp_path: Path, layers: list[str]
) -> None:
    policy = adapted(tiny_model, target_modules=layers)
    policy.export(tmp_path)
    written = load_file(tmp_path / LORA_FILE)
    trained = policy.weights.state()
    assert len(written) == len(trained)
    pipeline = plain(tiny_model, tmp_path)
    read = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
    assert read.keys() == trained.keys()
    assert all(torch.equal(read[name], value) for name, value in trained.items())
    assert_same_images(images_of(pipeline), draw(policy))


def test_an_adapters_tensors_have_one_naming(tiny_model: Path, tmp_path: Path) -> None:
    adapted(tiny_model, target_modules=[*ATTENTION, *OTHERS]).export(tmp_path)
    endings = {".".join(name.split(".")[-2:]) for name in load_file(tmp_path / LORA_FILE)}
    assert endings == {"lora_A.weight", "lora_B.weight"}


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (1, 0.5)])
def test_alpha_survives_a_reader_that_takes_it_to_be_the_rank(
    tiny_model: Path, tmp_path: Path, rank: int, alpha: float
) -> None:
    """Powers of two, which multiply without rounding: images are the same to the bit."""
    policy = adapted(tiny_model, rank=rank, alpha=alpha, target_modules=[*ATTENTION, "conv1"])
    policy.export(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)  # without the header
    pipeline = plain(tiny_model)
    pipeline.load_lora_weights(dict(tensors))
    assert_same_images(images_of(pipeline), draw(policy))
    assert_same_images(images_of(plain(tiny_model, tmp_path)), draw(policy))


def test_any_alpha_is_in_the_weights_of_the_file(tiny_model: Path, tmp_path: Path) -> None:
    """By arithmetic: B A of the file is alpha / rank B A of the adapter, for every layer."""
    policy = adapted(tiny_model, rank=3, alpha=7.0, target_modules=[*ATTENTION, *OTHERS])
    policy.export(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    assert 2 * len(layers) == len(tensors)
    for layer in layers:
        down, up = (tensors[f"{layer}.lora_{side}.weight"].double() for side in "AB")
        trained = policy.pipeline.unet.get_submodule(layer.removeprefix("unet."))
        a, b = (
            side["default"].weight.detach().double() for side in (trained.lora_A, trained.lora_B)
        )
        found, expected = (torch.tensordot(x, y, ([1], [0])) for x, y in ((up, down), (b, a)))
        expected *= 7.0 / 3.0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_lora_file_has_no_settings_that_another_peft_may_not_know(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapted(tiny_model, alpha=8.0).export(tmp_path)
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_adapter_that_reads_back_otherwise_is_not_handed_over(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = UNet2DConditionModel.load_lora_adapter

    def forgetful(self: UNet2DConditionModel, state: dict, **keywords: object) -> None:
        load(self, {name: value for name, value in state.items() if "to_k" not in name}, **keywords)

    policy = adapted(tiny_model)
    monkeypatch.setattr(UNet2DConditionModel, "load_lora_adapter", forgetful)
    count = len(policy.weights.state())
    with pytest.raises(ModelError, match=rf"read back {count * 3 // 4} of {count} tensors"):
        policy.export(tmp_path)


# Full fine-tuning


def trained_whole(model: Path) -> Policy:
    policy = load_policy(tiny_config(model, trainable={"type": "full"}))
    with torch.no_grad():
        for parameter in policy.weights.parameters().values():
            parameter.mul_(1.1)
    return policy


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_only_the_unets_weights_differ(found: Path, base: Path) -> None:
    ours, theirs = files_of(found), files_of(base)
    assert ours.keys() == theirs.keys()
    differing = {name for name in ours if ours[name] != theirs[name]}
    shards = {name for name in theirs if name.startswith("unet/") and "config" not in name}
    assert differing == shards


def test_what_was_not_trained_is_the_base_models_own_file(tiny_model: Path, tmp_path: Path) -> None:
    policy = trained_whole(tiny_model)
    policy.export(tmp_path)
    assert_only_the_unets_weights_differ(tmp_path, tiny_model)
    scheduler = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_bytes())
    assert scheduler["_class_name"] == "PNDMScheduler"  # and not the one that it was trained with
    assert_same_images(images_of(plain(tmp_path)), draw(policy))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = build_tiny_model(tmp_path / "base")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    return folder


def test_a_sharded_model_keeps_its_shards(sharded: Path, tmp_path: Path) -> None:
    policy = trained_whole(sharded)
    policy.export(tmp_path / "out")
    names = {path.name for path in (sharded / "unet").iterdir()}
    assert {path.name for path in (tmp_path / "out" / "unet").iterdir()} == names
    index = "diffusion_pytorch_model.safetensors.index.json"
    ours, theirs = (
        json.loads((f / "unet" / index).read_bytes()) for f in (tmp_path / "out", sharded)
    )
    assert ours == theirs
    assert_same_images(images_of(plain(tmp_path / "out")), draw(policy))


def test_a_model_stored_in_float16_is_exported_in_float32(tmp_path: Path) -> None:
    """Training moves weights by less than 16 bits resolve."""
    base = build_tiny_model(tmp_path / "base")
    for part in ("unet", "vae"):
        file = base / part / "diffusion_pytorch_model.safetensors"
        kind = UNet2DConditionModel if part == "unet" else type(plain(base).vae)
        kind.from_pretrained(base / part).half().save_pretrained(base / part)
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}
    policy = load_policy(tiny_config(base, trainable={"type": "full"}))
    with torch.no_grad():
        for parameter in policy.weights.parameters().values():
            parameter.mul_(1 + 1e-5)
    policy.export(tmp_path / "out")
    assert_only_the_unets_weights_differ(tmp_path / "out", base)
    written = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    state = policy.weights.state()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_an_export_names_no_part_that_it_lacks(tmp_path: Path) -> None:
    """Stable Diffusion 1.x names a safety checker, which is neither downloaded nor trained with."""
    base = build_tiny_model(tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["requires_safety_checker"] = True
    (base / "model_index.json").write_text(json.dumps(index))
    policy = trained_whole(base)
    policy.export(tmp_path / "out")
    assert_same_images(images_of(plain(tmp_path / "out")), draw(policy))


def test_a_pipeline_that_reads_back_otherwise_is_not_handed_over(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"] + 1}, file, metadata)

    policy = trained_whole(tiny_model)
    monkeypatch.setattr("ddpo.models.exports.save_file", careless)
    count = len(policy.weights.state())
    with pytest.raises(ModelError, match=rf"read back {count - 1} of {count} tensors .* unet"):
        policy.export(tmp_path)


# Permissions


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=["022", "027", "077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_permissions_follow_the_umask(
    tiny_model: Path, tmp_path: Path, umask: int, kind: str
) -> None:
    load_policy(tiny_config(tiny_model, trainable={"type": kind})).export(tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        whole = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == whole & ~umask, path
