"""What older diffusers and transformers make of the starter and of what is exported."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from ddpo.config import DdimSampler
from ddpo.diffusion.sampling import sample
from ddpo.models import Policy
from ddpo.starter import JUDGE_PATH, STARTER_PATH
from tests.tiny import grow_adapter, load_policy, tiny_config
from tests.tiny_families import FAMILIES, SETTINGS

pytestmark = pytest.mark.slow

OLDER = (
    "accelerate==1.0.1",
    "diffusers==0.30.3",
    "huggingface_hub==0.26.5",
    "numpy==2.2.6",
    "peft==0.13.2",
    "tokenizers==0.20.3",
    "transformers==4.45.2",
)
PROMPTS = ["a cat", "two dogs riding a bike", "Un éléphant, zzz!"]
SAMPLER = DdimSampler(steps=4, guidance_scale=3.0, eta=0.0)

# What a user runs who has never heard of this project.
READ = """
import sys
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import AutoTokenizer, CLIPModel

torch.set_num_threads(1)
release, out, base, lora, home, whole, judge, *prompts = sys.argv[1:]
assert transformers.__version__.startswith(release)

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(prompts, num_inference_steps=4, guidance_scale=3.0, eta=0.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))]).images
    return np.stack([np.asarray(image) for image in images])

pipeline = StableDiffusionPipeline.from_pretrained(base)
tokens = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
found = {"tokens": tokens.input_ids.numpy(), "base": draw(pipeline)}
with torch.no_grad():
    found["text"] = pipeline.text_encoder(tokens.input_ids)[0].numpy()
    clip = CLIPModel.from_pretrained(judge)
    pixels = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    words = AutoTokenizer.from_pretrained(judge)(prompts, padding=True, return_tensors="pt")
    found["judge"] = clip(pixel_values=pixels, **words).logits_per_image.numpy()
pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
found["lora"] = draw(pipeline)
for name in ("pytorch_lora_weights", "kohya"):
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(home, weight_name=f"{name}.safetensors")
    found[name] = draw(pipeline)
found["whole"] = draw(StableDiffusionPipeline.from_pretrained(whole))
np.savez(out, **found)
assert "ddpo" not in sys.modules
"""

# The adapter alone: text encoders' files of newer releases are nothing that we write.
MERGE = """
import json, sys
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

base, lora, part, out = sys.argv[1:]
names = json.load(open(f"{base}/model_index.json"))
absent = {name: None for name in names if name.startswith(("text_encoder", "tokenizer"))}
pipeline = DiffusionPipeline.from_pretrained(base, **absent)
pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
pipeline.fuse_lora()
pipeline.unload_lora_weights()
save_file({k: v.contiguous() for k, v in getattr(pipeline, part).state_dict().items()}, out)
assert "ddpo" not in sys.modules
"""


@pytest.fixture(scope="module")
def older_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with older releases, which shares this one's torch."""
    folder = tmp_path_factory.mktemp("older")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet"]
    done = subprocess.run([*pip, *OLDER], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        pytest.skip(f"the older releases cannot be downloaded: {reason}")
    places = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # Paths of a .pth file come after the folder that it is in, and so do their packages.
    Path(places["purelib"], "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def adapted() -> Policy:
    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1"]
    trainable = {"type": "lora", "rank": 4, "alpha": 8.0, "target_modules": layers}
    policy = load_policy(tiny_config("starter", trainable=trainable))
    grow_adapter(policy, scale=0.02)
    return policy


@pytest.fixture(scope="module")
def whole() -> Policy:
    policy = load_policy(tiny_config("starter", trainable={"type": "full"}))
    with torch.no_grad():
        for parameter in policy.weights.parameters().values():
            parameter.mul_(1.01)
    return policy


def draw(policy: Policy) -> np.ndarray:
    images = sample(policy, PROMPTS, list(range(len(PROMPTS))), SAMPLER).images
    return np.stack([np.asarray(image) for image in images])


def test_older_and_newer_releases_read_alike(
    older_python: Path, adapted: Policy, whole: Policy, tmp_path: Path
) -> None:
    adapted.export(tmp_path / "lora")
    (tmp_path / "home").mkdir()
    files = (
        tmp_path / "home" / f"{name}.safetensors" for name in ("pytorch_lora_weights", "kohya")
    )
    adapted.export_lora(*files, notes={"ddpo.run": "mine"})
    whole.export(tmp_path / "whole")
    folders = [STARTER_PATH, *(tmp_path / name for name in ("lora", "home", "whole")), JUDGE_PATH]
    found: dict[str, dict[str, np.ndarray]] = {}
    for release, python in (("4.45", older_python), ("5.", Path(sys.executable))):
        out = tmp_path / f"{release}.npz"
        subprocess.run(
            [python, "-c", READ, release, out, *folders, *PROMPTS],
            check=True,
            cwd=tmp_path,
        )
        with np.load(out) as arrays:
            found[release] = dict(arrays)
    with adapted.weights.use("base"):
        drawn = {"base": draw(adapted)}
    lora = draw(adapted)
    drawn |= {"lora": lora, "pytorch_lora_weights": lora, "kohya": lora}
    drawn["whole"] = draw(whole)
    for release, arrays in found.items():
        for name, images in drawn.items():
            assert np.array_equal(arrays[name], images), f"{name} by transformers {release}"
    older, newer = found.values()
    assert older.keys() == newer.keys()
    for name, array in newer.items():
        assert np.array_equal(older[name], array), name


@pytest.mark.parametrize("name", ["sdxl", "flux"])  # SD3.5 and FLUX.2 are younger than these
def test_loras_of_newer_families_are_read_by_older_releases(
    older_python: Path, tmp_path: Path, name: str
) -> None:
    base = FAMILIES[name](tmp_path / "base")
    settings = {**SETTINGS[name], "trainable": {"type": "lora", "alpha": 8.0}}
    policy = load_policy(tiny_config(base, **settings))
    grow_adapter(policy)
    policy.export(tmp_path / "lora")
    part, out = policy.parts[0], tmp_path / "merged.safetensors"
    given = map(str, (base, tmp_path / "lora", part, out))
    subprocess.run([older_python, "-c", MERGE, *given], check=True, cwd=tmp_path)
    merged = load_file(out)
    adapted = getattr(policy.pipeline, part)
    changed = 0
    for layer, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight + module.get_delta_weight("default")
            assert not torch.equal(weight, module.get_base_layer().weight)
            torch.testing.assert_close(merged.pop(f"{layer}.weight"), weight)
            changed += 1
    assert changed == len(policy.weights.state()) / 2
    rest = {key.replace(".base_layer", ""): value for key, value in adapted.state_dict().items()}
    assert merged and all(torch.equal(value, rest[key]) for key, value in merged.items())
