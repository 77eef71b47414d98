"""Models that cannot be trained are refused by name, without loading and before anything starts.

Each is a pipeline of the real classes.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from ddpo.config import DdimSampler, ModelConfig
from ddpo.diffusion.sampling import sample, sampler_digest
from ddpo.errors import ConfigError, ModelError
from ddpo.models import check_model, hub
from ddpo.models.stable_diffusion import StableDiffusion
from ddpo.runs.start import check_run
from ddpo.store import keys
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli.doctor import examine
from tests.tiny import assert_same_tensors, load_policy, tiny_config

UNET = "unet/diffusion_pytorch_model.safetensors"
STILL = DdimSampler(steps=4, guidance_scale=3.0, eta=0.0)

Change = Callable[[Path], None]


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "copy")
    return tmp_path / "copy"


def edit(name: str, **changes: Any) -> Change:
    """Change keys of a JSON file; None removes them."""

    def apply(folder: Path) -> None:
        file = folder / name
        settings = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return apply


def unet(**changes: Any) -> Change:
    """Put a UNet of other settings in place of the model's."""

    def apply(folder: Path) -> None:
        settings = dict(UNet2DConditionModel.load_config(folder / "unet"))
        UNet2DConditionModel.from_config({**settings, **changes}).save_pretrained(folder / "unet")

    return apply


def scheduler(name: str, **settings: Any) -> Change:
    """Put another scheduler in place of the model's."""

    def apply(folder: Path) -> None:
        made = getattr(diffusers, name)
        if name in ("FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"):
            made().save_pretrained(folder / "scheduler")
        else:
            old = json.loads((folder / "scheduler/scheduler_config.json").read_text())
            made.from_config(old, **settings).save_pretrained(folder / "scheduler")
        edit("model_index.json", scheduler=["diffusers", name])(folder)

    return apply


def truncated(name: str, kept: float = 0.5) -> Change:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(kept * len(data))])

    return apply


def sharded(folder: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / UNET).unlink()
    model.save_pretrained(folder / "unet", max_shard_size="40KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2


def without_a_shard(folder: Path) -> None:
    sharded(folder)
    next((folder / "unet").glob("*-00002-of-*.safetensors")).unlink()


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / UNET), folder / "unet/diffusion_pytorch_model.bin")
    (folder / UNET).unlink()


def with_other_headers(folder: Path) -> None:
    """Weights of an inpainting model under the config of an ordinary one."""
    config = (folder / "unet/config.json").read_text()
    unet(in_channels=9)(folder)
    (folder / "unet/config.json").write_text(config)


UNFIT: Mapping[str, tuple[Change, str]] = {
    "SDXL pipeline": (
        edit("model_index.json", _class_name="StableDiffusionXLPipeline"),
        "cannot be loaded as a StableDiffusionXLPipeline: text_encoder_2/config.json",
    ),
    "SDXL UNet": (
        edit("unet/config.json", addition_embed_type="text_time"),
        "like Stable Diffusion XL's",
    ),
    "inpainting": (unet(in_channels=9), "an inpainting model: its UNet takes 9 channels"),
    "InstructPix2Pix": (unet(in_channels=8), "InstructPix2Pix: its UNet takes 8 channels"),
    "learned variance": (unet(out_channels=8), "its variance is learned"),
    "LCM UNet": (unet(time_cond_proj_dim=8), "distilled for guidance"),
    "class labels": (unet(num_class_embeds=4), "also reads a class"),
    "other text encoder": (unet(cross_attention_dim=24), "embeddings of width 24.*makes 16"),
    "other UNet": (edit("unet/config.json", _class_name="UNet3DConditionModel"), "UNet3D"),
    "quantised": (
        edit("unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "its unet is quantised",
    ),
    "flow matching": (
        scheduler("FlowMatchEulerDiscreteScheduler"),
        "its scheduler is FlowMatchEulerDiscreteScheduler, of a flow-matching model",
    ),
    "flow sigmas": (scheduler("UniPCMultistepScheduler", use_flow_sigmas=True), "flow-matching"),
    "LCM": (scheduler("LCMScheduler"), "its scheduler is LCMScheduler.*distilled to a few steps"),
    "EDM": (scheduler("EDMEulerScheduler"), "its scheduler is EDMEulerScheduler"),
    "turbo": (
        scheduler("EulerDiscreteScheduler", timestep_spacing="trailing"),
        "that of a turbo model.*'leading'",
    ),
    "continuous times": (
        scheduler("EulerDiscreteScheduler", timestep_type="continuous"),
        "its times are continuous",
    ),
    "predicts the sample": (
        scheduler("DDIMScheduler", prediction_type="sample"),
        "expected 'epsilon' or 'v_prediction'",
    ),
    "only a pickle": (
        as_pickle,
        r"as a pickle only.*convert it once.*save_pretrained\('NEW_FOLDER'",
    ),
    "no weights": (lambda folder: (folder / UNET).unlink(), "unet has no weights in safetensors"),
    "truncated": (truncated(UNET), f"{UNET} is truncated or damaged"),
    "almost whole": (truncated(UNET, 0.9999), f"{UNET} is truncated or damaged"),
    "empty": (truncated("vae/diffusion_pytorch_model.safetensors", 0), "vae.* is truncated"),
    "a shard is missing": (without_a_shard, "00002-of-.*is missing from unet"),
    "headers of another": (with_other_headers, r"conv_in.weight is \[8, 9, 3, 3\].*in_channels: 4"),
    "no config": (lambda folder: (folder / "unet/config.json").unlink(), "unet/config.json cannot"),
    "broken config": (truncated("vae/config.json"), "vae/config.json cannot be read"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_cannot_be_trained_is_refused_before_its_run_has_a_name(
    copy: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change, message = UNFIT[name]
    change(copy)

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("ddpo.models.pipeline_policy.PipelinePolicy._loaded", load)
    root = f"memory://{uuid.uuid4().hex}"
    config = tiny_config(copy, storage={"root": root}, outputs=str(tmp_path / "outputs"))
    with pytest.raises(ModelError, match=message) as refused:
        check_run(config, "r")
    assert str(copy) in str(refused.value) and "\n" not in str(refused.value)
    assert not Store.open(root).exists(keys.run_key("r"))
    (finding,) = [each for each in examine(config) if each.part == "model"]
    assert not finding.ok and finding.message == str(refused.value)
    with pytest.raises(ModelError, match=message):  # a worker too
        load_policy(config)


def test_target_modules_that_match_nothing_are_refused_before_loading(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, trainable={"type": "lora", "target_modules": ["to_nowhere"]})
    with pytest.raises(ConfigError, match="match no layer"):
        check_run(config, "r")


@pytest.mark.parametrize(
    ("change", "sampler", "message"),
    [
        (lambda folder: None, {"steps": 1000}, r"sampler\.steps is 1000.*at most 999"),
        (
            scheduler("DDIMScheduler", timestep_spacing="trailing", rescale_betas_zero_snr=True),
            {},
            "at timestep 999 its input is pure noise",
        ),
    ],
)
def test_a_sampler_that_does_not_fit_the_model_is_refused_before_its_run_has_a_name(
    copy: Path, tmp_path: Path, change: Change, sampler: dict[str, int], message: str
) -> None:
    change(copy)
    root = f"memory://{uuid.uuid4().hex}"
    config = tiny_config(
        copy, storage={"root": root}, sampler=sampler, outputs=str(tmp_path / "outputs")
    )
    with pytest.raises((ConfigError, ModelError), match=message) as refused:
        check_run(config, "r")
    assert not Store.open(root).exists(keys.run_key("r"))
    (finding,) = [each for each in examine(config) if each.part == "model"]
    assert not finding.ok and finding.message == str(refused.value)


def test_a_model_without_a_size_asks_for_one(copy: Path) -> None:
    edit("unet/config.json", sample_size=None)(copy)
    with pytest.raises(ConfigError, match=r"no size of its own.*set model\.resolution"):
        check_model(ModelConfig(path=str(copy)))
    assert check_model(ModelConfig(path=str(copy), resolution=32)).size == (32, 32)


@pytest.mark.parametrize("resolution", [17, (32, 17)])
def test_a_resolution_that_latents_cannot_have_is_refused_before_loading(
    tiny_model: Path, resolution: int | tuple[int, int]
) -> None:
    with pytest.raises(ConfigError, match=r"17.* is not a multiple of 2"):
        check_model(ModelConfig(path=str(tiny_model), resolution=resolution))


def test_weights_that_are_not_finite_are_said_to_be_the_base_models(copy: Path) -> None:
    tensors = load_file(copy / UNET)
    tensors["conv_in.weight"][0, 0] = torch.nan
    save_file(tensors, copy / UNET, {"format": "pt"})
    message = r"conv_in\.weight in .*unet holds NaN .*base model itself \(checkpoint 0\)"
    with pytest.raises(ModelError, match=message):
        load_policy(tiny_config(copy))


# What is loaded


def test_the_inspection_says_what_loading_finds(tiny_model: Path, tiny_v_model: Path) -> None:
    for folder in (tiny_model, tiny_v_model):
        facts = check_model(ModelConfig(path=str(folder), resolution=(32, 16)))
        policy = load_policy(tiny_config(folder, model={"resolution": [32, 16]}))
        assert (facts.size, facts.latent_shape) == (policy.size, policy.latent_shape)
        assert policy.latent_shape == (4, 8, 16)
        loaded = policy.pipeline.scheduler.config
        assert facts.schedule.prediction_type == loaded.prediction_type
        assert torch.equal(facts.schedule.alphas_cumprod, policy.pipeline.scheduler.alphas_cumprod)


def test_a_size_may_be_a_pair_of_height_and_width(copy: Path) -> None:
    edit("unet/config.json", sample_size=[8, 16])(copy)
    policy = load_policy(tiny_config(copy))
    assert policy.size == (32, 16)
    (image,) = sample(policy, ["a cat"], [0], STILL).images
    assert image.size == (32, 16)
    plain = StableDiffusionPipeline.from_pretrained(copy)
    plain.scheduler = diffusers.DDIMScheduler.from_config(plain.scheduler.config)
    source = torch.Generator().manual_seed(0)
    (theirs,) = plain(
        "a cat", num_inference_steps=4, guidance_scale=3.0, eta=0.0, generator=source
    ).images
    assert np.array_equal(np.asarray(image), np.asarray(theirs))


SCHEDULERS: Mapping[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DPMSolverMultistepScheduler": {},  # lambda_min_clipped is minus infinity
    "DPMSolverSinglestepScheduler": {"algorithm_type": "dpmsolver++"},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "UniPCMultistepScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_for_sampling_changes_nothing_but_how_plain_diffusers_samples(
    copy: Path, name: str
) -> None:
    expected = sampler_digest(load_policy(tiny_config(copy)), STILL)
    scheduler(name, **SCHEDULERS[name], timestep_spacing="leading")(copy)
    policy = load_policy(tiny_config(copy))
    assert sampler_digest(policy, STILL) == expected
    edit("scheduler/scheduler_config.json", solver_order=3, lower_order_final=False)(copy)
    assert sampler_digest(load_policy(tiny_config(copy)), STILL) == expected


def test_betas_written_out_are_part_of_the_samplers_digest(copy: Path) -> None:
    digests = []
    for end in (0.02, 0.03):
        betas = np.linspace(0.0001, end, 1000).tolist()
        scheduler("DDIMScheduler", trained_betas=betas)(copy)
        digests.append(sampler_digest(load_policy(tiny_config(copy)), STILL))
    assert digests[0] != digests[1]


def in_fp16(folder: Path) -> None:
    """Leave the weights of a variant alone, as many folders of the Hub are."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    pipeline.save_pretrained(folder, variant="fp16", safe_serialization=True)
    assert not (folder / UNET).exists()


def unet_in_fp16(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")


@pytest.mark.parametrize("change", [in_fp16, unet_in_fp16, sharded])
def test_variants_and_shards_are_loaded_and_part_of_the_digest(
    tiny_model: Path, copy: Path, change: Change
) -> None:
    change(copy)
    check_model(ModelConfig(path=str(copy)))
    policy, whole = load_policy(tiny_config(copy)), load_policy(tiny_config(tiny_model))
    assert_same_tensors(policy.pipeline.unet.state_dict(), whole.pipeline.unet.state_dict())
    assert_same_tensors(
        policy.pipeline.text_encoder.state_dict(), whole.pipeline.text_encoder.state_dict()
    )
    for file in (copy / "unet").glob("*.safetensors"):
        before = hub.base_digest(copy, StableDiffusion.parts)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert hub.base_digest(copy, StableDiffusion.parts) != before


def unet_in_fp16_shards(folder: Path) -> None:
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / UNET).unlink()
    model.save_pretrained(folder / "unet", variant="fp16", max_shard_size="40KB")


@pytest.mark.parametrize("change", [in_fp16, unet_in_fp16_shards])
def test_a_pipeline_trained_from_a_variant_is_exported_without_it(
    copy: Path, tmp_path: Path, change: Change
) -> None:
    change(copy)
    policy = load_policy(tiny_config(copy, trainable={"type": "full"}))
    with torch.no_grad():
        for parameter in policy.weights.parameters().values():
            parameter.mul_(1.1)
    policy.export(tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if "fp16" in file.name]
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert_same_tensors(plain.unet.state_dict(), policy.pipeline.unet.state_dict())
    vae = policy.pipeline.vae.state_dict()
    assert_same_tensors(plain.vae.state_dict(), vae)


def test_weights_without_a_variant_are_preferred(copy: Path, tiny_model: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    parts = StableDiffusion.parts
    assert hub.base_digest(copy, parts) == hub.base_digest(tiny_model, parts)
    check_model(ModelConfig(path=str(copy)))


def test_a_model_in_the_hubs_cache_is_inspected_without_a_network(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789" * 4
    model = tmp_path / "hub" / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.move(copy, model / "snapshots" / commit)
    assert check_model(ModelConfig(path="owner/name")).size == (16, 16)
    assert load_policy(tiny_config("owner/name")).folder == model / "snapshots" / commit
    (model / "snapshots" / commit / UNET).unlink()
    with pytest.raises(ModelError, match=r"'owner/name' .*unet has no weights in safetensors"):
        check_model(ModelConfig(path="owner/name"))


# A single file


def test_a_single_file_is_converted_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' conversion needs the Hub: the pipeline that it would return is given here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    shutil.copy(tiny_model / UNET, file)
    asked: list[str] = []

    def from_single_file(path: str, **_: object) -> StableDiffusionPipeline:
        asked.append(path)
        return StableDiffusionPipeline.from_pretrained(tiny_model)

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    policies = [load_policy(tiny_config(file)) for _ in range(2)]
    assert asked == [str(file)] and policies[0].digest == policies[1].digest
    whole = load_policy(tiny_config(tiny_model)).pipeline.unet.state_dict()
    assert_same_tensors(policies[0].pipeline.unet.state_dict(), whole)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_single_file_that_cannot_be_loaded_is_refused_with_the_way_to_convert_it(
    tiny_model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    file = tmp_path / name
    shutil.copy(tiny_model / UNET, file)
    with pytest.raises(ModelError, match=r"from_single_file\(.*save_pretrained") as refused:
        check_model(ModelConfig(path=str(file)))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "cache").exists()
