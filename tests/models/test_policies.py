from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpo.basics import digests
from ddpo.config import DdimSampler, ModelConfig
from ddpo.diffusion.sampling import sample
from ddpo.errors import ConfigError, ModelError
from ddpo.models import Conditioning, Policy, check_model, hub
from ddpo.models.stable_diffusion import StableDiffusion
from ddpo.training.loop import initial_state, update
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
    as_credit,
    assert_same_tensors,
    build_tiny_model,
    grow_adapter,
    load_policy,
    rollouts_of,
    tiny_config,
)

STILL = DdimSampler(steps=4, guidance_scale=3.0, eta=0.0)

# What a user runs who has never heard of this project.
_PLAIN_DIFFUSERS = """
import sys
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

torch.set_num_threads(1)
base, lora, whole, out = sys.argv[1:]

def draw(pipeline, name):
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(["a cat"] * 3, num_inference_steps=4, guidance_scale=3.0, eta=0.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(3)]).images
    for index, image in enumerate(images):
        image.save(f"{out}/{name}-{index}.png")

pipeline = StableDiffusionPipeline.from_pretrained(base)
draw(pipeline, "base")
pipeline.load_lora_weights(lora)
draw(pipeline, "lora")
draw(StableDiffusionPipeline.from_pretrained(whole), "whole")
assert "ddpo" not in sys.modules
"""


def draw(policy: Policy) -> list[np.ndarray]:
    images = sample(policy, ["a cat"] * 3, list(range(3)), STILL).images
    return [np.asarray(image) for image in images]


@pytest.mark.slow
def test_exports_draw_the_same_pictures_in_plain_diffusers(
    tiny_model: Path, tmp_path: Path
) -> None:
    # alpha 8 of rank 4 doubles the adapter: a file that lost its alpha would draw other pictures.
    adapted = load_policy(tiny_config(tiny_model, trainable={"type": "lora", "alpha": 8.0}))
    base = draw(adapted)
    grow_adapter(adapted)
    adapted.export(tmp_path / "lora")
    whole = load_policy(tiny_config(tiny_model, trainable={"type": "full"}))
    with torch.no_grad():
        for parameter in whole.weights.parameters().values():
            parameter.mul_(1.1)
    whole.export(tmp_path / "whole")
    assert [file.name for file in (tmp_path / "lora").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]

    out = tmp_path / "out"
    out.mkdir()
    arguments = [tiny_model, tmp_path / "lora", tmp_path / "whole", out]
    subprocess.run(
        [sys.executable, "-c", _PLAIN_DIFFUSERS, *map(str, arguments)],
        check=True,
        cwd=tmp_path,
        timeout=900,
    )
    expected = {"base": base, "lora": draw(adapted), "whole": draw(whole)}
    for name, ours in expected.items():
        for index, pixels in enumerate(ours):
            theirs = np.asarray(Image.open(out / f"{name}-{index}.png"))
            assert np.array_equal(theirs, pixels), f"{name}-{index}"
    assert not np.array_equal(expected["lora"][0], base[0])
    assert not np.array_equal(expected["whole"][0], base[0])


# The base model's digest


def digest_of(folder: Path) -> str:
    return hub.base_digest(folder, StableDiffusion.parts)


def test_base_digest_does_not_depend_on_the_place(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "elsewhere")
    assert digest_of(tmp_path / "elsewhere") == digest_of(tiny_model)
    # Files that are not loaded do not count.
    (tmp_path / "elsewhere" / "README.md").write_text("a model")
    (tmp_path / "elsewhere" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    assert digest_of(tmp_path / "elsewhere") == digest_of(tiny_model)


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "model_index.json",
    ],
)
def test_base_digest_sees_one_bit_of_every_file(
    tiny_model: Path, tmp_path: Path, file: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    data = bytearray((copy / file).read_bytes())
    data[-1] ^= 1
    (copy / file).write_bytes(data)
    assert digest_of(copy) != digest_of(tiny_model)


def test_the_digest_of_a_large_model_is_computed_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "REMEMBERED_FROM_BYTES", 1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    first = digest_of(copy)
    assert first == digest_of(tiny_model)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"!")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_of(copy) == first  # read once
    os.utime(file)
    assert digest_of(copy) != first
    for note in (tmp_path / "home/ddpo/digests").iterdir():
        note.write_text("half")  # as a full disk leaves it
    assert digest_of(tiny_model) == first


def test_policy_digest_is_of_base_and_trained_weights(tiny_model: Path) -> None:
    policy, same = (load_policy(tiny_config(tiny_model)) for _ in range(2))
    assert policy.digest == same.digest
    start = policy.digest
    grow_adapter(policy)
    assert policy.digest != start
    policy.weights.load(same.weights.state())
    assert policy.digest == start


def test_the_adapters_start_comes_from_the_runs_seed(tiny_model: Path) -> None:
    torch.manual_seed(1)
    first = load_policy(tiny_config(tiny_model))
    after_first = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), after_first), "the global generator moved"
    torch.manual_seed(2)
    assert load_policy(tiny_config(tiny_model)).digest == first.digest
    assert load_policy(tiny_config(tiny_model, seed=1)).digest != first.digest


def test_a_fresh_adapter_changes_no_picture(tiny_model: Path) -> None:
    adapted = load_policy(tiny_config(tiny_model))
    whole = load_policy(tiny_config(tiny_model, trainable={"type": "full"}))
    assert all(np.array_equal(a, b) for a, b in zip(draw(adapted), draw(whole), strict=True))


# Weight sets


def test_a_kept_set_is_computed_with_inside_the_block_alone(tiny_model: Path) -> None:
    for kind in ("lora", "full"):
        policy = load_policy(tiny_config(tiny_model, trainable={"type": kind}))
        grow_adapter(policy)
        trained = {name: value.clone() for name, value in policy.weights.state().items()}
        average = {name: 0.5 * value for name, value in trained.items()}
        handles = policy.weights.parameters()
        before = draw(policy)
        policy.weights.keep("average", average)
        with policy.weights.use("trained"):
            assert_same_tensors(policy.weights.state(), trained)
        with pytest.raises(InterruptedError), policy.weights.use("average"):
            assert_same_tensors(policy.weights.state(), average)
            inside = draw(policy)
            raise InterruptedError
        assert not np.array_equal(inside[0], before[0])
        assert_same_tensors(policy.weights.state(), trained)
        assert np.array_equal(draw(policy)[0], before[0])
        after = policy.weights.parameters()
        assert all(after[name] is parameter for name, parameter in handles.items())


def test_the_base_set_is_the_model_without_its_adapter(tiny_model: Path) -> None:
    policy = load_policy(tiny_config(tiny_model))
    base = draw(policy)
    grow_adapter(policy)
    with policy.weights.use("base"):
        assert all(np.array_equal(a, b) for a, b in zip(draw(policy), base, strict=True))
    assert not np.array_equal(draw(policy)[0], base[0])


def test_a_set_that_is_not_kept_is_refused(tiny_model: Path) -> None:
    policy = load_policy(tiny_config(tiny_model))
    with pytest.raises(KeyError, match="average"), policy.weights.use("average"):
        pass


# Text


def test_each_distinct_prompt_is_encoded_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(tiny_config(tiny_model))
    encoded: list[str] = []
    encode = policy.pipeline.encode_prompt

    def counted(text: str, *arguments: object, **keywords: object) -> object:
        encoded.append(text)
        return encode(text, *arguments, **keywords)

    monkeypatch.setattr(policy.pipeline, "encode_prompt", counted)
    prompts = ["a cat", "a dog", "a cat", "a cat", "a dog", "a cat", "a cat", "a fox"]
    sample(policy, prompts, list(range(8)), STILL)
    sample(policy, prompts, list(range(8)), STILL)
    assert sorted(encoded) == ["", "a cat", "a dog", "a fox"]


def test_encoded_prompts_are_kept_for_an_epoch_and_no_longer(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_model)
    policy = load_policy(config)
    state, credit = initial_state(policy), as_credit(alternating_advantages(8))
    encoded: list[str] = []
    encode = policy._encode

    def counted(prompt: str) -> Conditioning:
        encoded.append(prompt)
        return encode(prompt)

    monkeypatch.setattr(policy, "_encode", counted)
    for epoch in range(2):
        prompts = [f"{i} cats of epoch {epoch}" for i in range(8)]
        drawn = rollouts_of(sample(policy, prompts, range(8), config.sampler), prompts)
        assert {*encoded} - {""} == {*prompts} and len(encoded) <= 9
        encoded.clear()
        state, _ = update(policy, state, drawn, credit, {}, config)
        assert not encoded  # again, for the updates
        assert {*policy._encoded} == {"", *prompts}


def test_conditioning_is_a_bundle_of_rows(tiny_model: Path) -> None:
    whole = load_policy(tiny_config(tiny_model)).encode(["a cat", "a dog", "a fox"])
    bundle = Conditioning({**whole.tensors, "pooled": torch.arange(3)[:, None]})
    for index in (slice(1, 3), [1, 2], torch.tensor([1, 2]), torch.tensor([False, True, True])):
        some = bundle.rows(index)
        assert len(some) == 2 and some["pooled"].flatten().tolist() == [1, 2]
        assert torch.equal(some["text"], whole["text"][1:])
    one = bundle.rows(2)
    assert len(one) == 1 and torch.equal(one["text"], whole["text"][2:])
    assert one.expand(4)["pooled"].flatten().tolist() == [2, 2, 2, 2]
    joined = Conditioning.cat([one, bundle.rows(slice(0, 2))])
    assert joined["pooled"].flatten().tolist() == [2, 0, 1]
    assert torch.equal(joined["text"], whole["text"][[2, 0, 1]])


def test_an_embedding_is_its_own_prompts(tiny_model: Path) -> None:
    policy = load_policy(tiny_config(tiny_model))
    together = policy.encode(PROMPTS)["text"]
    fresh = load_policy(tiny_config(tiny_model))
    for index, prompt in enumerate(PROMPTS):
        assert torch.equal(fresh.encode([prompt])["text"][0], together[index])
    assert len({tuple(row.flatten().tolist()) for row in together}) == len(PROMPTS)


def test_text_is_encoded_in_float32_whatever_the_unet_computes_in(tiny_model: Path) -> None:
    """The empty prompt too, which guidance encodes in the middle of sampling."""
    policies = [
        load_policy(tiny_config(tiny_model, numerics={"dtype": dtype}))
        for dtype in ("float32", "bfloat16")
    ]
    for policy in policies:
        sample(policy, ["a cat"], [0], STILL)
    wide, narrow = policies
    for text in ("", "a cat"):
        found, expected = (each.encode([text])["text"] for each in (narrow, wide))
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_low_precision_keeps_the_trained_weights_in_float32(tiny_model: Path) -> None:
    for kind in ("lora", "full"):
        config = tiny_config(tiny_model, numerics={"dtype": "bfloat16"}, trainable={"type": kind})
        policy = load_policy(config)
        trained = {p.dtype for p in policy.weights.parameters().values()}
        frozen = {p.dtype for p in policy.pipeline.unet.parameters() if not p.requires_grad}
        assert trained == {torch.float32}
        assert frozen == ({torch.bfloat16} if kind == "lora" else set())
        assert {p.dtype for p in policy.pipeline.vae.parameters()} == {torch.float32}


# What cannot be loaded


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without model_index\.json"):
        check_model(ModelConfig(path=str(tmp_path)))


def test_a_path_that_is_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(ModelError, match="neither a folder here nor a Hub id"):
        check_model(ModelConfig(path="/no/such/folder"))


def test_a_hub_model_that_cannot_be_reached_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="'nobody/no-model' is neither on disk nor in the Hub"):
        check_model(ModelConfig(path="nobody/no-model"))


def test_a_pipeline_that_lost_its_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded as a StableDiffusionPipeline"):
        load_policy(tiny_config(copy))


def test_a_text_encoder_under_unknown_names_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Transformers would draw its weights at random and go on, with a warning."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {f"encoder_of_text.{name}": value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    message = r"text encoder in .* finds no weights for .* and \d+ others"
    with pytest.raises(ModelError, match=message):
        load_policy(tiny_config(copy))


def test_a_text_encoder_with_or_without_a_prefix_is_the_same(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Transformers 4 writes its tensors' names with one, 5 without."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    found, expected = (
        load_policy(tiny_config(folder)).encode(["a cat"])["text"] for folder in (copy, tiny_model)
    )
    assert torch.equal(found, expected)


def test_a_pipeline_of_another_family_is_refused_before_it_is_loaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "PixArtAlphaPipeline"})
    )
    message = r"is a PixArtAlphaPipeline, which is not supported; expected.*StableDiffusionPipeline"
    with pytest.raises(ModelError, match=message):
        check_model(ModelConfig(path=str(copy)))
    with pytest.raises(ModelError, match=message):
        load_policy(tiny_config(copy))


@pytest.mark.parametrize("text", ["no json", "[]", "{}"])
def test_an_index_that_names_no_class_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ModelError, match=r"does not name a pipeline class \(_class_name\)"):
        check_model(ModelConfig(path=str(tmp_path)))


def test_target_modules_that_match_nothing_are_refused(tiny_model: Path) -> None:
    config = tiny_config(tiny_model, trainable={"type": "lora", "target_modules": ["to_nowhere"]})
    with pytest.raises(ConfigError, match=r"to_nowhere.*match no layer"):
        load_policy(config)


@pytest.mark.parametrize("resolution", [17, [32, 17], [17, 32]])
def test_a_resolution_that_latents_cannot_have_is_refused(
    tiny_model: Path, resolution: int | list[int]
) -> None:
    config = tiny_config(tiny_model, model={"resolution": resolution})
    with pytest.raises(ConfigError, match=r"17.* is not a multiple of 2"):
        load_policy(config)


def test_resolution_is_the_models_own_unless_asked(tiny_model: Path) -> None:
    assert load_policy(tiny_config(tiny_model)).size == (16, 16)
    config = tiny_config(tiny_model, model={"resolution": 32})
    policy = load_policy(config)
    drawn = sample(policy, ["a cat"], [0], STILL)
    assert drawn.latents.shape[2:] == (4, 16, 16) and drawn.images[0].size == (32, 32)


def test_a_scheduler_that_does_not_speak_of_clipping_clips_nothing(tmp_path: Path) -> None:
    """Euler, DPM-Solver and the like have no such setting; DDIM's default would be to clip."""
    folder = build_tiny_model(tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    del settings["clip_sample"]
    file.write_text(json.dumps(settings))
    policy = load_policy(tiny_config(folder))
    assert sample(policy, ["a cat"], [0], STILL).images
