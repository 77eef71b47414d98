"""An exported LoRA for other programs: what they read, by their own rules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddpo.models import Policy
from ddpo.models.lora_files import kohya_base, kohya_tensors
from tests.models.test_exports import (
    ATTENTION,
    EDGES,
    OTHERS,
    adapted,
    assert_same_images,
    images_of,
    plain,
)
from tests.models.test_policies import draw

DIFFUSERS, KOHYA = "pytorch_lora_weights.safetensors", "mine-kohya.safetensors"
LAYERS = pytest.mark.parametrize(
    "layers",
    [ATTENTION, OTHERS, [*ATTENTION, *OTHERS, *EDGES]],
    ids=["attention", "others", "all"],
)


def exported(policy: Policy, folder: Path, **notes: str) -> str | None:
    return policy.export_lora(folder / DIFFUSERS, folder / KOHYA, notes)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as stored:
        return stored.metadata()


# The published layout. Names and shapes as networks/lora.py of kohya-ss/sd-scripts makes them for
# Stable Diffusion 1.5, and AUTOMATIC1111 and ComfyUI look them up.


def published(rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the layers in kohya's files of SD 1.5, written down by hand."""
    down, up = ((0, 320), (1, 640), (2, 1280)), ((1, 1280), (2, 640), (3, 320))
    places = {
        **{f"down_blocks_{i}_attentions_{j}": width for i, width in down for j in (0, 1)},
        "mid_block_attentions_0": 1280,
        **{f"up_blocks_{i}_attentions_{j}": width for i, width in up for j in (0, 1, 2)},
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for place, width in places.items():
        layers = {"proj_in": (width, width), "proj_out": (width, width)}
        inside = {
            **{f"attn1_to_{x}": (width, width) for x in ("q", "k", "v", "out_0")},
            **{f"attn2_to_{x}": (width, width) for x in ("q", "out_0")},
            **{f"attn2_to_{x}": (768, width) for x in ("k", "v")},
            "ff_net_0_proj": (width, 8 * width),
            "ff_net_2": (4 * width, width),
        }
        layers |= {f"transformer_blocks_0_{name}": shape for name, shape in inside.items()}
        for layer, (fan_in, fan_out) in layers.items():
            kernel = (1, 1) if layer.startswith("proj") else ()  # 1x1 convolutions in SD 1.x
            name = f"lora_unet_{place}_{layer}"
            shapes[f"{name}.lora_down.weight"] = (rank, fan_in, *kernel)
            shapes[f"{name}.lora_up.weight"] = (fan_out, rank, *kernel)
            shapes[f"{name}.alpha"] = ()
    return shapes


def test_names_and_shapes_are_kohyas_for_stable_diffusion_1_5() -> None:
    layers = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        unet.add_adapter(peft.LoraConfig(r=4, target_modules=layers))
    found = kohya_tensors({"unet": get_peft_model_state_dict(unet)}, 4)
    shapes = published(4)
    assert len(shapes) == 3 * 192
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    assert {float(v) for name, v in found.items() if name.endswith(".alpha")} == {4.0}
    assert kohya_base(768) == "sd_v1" and kohya_base(1024) == "sd_v2" and kohya_base(128) is None


def test_convolutions_keep_their_kernel(tiny_model: Path, tmp_path: Path) -> None:
    layers = ["conv1", "conv_shortcut", "downsamplers.0.conv"]
    exported(adapted(tiny_model, rank=3, target_modules=layers), tmp_path)
    tensors = load_file(tmp_path / KOHYA)
    for name, shape in {
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": (3, 8, 3, 3),
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": (8, 3, 1, 1),
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut.lora_down.weight": (3, 8, 1, 1),
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut.lora_up.weight": (16, 3, 1, 1),
        "lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight": (3, 8, 3, 3),
    }.items():
        assert tuple(tensors[name].shape) == shape


# The published arithmetic


def applied(weights: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply a kohya file as AUTOMATIC1111 does: W + alpha / rank * up @ down, flattened."""
    layers = {name.removesuffix(".weight").replace(".", "_"): name for name in weights}
    result = dict(weights)
    for key, down in tensors.items():
        if not key.endswith(".lora_down.weight"):
            continue
        prefix = key.removesuffix(".lora_down.weight")
        up, alpha = tensors[f"{prefix}.lora_up.weight"], float(tensors[f"{prefix}.alpha"])
        name = layers[prefix.removeprefix("lora_unet_")]
        change = up.double().flatten(1) @ down.double().flatten(1)
        scale = alpha / down.shape[0]
        result[name] = weights[name] + scale * change.reshape(weights[name].shape)
    return result


def in_float64(base: Path) -> StableDiffusionPipeline:
    pipeline = plain(base)
    pipeline.unet.double()
    return pipeline


@LAYERS
def test_both_files_make_the_same_weights(
    tiny_model: Path, tmp_path: Path, layers: list[str]
) -> None:
    exported(adapted(tiny_model, rank=3, alpha=7.0, target_modules=layers), tmp_path)
    pipeline = in_float64(tiny_model)
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    expected = applied(weights, load_file(tmp_path / KOHYA))
    pipeline.load_lora_weights(tmp_path, weight_name=DIFFUSERS)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = pipeline.unet.state_dict()
    assert fused.keys() == expected.keys()
    changed = [name for name in weights if not torch.equal(expected[name], weights[name])]
    assert 3 * len(changed) == len(load_file(tmp_path / KOHYA))
    for name, value in expected.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-14, atol=1e-14)


# What diffusers makes of them


@LAYERS
def test_plain_diffusers_draws_the_same_with_both(
    tiny_model: Path, tmp_path: Path, layers: list[str]
) -> None:
    policy = adapted(tiny_model, rank=4, alpha=8.0, target_modules=layers)
    exported(policy, tmp_path)
    images = draw(policy)
    assert_same_images(images_of(plain(tiny_model, tmp_path)), images)  # it knows which of the two
    pipeline = plain(tiny_model)
    pipeline.load_lora_weights(tmp_path, weight_name=KOHYA)
    assert_same_images(images_of(pipeline), images)
    assert not np.array_equal(images_of(plain(tiny_model))[0], images[0])


def test_rank_and_alpha_are_in_the_headers(tiny_model: Path, tmp_path: Path) -> None:
    """The alpha to apply is the rank, since alpha / rank is in the weights; notes say the rest."""
    policy = adapted(tiny_model, rank=4, alpha=8.0, target_modules=["to_k", "conv1"])
    exported(policy, tmp_path, note="a note")
    found = header(tmp_path / DIFFUSERS)
    assert json.loads(found["lora_adapter_metadata"]) == {
        "unet.r": 4,
        "unet.lora_alpha": 4,
        "unet.target_modules": ["to_k", "conv1"],
    }
    assert found["note"] == "a note" and found["format"] == "pt"
    pipeline = plain(tiny_model, tmp_path)
    (config,) = pipeline.unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (4, 4)
    found = header(tmp_path / KOHYA)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_output_name"] == "mine-kohya"
    assert found["note"] == "a note"
    assert "ss_v2" not in found  # of the tiny model, neither 1.x nor 2.x


def test_equal_adapters_make_equal_files(tiny_model: Path, tmp_path: Path) -> None:
    policy = adapted(tiny_model)
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        exported(policy, folder, **{f"note {i}": 'é "quoted"\n' for i in range(8)})
    for name in (DIFFUSERS, KOHYA):
        one, other = (tmp_path / folder / name for folder in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
        assert header(one)["note 3"] == 'é "quoted"\n'
