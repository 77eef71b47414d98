"""Tiny models of the classes that the rewards by vision-language models load."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ddpo.starter.text import byte_characters
from tests.rewards.tiny_models import draw

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
WORDS = (
    "USER ASSISTANT : ? , . Answer concisely what is going on in this image how many cats dogs are "
    "there animal a the cat dog one two three riding washing playing chess"
)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA 1.5's form of a conversation."""

IMAGE_SIZE, PATCH_SIZE = 32, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def _tokenizer() -> PreTrainedTokenizerFast:
    """Word by word, with a beginning and no end, as Llama's."""
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *WORDS.split()])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def save_llava(folder: Path, seed: int = 0) -> LlavaForConditionalGeneration:
    """Write a LLaVA, its processor and its chat template into one folder."""
    tokenizer = _tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=4,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.load_state_dict(draw(shapes, seed), strict=False)
    with torch.no_grad():  # an answer may end, and has no picture or padding in it
        model.lm_head.weight[[i for i, name in enumerate(SPECIAL) if name != "</s>"]] = 0
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return model


LAYERS = 4


def save_deberta(folder: Path, seed: int = 0) -> DebertaForSequenceClassification:
    """Write a DeBERTa with the head of its MNLI checkpoints, and its tokenizer, into one folder."""
    pieces = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *byte_characters()]
    tokenizer = DebertaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[])
    config = DebertaConfig(
        vocab_size=len(pieces),
        hidden_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=96,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
        pad_token_id=1,
        num_labels=3,
    )
    model = DebertaForSequenceClassification(config).eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    model.load_state_dict(draw(shapes, seed), strict=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def pickle_weights(folder: Path) -> None:
    """Turn the weights of a folder into the form that old checkpoints are published in."""
    model = DebertaForSequenceClassification.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
