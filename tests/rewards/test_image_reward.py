"""ImageReward: the authors' tensors in BLIP's classes, against their arithmetic written out."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, gelu, layer_norm, linear
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin import image_reward
from ddpo.rewards.builtin.image_reward import blip_large, from_published
from ddpo.rewards.models.linear_head import build_head
from ddpo.rewards.models.pretrained import check_tensors
from tests.rewards.tiny_models import (
    PICTURES,
    PROMPTS,
    by_head,
    draw,
    head_tensors,
    save_bert_tokenizer,
    save_tensors,
)


def shapes(
    *,
    vision: int,
    patch: int,
    patches: int,
    vision_blocks: int,
    text: int,
    inner: int,
    words: int,
    positions: int,
    layers: int,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint: the authors' blip_pretrain.py, vit.py, med.py."""

    def both(name: str, out: int, *into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}

    see, read = "blip.visual_encoder", "blip.text_encoder"
    found = {f"{see}.cls_token": (1, 1, vision), f"{see}.pos_embed": (1, patches + 1, vision)}
    found |= both(f"{see}.patch_embed.proj", vision, 3, patch, patch)
    for i in range(vision_blocks):
        block = f"{see}.blocks.{i}"
        found |= both(f"{block}.norm1", vision)
        found |= both(f"{block}.attn.qkv", 3 * vision, vision)
        found |= both(f"{block}.attn.proj", vision, vision)
        found |= both(f"{block}.norm2", vision)
        found |= both(f"{block}.mlp.fc1", 4 * vision, vision)
        found |= both(f"{block}.mlp.fc2", vision, 4 * vision)
    found |= both(f"{see}.norm", vision)
    found[f"{read}.embeddings.position_ids"] = (1, positions)
    found[f"{read}.embeddings.word_embeddings.weight"] = (words, text)
    found[f"{read}.embeddings.position_embeddings.weight"] = (positions, text)
    found |= both(f"{read}.embeddings.LayerNorm", text)
    for i in range(layers):
        layer = f"{read}.encoder.layer.{i}"
        for attention, seen in (("attention", text), ("crossattention", vision)):
            found |= both(f"{layer}.{attention}.self.query", text, text)
            found |= both(f"{layer}.{attention}.self.key", text, seen)
            found |= both(f"{layer}.{attention}.self.value", text, seen)
            found |= both(f"{layer}.{attention}.output.dense", text, text)
            found |= both(f"{layer}.{attention}.output.LayerNorm", text)
        found |= both(f"{layer}.intermediate.dense", inner, text)
        found |= both(f"{layer}.output.dense", text, inner)
        found |= both(f"{layer}.output.LayerNorm", text)
    found |= both("blip.vision_proj", 256, vision) | both("blip.text_proj", 256, text)
    widths = {0: (1024, text), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    for layer, (out, into) in widths.items():
        found |= both(f"mlp.layers.{layer}", out, into)
    return found


# ViT-L/16 at 224 px, med_config.json, and the head.
PUBLISHED = shapes(
    vision=1024,
    patch=16,
    patches=196,
    vision_blocks=24,
    text=768,
    inner=3072,
    words=30524,
    positions=512,
    layers=12,
)


def test_every_tensor_of_the_published_checkpoint_finds_its_place():
    tensors = {name: torch.empty(shape, device="meta") for name, shape in PUBLISHED.items()}
    parts = from_published(tensors)
    vision, text = blip_large()
    with torch.device("meta"):
        sees, reads = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
    for part, model in (("vision", sees), ("text", reads)):
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        check_tensors(part, parts[part], expected)
    assert sorted(parts["head"]) == sorted(head_tensors(768))
    build_head("head", 768, head_tensors(768))
    unused = [name for name in tensors if "_proj." in name or name.endswith("position_ids")]
    assert len(tensors) == sum(map(len, parts.values())) + len(unused)
    assert len(unused) == 5
    # The published file, ImageReward.pt, has 1,786,880,927 bytes: these numbers in float32
    # (positions in int64), and some 350 bytes a tensor for the zip around them.
    numbers = sum(tensor.numel() for tensor in tensors.values())
    rest = 1_786_880_927 - 4 * numbers - 4 * 512
    assert 100 < rest / len(tensors) < 600


def test_settings_that_no_shape_shows_are_the_authors():
    """vit.py: LayerNorm with eps 1e-6, nn.GELU; med_config.json: 12 heads, eps 1e-12, gelu."""
    vision, text = blip_large()
    assert (vision.num_attention_heads, text.num_attention_heads) == (16, 12)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-6, 1e-12)
    assert vision.hidden_act == text.hidden_act == "gelu"


VISION, TEXT, HEADS = 32, 24, 4


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return folder, save_bert_tokenizer(folder)


@pytest.fixture(scope="module")
def tiny(tokenizer_folder) -> tuple[BlipVisionConfig, BlipTextConfig]:
    vision = BlipVisionConfig(
        image_size=224,
        patch_size=56,
        hidden_size=VISION,
        intermediate_size=4 * VISION,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=tokenizer_folder[1],
        hidden_size=TEXT,
        encoder_hidden_size=VISION,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=40,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        is_decoder=True,
    )
    return vision, text


@pytest.fixture(scope="module")
def checkpoint(tokenizer_folder) -> dict[str, torch.Tensor]:
    """Random tensors in the published layout, drawn here and not made from BLIP's classes."""
    sizes = shapes(
        vision=VISION,
        patch=56,
        patches=16,
        vision_blocks=2,
        text=TEXT,
        inner=40,
        words=tokenizer_folder[1],
        positions=40,
        layers=2,
    )
    tensors = draw(sizes, seed=6)
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors | {f"mlp.{name}": tensor for name, tensor in head_tensors(TEXT).items()}


class Published:
    """The authors' forward pass (vit.py, med.py, ImageReward.py), in float64."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.head = {n.removeprefix("mlp."): t for n, t in tensors.items() if n.startswith("mlp.")}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, eps)

    def attend(self, query, key, value, seen=None) -> torch.Tensor:
        """Mix values by heads; [length, width]. ``seen`` masks keys."""
        length, width = query.shape
        query, key, value = (
            x.reshape(len(x), HEADS, -1).transpose(0, 1) for x in (query, key, value)
        )
        scores = query @ key.transpose(1, 2) / math.sqrt(width // HEADS)
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, width)

    def see(self, pixels: torch.Tensor) -> torch.Tensor:
        name, t = "blip.visual_encoder", self.tensors
        weight, bias = t[f"{name}.patch_embed.proj.weight"], t[f"{name}.patch_embed.proj.bias"]
        patches = conv2d(pixels[None].double(), weight, bias, stride=56).flatten(2)[0].T
        x = torch.cat([t[f"{name}.cls_token"][0], patches]) + t[f"{name}.pos_embed"][0]
        for i in range(2):
            block = f"{name}.blocks.{i}"
            fused = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            x = x + self.linear(f"{block}.attn.proj", self.attend(*fused.split(VISION, dim=1)))
            wide = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", gelu(wide))
        return self.norm(f"{name}.norm", x, 1e-6)

    def attention(self, name: str, x: torch.Tensor, seen: torch.Tensor, mask=None) -> torch.Tensor:
        query = self.linear(f"{name}.self.query", x)
        key, value = (self.linear(f"{name}.self.{part}", seen) for part in ("key", "value"))
        mixed = self.linear(f"{name}.output.dense", self.attend(query, key, value, mask))
        return self.norm(f"{name}.output.LayerNorm", mixed + x, 1e-12)

    def read(self, tokens: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor):
        name, t = "blip.text_encoder", self.tensors
        words = t[f"{name}.embeddings.word_embeddings.weight"][tokens]
        places = t[f"{name}.embeddings.position_embeddings.weight"][: len(tokens)]
        x = self.norm(f"{name}.embeddings.LayerNorm", words + places, 1e-12)
        for i in range(2):
            layer = f"{name}.encoder.layer.{i}"
            x = self.attention(f"{layer}.attention", x, x, mask.bool())
            x = self.attention(f"{layer}.crossattention", x, patches)
            wide = gelu(self.linear(f"{layer}.intermediate.dense", x))
            out = self.linear(f"{layer}.output.dense", wide)
            x = self.norm(f"{layer}.output.LayerNorm", out + x, 1e-12)
        return x

    def score(self, pixels, tokens, mask) -> float:
        first = self.read(tokens, mask, self.see(pixels))[:1]
        return ((by_head(self.head, first) - 0.16717362830052426) / 1.0333394966054072).item()


@pytest.fixture(params=["published", "safetensors"])
def reward(request, tiny, checkpoint, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_reward, "blip_large", lambda: tiny)
    if request.param == "published":
        weights = str(tmp_path / "ImageReward.pt")
        torch.save(checkpoint, weights)
    else:
        weights = save_tensors(tmp_path / "image_reward.safetensors", checkpoint)
    parameters = {"weights": weights, "tokenizer": str(tokenizer_folder[0]), "device": "cpu"}
    return load_reward("image_reward", parameters)


def test_the_reward_is_what_the_authors_arithmetic_gives(reward, checkpoint, tokenizer_folder):
    reference = Published(checkpoint)
    tokenizer = BertTokenizer.from_pretrained(tokenizer_folder[0])
    processor = CLIPImageProcessorPil()
    prompts = [*PROMPTS[:3], Prompt("a cat and " * 40)]  # the last one is cut
    expected = []
    for image, prompt in zip(PICTURES, prompts, strict=True):
        pixels = processor(image, return_tensors="pt")["pixel_values"][0]
        found = tokenizer(prompt.text, truncation=True, max_length=35, return_tensors="pt")
        expected.append(reference.score(pixels, found["input_ids"][0], found["attention_mask"][0]))
    scores = score_images(reward, PICTURES, prompts)
    np.testing.assert_allclose(scores.values, expected, atol=1e-4)
    alone = [reward([i], [p]).values[0] for i, p in zip(PICTURES, prompts, strict=True)]
    np.testing.assert_allclose(scores.values, alone, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_picture_and_prompt_both_count(reward):
    one = reward([PICTURES[0]] * 2, PROMPTS[:2]).values
    other = reward([PICTURES[0], PICTURES[1]], [PROMPTS[0]] * 2).values
    assert abs(one[0] - one[1]) > 1e-3
    assert abs(other[0] - other[1]) > 1e-3


def test_pictures_are_cut_out_as_torchvision_does():
    """Resize(224) and CenterCrop(224), written out; the shorter side rounds down."""
    image = PICTURES[1]  # 90 x 41
    width, height = int(224 * 90 / 41), 224
    wide = np.asarray(image.resize((width, height), 3), np.float32) / 255
    left = (width - 224) // 2
    mean = [0.48145466, 0.4578275, 0.40821073]
    std = [0.26862954, 0.26130258, 0.27577711]
    expected = ((wide[:, left : left + 224] - mean) / std).transpose(2, 0, 1)
    found = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_checkpoint_of_another_kind_is_refused(reward, checkpoint, tokenizer_folder, tmp_path):
    wrong = {**checkpoint, "blip.visual_encoder.extra": torch.ones(1)}
    del wrong["blip.visual_encoder.blocks.1.attn.qkv.bias"]
    weights = save_tensors(tmp_path / "wrong.safetensors", wrong)
    parameters = {"weights": weights, "tokenizer": str(tokenizer_folder[0])}
    with pytest.raises(
        RewardError,
        match=r"ImageReward's ViT .*missing: encoder\.layers\.1\.self_attn\.qkv\.bias; "
        r"unexpected: extra",
    ):
        score_images(load_reward("image_reward", parameters), PICTURES, PROMPTS)
