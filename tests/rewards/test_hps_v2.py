"""HPS v2.1: open_clip's tensors in CLIPModel, against open_clip's own arithmetic written out."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, interpolate, layer_norm, linear, pad
from transformers import CLIPConfig, CLIPModel

from ddpo.errors import RewardError
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin import hps_v2
from ddpo.rewards.builtin.hps_v2 import fit, from_open_clip, vit_h_14
from ddpo.rewards.models.pretrained import build_model, check_tensors
from ddpo.starter.text import build_tokenizer
from tests.rewards.tiny_models import (
    PICTURES,
    PROMPTS,
    draw,
    picture,
    save_tensors,
    tiny_clip_config,
)

# What a file of open_clip's ViT-H-14 holds: its model.py and transformer.py, at the sizes of its
# model_configs/ViT-H-14.json. A width and what follows from it; a block is the same in both towers.
VISION, TEXT, JOINT = 1280, 1024, 1024
BLOCKS = {"visual.transformer.resblocks": (32, VISION), "transformer.resblocks": (24, TEXT)}
OUTSIDE_BLOCKS = {
    "logit_scale": (),
    "positional_embedding": (77, TEXT),
    "text_projection": (TEXT, JOINT),
    "token_embedding.weight": (49408, TEXT),
    "ln_final.weight": (TEXT,),
    "ln_final.bias": (TEXT,),
    "visual.class_embedding": (VISION,),
    "visual.positional_embedding": (257, VISION),
    "visual.proj": (VISION, JOINT),
    "visual.conv1.weight": (VISION, 3, 14, 14),
    "visual.ln_pre.weight": (VISION,),
    "visual.ln_pre.bias": (VISION,),
    "visual.ln_post.weight": (VISION,),
    "visual.ln_post.bias": (VISION,),
}


def block_shapes(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
    }


def published() -> dict[str, torch.Tensor]:
    shapes = dict(OUTSIDE_BLOCKS)
    for start, (count, width) in BLOCKS.items():
        for number in range(count):
            shapes |= {f"{start}.{number}.{n}": s for n, s in block_shapes(width).items()}
    return {n: torch.empty(s, dtype=torch.float16, device="meta") for n, s in shapes.items()}


def test_every_tensor_of_the_published_checkpoint_finds_its_place():
    tensors = published()
    with torch.device("meta"):
        model = CLIPModel(vit_h_14())
    check_tensors("HPS v2", from_open_clip(tensors), {n: t.shape for n, t in _state(model)})
    # The published file, HPS_v2.1_compressed.pt, has 1,972,490,005 bytes: these numbers in half
    # precision, and some 400 bytes a tensor for the zip around them.
    rest = 1_972_490_005 - 2 * sum(tensor.numel() for tensor in tensors.values())
    assert 100 < rest / len(tensors) < 600


def test_settings_that_no_shape_shows_are_open_clips():
    """head_width 80 in the vision tower; plain GELU, not OpenAI's quick one; torch's LayerNorm."""
    vision, text = vit_h_14().vision_config, vit_h_14().text_config
    assert (vision.num_attention_heads, text.num_attention_heads) == (VISION // 80, TEXT // 64)
    assert vision.hidden_act == text.hidden_act == "gelu"
    assert vision.layer_norm_eps == text.layer_norm_eps == 1e-5
    assert text.eos_token_id == 49407


def _state(model):
    return model.state_dict().items()


TINY_TEXT, TINY_VISION, HEADS = 24, 32, 4


@pytest.fixture(scope="module")
def tiny() -> CLIPConfig:
    """A tiny model that sees 224 px, as the real one does; blocks four times as wide inside."""
    config = tiny_clip_config(image_size=224)
    config.text_config.intermediate_size = 4 * TINY_TEXT
    config.text_config.num_attention_heads = HEADS
    config.vision_config.intermediate_size = 4 * TINY_VISION
    return config


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    """Random tensors in open_clip's layout, drawn here and not made from a CLIPModel."""
    shapes = {
        "logit_scale": (),
        "positional_embedding": (24, TINY_TEXT),
        "text_projection": (TINY_TEXT, 16),
        "token_embedding.weight": (len(build_tokenizer()), TINY_TEXT),
        "ln_final.weight": (TINY_TEXT,),
        "ln_final.bias": (TINY_TEXT,),
        "visual.class_embedding": (TINY_VISION,),
        "visual.positional_embedding": (17, TINY_VISION),
        "visual.proj": (TINY_VISION, 16),
        "visual.conv1.weight": (TINY_VISION, 3, 56, 56),
        "visual.ln_pre.weight": (TINY_VISION,),
        "visual.ln_pre.bias": (TINY_VISION,),
        "visual.ln_post.weight": (TINY_VISION,),
        "visual.ln_post.bias": (TINY_VISION,),
    }
    for start, width in (("visual.", TINY_VISION), ("", TINY_TEXT)):
        for number in range(2):
            block = f"{start}transformer.resblocks.{number}"
            shapes |= {f"{block}.{n}": s for n, s in block_shapes(width).items()}
    return draw(shapes, seed=5)


class OpenClip:
    """open_clip's forward pass, from its fused weights, in float64."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, eps=1e-5)

    def block(self, name: str, x: torch.Tensor, causal: bool) -> torch.Tensor:
        t = self.tensors
        length, width = x.shape
        fused = linear(
            self.norm(f"{name}.ln_1", x),
            t[f"{name}.attn.in_proj_weight"],
            t[f"{name}.attn.in_proj_bias"],
        )
        query, key, value = (
            fused[:, i * width : (i + 1) * width].view(length, HEADS, -1).transpose(0, 1)
            for i in range(3)
        )
        scores = query @ key.transpose(1, 2) / math.sqrt(width // HEADS)
        if causal:
            scores = scores + torch.full((length, length), -math.inf).triu(1)
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, width)
        out_weight = t[f"{name}.attn.out_proj.weight"]
        x = x + linear(mixed, out_weight, t[f"{name}.attn.out_proj.bias"])
        wide = linear(
            self.norm(f"{name}.ln_2", x), t[f"{name}.mlp.c_fc.weight"], t[f"{name}.mlp.c_fc.bias"]
        )
        return x + linear(gelu(wide), t[f"{name}.mlp.c_proj.weight"], t[f"{name}.mlp.c_proj.bias"])

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        t = self.tensors
        grid = torch.nn.functional.conv2d(
            pixels[None].double(), t["visual.conv1.weight"], stride=56
        )
        patches = grid.flatten(2)[0].T
        x = torch.cat([t["visual.class_embedding"][None], patches])
        x = self.norm("visual.ln_pre", x + t["visual.positional_embedding"])
        for number in range(2):
            x = self.block(f"visual.transformer.resblocks.{number}", x, causal=False)
        return self.norm("visual.ln_post", x[0]) @ t["visual.proj"]

    def read(self, text: str) -> torch.Tensor:
        """Tokens as open_clip has them: zeros after the end, which is the largest number."""
        t = self.tensors
        found = build_tokenizer()(text)["input_ids"]
        tokens = torch.zeros(24, dtype=torch.long)
        tokens[: len(found)] = torch.tensor(found)
        x = t["token_embedding.weight"][tokens] + t["positional_embedding"]
        for number in range(2):
            x = self.block(f"transformer.resblocks.{number}", x, causal=True)
        return self.norm("ln_final", x)[tokens.argmax()] @ t["text_projection"]


def test_features_are_open_clips(tiny, checkpoint):
    model = build_model("HPS v2", CLIPModel, tiny, from_open_clip(checkpoint)).eval()
    reference = OpenClip(checkpoint)
    pixels = torch.stack([fit(image) for image in PICTURES])
    with torch.no_grad():
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        tokens = build_tokenizer()([p.text for p in PROMPTS], padding=True, return_tensors="pt")
        read = model.text_projection(model.text_model(tokens["input_ids"]).pooler_output)
    expected_seen = torch.stack([reference.see(one) for one in pixels])
    expected_read = torch.stack([reference.read(prompt.text) for prompt in PROMPTS])
    torch.testing.assert_close(seen.double(), expected_seen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read.double(), expected_read, atol=1e-4, rtol=1e-4)
    assert seen.std(0).max() > 0.1
    assert read.std(0).max() > 0.1


@pytest.fixture(params=["published", "safetensors"])
def reward(request, tiny, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(hps_v2, "vit_h_14", lambda: tiny)
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    if request.param == "published":
        weights = str(tmp_path / "HPS.pt")
        torch.save({"state_dict": checkpoint, "epoch": 1, "name": "hps"}, weights)
    else:
        weights = save_tensors(tmp_path / "hps.safetensors", checkpoint)
    return load_reward(
        "hps_v2",
        {"weights": weights, "tokenizer": str(tmp_path / "tokenizer"), "device": "cpu"},
    )


def test_the_reward_is_the_cosine_of_open_clips_features(reward, checkpoint):
    reference = OpenClip(checkpoint)
    expected = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        seen, read = reference.see(by_hand(image)), reference.read(prompt.text)
        expected.append((seen @ read / seen.norm() / read.norm()).item())
    scores = score_images(reward, PICTURES, PROMPTS)
    np.testing.assert_allclose(scores.values, expected, atol=1e-5)
    alone = [reward([i], [p]).values[0] for i, p in zip(PICTURES, PROMPTS, strict=True)]
    np.testing.assert_allclose(scores.values, alone, atol=1e-6)
    assert np.ptp(expected) > 0.01


def by_hand(image) -> torch.Tensor:
    """Fit a picture into 224 x 224: the longer side scaled, black on both sides of the shorter."""
    scale = 224 / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    pixels = torch.tensor(np.asarray(image) / 255, dtype=torch.float32).permute(2, 0, 1)
    small = interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    left, top = (224 - width) // 2, (224 - height) // 2
    square = pad(small, (left, 224 - width - left, top, 224 - height - top))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    return (square - mean) / std


@pytest.mark.parametrize(
    "size", [(224, 224), (512, 512), (101, 224), (224, 99), (640, 481), (1, 1)]
)
def test_pictures_of_any_size_are_fitted_and_padded(size):
    """An odd rest goes to the right and to the bottom."""
    image = picture(*size)
    torch.testing.assert_close(fit(image), by_hand(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000)])
def test_a_strip_too_thin_to_be_fitted_keeps_a_row(size):
    found = fit(picture(*size))
    assert found.shape == (3, 224, 224)
    assert found.isfinite().all()
    black = found.flatten(1).amin(1)[:, None, None]
    assert ((found > black).any(0)).sum() == 224


def test_a_checkpoint_of_another_kind_is_refused(reward, checkpoint, tmp_path):
    wrong = {**checkpoint, "visual.extra": torch.ones(1)}
    del wrong["visual.transformer.resblocks.1.attn.in_proj_bias"]
    weights = save_tensors(tmp_path / "wrong.safetensors", wrong)
    other = load_reward("hps_v2", {"weights": weights, "tokenizer": str(tmp_path / "tokenizer")})
    with pytest.raises(
        RewardError,
        match=r"HPS v2 .*missing: vision_model.*q_proj\.bias.*unexpected: visual\.extra",
    ):
        score_images(other, PICTURES, PROMPTS)
