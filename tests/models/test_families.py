"""What every family after Stable Diffusion 2.x promises: the real conditioning, and its exports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from ddpo.config import LoraConfig, ModelConfig, RunConfig
from ddpo.diffusion.sampling import sample
from ddpo.errors import ConfigError, ModelError
from ddpo.models import check_model
from ddpo.models.flow_schedule import FlowSchedule
from ddpo.runs.start import check_denoising
from ddpo.training.loop import initial_state, update
from tests.tiny import (
    alternating_advantages,
    as_credit,
    draw,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)
from tests.tiny_families import FAMILIES, SETTINGS, build_tiny_sd3, plain_latents

PROCESSES = {
    "sdxl": ["ddim"],
    "sd3": ["flow_sde", "flow_cps", "dance_sde"],
    "flux": ["flow_sde", "flow_cps", "dance_sde"],
    "flux2": ["flow_sde", "flow_cps", "dance_sde"],
}


@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: build(folder / name) for name, build in FAMILIES.items()}


def family_config(models: Mapping[str, Path], name: str, **changes: Any) -> RunConfig:
    own = {part: dict(value) for part, value in SETTINGS[name].items()}
    for part, value in changes.items():
        own[part] = {**own.get(part, {}), **value}
    return tiny_config(models[name], **own)


@pytest.mark.parametrize("prompt", ["two cats", ""])
@pytest.mark.parametrize(
    ("name", "resolution"), [(name, size) for name in FAMILIES for size in (16, (24, 16))]
)
def test_latents_are_those_of_the_pipelines_own_call_to_the_bit(
    tiny_families: Mapping[str, Path],
    name: str,
    resolution: int | tuple[int, int],
    prompt: str,
) -> None:
    config = family_config(tiny_families, name, model={"resolution": resolution})
    policy = load_policy(config)
    ours = sample(policy, [prompt], [5], config.sampler.at_inference(0.0)).latents[:, -1]
    theirs = plain_latents(policy, prompt, **config.sampler.at_inference(0.0).pipeline_arguments)
    assert torch.equal(ours, theirs)
    other = sample(policy, ["a dog"], [5], config.sampler.at_inference(0.0)).latents[:, -1]
    assert not torch.equal(ours, other)


@pytest.mark.parametrize(
    ("name", "process"), [(name, each) for name, known in PROCESSES.items() for each in known]
)
def test_the_initial_ratio_is_exactly_1_and_an_update_moves_the_weights(
    tiny_families: Mapping[str, Path], name: str, process: str
) -> None:
    config = family_config(
        tiny_families,
        name,
        sampler={"type": process},
        algorithm={"type": "ddpo_is", "updates_per_epoch": 1},
    )
    policy = load_policy(config)
    drawn = draw(policy, config)
    before = {key: value.clone() for key, value in policy.weights.state().items()}
    credit = as_credit(alternating_advantages(8))
    after, metrics = update(policy, initial_state(policy), rollouts_of(drawn), credit, {}, config)
    assert metrics["initial_ratio_deviation"]["max"] == 0.0
    assert any(not torch.equal(after.weights[key], value) for key, value in before.items())
    assert torch.isfinite(torch.tensor(metrics["loss"]))


_PLAIN_DIFFUSERS = """
import sys
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

torch.set_num_threads(1)
base, lora, out = sys.argv[1:4]
arguments = eval(sys.argv[4])
pipeline = DiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights(lora)
if hasattr(pipeline, "unet"):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
for seed in range(2):
    generator = torch.Generator().manual_seed(seed)
    image = pipeline(
        prompt="a cat", height=16, width=16, generator=generator, **arguments
    ).images[0]
    image.save(f"{out}/{seed}.png")
assert "ddpo" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_lora_draws_the_same_pictures_in_plain_diffusers(
    tiny_families: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    config = family_config(tiny_families, name, trainable={"type": "lora", "alpha": 8.0})
    policy = load_policy(config)
    still = config.sampler.at_inference(0.0)
    base = [np.asarray(sample(policy, ["a cat"], [seed], still).images[0]) for seed in range(2)]
    grow_adapter(policy)
    ours = [np.asarray(sample(policy, ["a cat"], [seed], still).images[0]) for seed in range(2)]
    policy.export(tmp_path / "lora")
    arguments = {**still.pipeline_arguments, **policy.pipeline_arguments}
    subprocess.run(
        [
            *(sys.executable, "-c", _PLAIN_DIFFUSERS),
            *map(str, (tiny_families[name], tmp_path / "lora", tmp_path, arguments)),
        ],
        check=True,
        cwd=tmp_path,
        timeout=900,
    )
    for seed in range(2):
        theirs = np.asarray(Image.open(tmp_path / f"{seed}.png"))
        assert np.array_equal(theirs, ours[seed])
        assert not np.array_equal(theirs, base[seed])
    with safe_open(tmp_path / "lora/pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
    part = policy.parts[0]
    assert names and all(key.startswith(f"{part}.") for key in names)
    bad = ("default", "module.", "base_model")
    assert not any(each in key for key in names for each in bad)


def test_zeros_stand_for_the_empty_prompt_where_sdxl_was_trained_so(
    tiny_families: Mapping[str, Path],
) -> None:
    policy: Any = load_policy(family_config(tiny_families, "sdxl"))
    assert not any(tensor.any() for tensor in policy._unconditional().tensors.values())
    assert all(tensor.any() for tensor in policy.encode([""]).tensors.values())


@pytest.mark.parametrize("t5", [True, False])
def test_t5_can_be_left_out_and_is_then_zeros(tmp_path: Path, t5: bool) -> None:
    folder = build_tiny_sd3(tmp_path / "model", t5=t5)
    config = tiny_config(folder, **{**SETTINGS["sd3"], "model": {"t5": False, "text_tokens": 3}})
    policy = load_policy(config)
    assert "text_encoder_3" not in policy.parts
    text = policy.encode(["a cat"])["text"]
    assert text.shape[1] == 24 + 3
    assert not text[:, 24:].any()


def test_a_dynamic_shift_follows_the_size_of_the_images(tmp_path: Path) -> None:
    folder = build_tiny_sd3(tmp_path / "model", dynamic=True)
    policy = load_policy(tiny_config(folder, **SETTINGS["sd3"]))
    schedule = policy.schedule
    assert isinstance(schedule, FlowSchedule) and schedule.tokens == 16
    with policy.sized((32, 16)):
        larger = policy.schedule
        assert isinstance(larger, FlowSchedule) and larger.tokens == 32
        assert larger.sigmas(4)[1] > schedule.sigmas(4)[1]
    assert policy.schedule == schedule


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sd3", {"sampler": {"type": "ddim"}}, "needs a diffusion model.*is a flow-matching model"),
        ("sdxl", {"sampler": {"type": "flow_sde"}}, "needs a flow-matching model.*set it to ddim"),
        ("sd3", {"evaluation": {"eta": 0.5}}, r"evaluation: eta is 0\.5, which models of flow"),
        ("sdxl", {"model": {"t5": False}}, r"model\.t5 means nothing"),
        (
            "sd3",
            {"evaluation": {"resolution": 18}},
            "evaluation: resolution 18x18 .* of 4, ",
        ),
        ("flux", {"model": {"resolution": 18}}, "not a multiple of 4, .* token of 2 latent pixels"),
    ],
)
def test_what_does_not_fit_the_family_is_refused_before_loading(
    tiny_families: Mapping[str, Path], name: str, changes: dict[str, Any], message: str
) -> None:
    config = family_config(tiny_families, name, **changes)
    with pytest.raises(ConfigError, match=message):
        check_denoising(config)


def test_a_distilled_flux_2_is_refused(tiny_families: Mapping[str, Path], tmp_path: Path) -> None:
    config = changed(tiny_families["flux2"], tmp_path / "copy", "transformer")
    index = tmp_path / "copy/model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    with pytest.raises(ModelError, match=r"distilled to a few steps, like FLUX\.2-klein-4B"):
        check_model(config)


def changed(folder: Path, copy: Path, part: str, **changes: Any) -> ModelConfig:
    """Copy a model with another config of one part."""
    import shutil

    shutil.copytree(folder, copy)
    file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return ModelConfig(path=str(copy))


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("flux", "transformer", {"guidance_embeds": False}, "distilled to a few steps.*schnell"),
        ("flux", "transformer", {"in_channels": 48}, "takes 12 channels, latents have 8"),
        ("sd3", "transformer", {"pooled_projection_dim": 9}, "width 9, its text encoders make 40"),
        ("sd3", "transformer", {"joint_attention_dim": 9}, "joint_attention_dim: 9"),
        ("sd3", "text_encoder_3", {"quantization_config": {}}, "text_encoder_3 is quantised"),
        ("sd3", "scheduler", {"stochastic_sampling": True}, "sets stochastic_sampling"),
        ("sdxl", "unet", {"projection_class_embeddings_input_dim": 44}, "the refiner reads five"),
        ("flux2", "transformer", {"guidance_embeds": True}, "guidance as an input"),
        ("flux2", "transformer", {"in_channels": 48}, "takes 12 channels, latents have 8"),
        ("sdxl", "unet", {"time_cond_proj_dim": 8}, "distilled for guidance"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_by_name(
    tiny_families: Mapping[str, Path],
    tmp_path: Path,
    name: str,
    part: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = changed(tiny_families[name], tmp_path / "copy", part, **changes)
    with pytest.raises(ModelError, match=message):
        check_model(config)


def test_another_autoencoder_decodes_and_is_part_of_the_base_digest(
    tiny_families: Mapping[str, Path], tmp_path: Path
) -> None:
    own = load_policy(family_config(tiny_families, "sdxl"))
    own.pipeline.vae.decoder.conv_out.bias.data += 0.5
    own.pipeline.vae.save_pretrained(tmp_path / "vae")
    config = family_config(tiny_families, "sdxl", model={"vae": str(tmp_path / "vae")})
    other = load_policy(config)
    assert other.base_digest != own.base_digest
    latents = torch.zeros(1, *own.latent_shape)
    expected, found = (np.asarray(each.decode(latents)[0]) for each in (own, other))
    assert np.array_equal(expected, found)
    with pytest.raises(ModelError, match=r"model\.vae .* neither a folder here nor"):
        load_policy(family_config(tiny_families, "sdxl", model={"vae": "/nowhere/at/all"}))


@pytest.mark.parametrize("name", FAMILIES)
def test_full_fine_tuning_exports_a_pipeline_that_diffusers_loads(
    tiny_families: Mapping[str, Path], tmp_path: Path, name: str
) -> None:
    own = load_policy(family_config(tiny_families, "sdxl"))
    own.pipeline.vae.save_pretrained(tmp_path / "vae")
    changes: dict[str, Any] = {"trainable": {"type": "full"}}
    if name == "sdxl":
        changes["model"] = {"vae": str(tmp_path / "vae")}
    policy = load_policy(family_config(tiny_families, name, **changes))
    with torch.no_grad():
        for parameter in policy.weights.parameters().values():
            parameter.mul_(1.1)
    policy.export(tmp_path / "out")
    exported = load_policy(tiny_config(tmp_path / "out", **SETTINGS[name]))
    still = policy_sampler(name)
    ours, theirs = (
        sample(each, ["a cat"], [1], still).latents[:, -1] for each in (policy, exported)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def policy_sampler(name: str) -> Any:
    return tiny_config("model", **SETTINGS[name]).sampler.at_inference(0.0)


PUBLISHED = {
    # As their config.json on the Hub; parameters as counted there.
    "SDXL base": (
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
    "FLUX.1-dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 11_901_408_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_are_those_of_the_classes_and_adapters_find_their_layers(name: str) -> None:
    kind, settings, parameters = PUBLISHED[name]
    with torch.device("meta"):
        network: Any = kind(**settings)
    assert sum(p.numel() for p in network.parameters()) == parameters
    layers = [each for each, _ in network.named_modules()]
    for target in LoraConfig().target_modules:
        assert any(layer.endswith(f".{target}") for layer in layers)


def test_a_single_file_of_xl_is_converted_as_one(
    tiny_families: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversion itself needs configs from the Hub; stands for what it returns."""
    monkeypatch.setattr("ddpo.models.single_file.constants.HF_HOME", str(tmp_path / "home"))
    made = StableDiffusionXLPipeline.from_pretrained(tiny_families["sdxl"])
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", lambda _: made)
    file = tmp_path / "xl.safetensors"
    save_file({"conditioner.embedders.1.model.ln_final.weight": torch.zeros(1)}, file)
    assert check_model(ModelConfig(path=str(file))).latent_shape == (4, 8, 8)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2"])
def test_regression_trains_a_flow_on_samples_without_noise(
    tiny_families: Mapping[str, Path], name: str
) -> None:
    config = family_config(
        tiny_families,
        name,
        sampler={"type": "ode"},
        algorithm={"type": "rwr", "updates_per_epoch": 5},
        optimizer={"learning_rate": 1e-3},
    )
    policy = load_policy(config)
    drawn = draw(policy, config)
    before = {key: value.clone() for key, value in policy.weights.state().items()}
    credit = {"reward": torch.zeros(8), "weight": torch.linspace(0.1, 2.0, 8)}
    after, metrics = update(policy, initial_state(policy), rollouts_of(drawn), credit, {}, config)
    assert 0 < metrics["loss"] < 100
    assert any(not torch.equal(after.weights[key], value) for key, value in before.items())
