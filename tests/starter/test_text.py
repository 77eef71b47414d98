"""Promises of the tokenizer and the prompts."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from ddpo.starter.glyphs import ANIMALS, OTHERS
from ddpo.starter.scenes import SCENE_NUMBERS, Scene
from ddpo.starter.text import MAX_TOKENS, PLURALS, WORDS, build_tokenizer
from starter_training.prompt_table import PromptTable

STRANGE = ["Zwölf 猫 \n 🐈 xyz-12", "", "quetzalcoatl!", "it's a <tag> & more", "a\tcat   ate"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def loaded(tokenizer: CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_of_the_papers_prompts_is_one_token(loaded: CLIPTokenizer) -> None:
    activities = "a an two three four washing the dishes riding a bike playing chess"
    for word in {*ANIMALS, *PLURALS, *OTHERS, *activities.split()}:
        assert word in WORDS
        assert len(loaded(word)["input_ids"]) == 3, word
    assert len(loaded("two butterflies riding a bike")["input_ids"]) == 7


def test_tokens_survive_saving_and_loading(tokenizer: CLIPTokenizer, loaded: CLIPTokenizer) -> None:
    for text in ["a cat", "Two Geese playing chess", *STRANGE]:
        assert tokenizer(text)["input_ids"] == loaded(text)["input_ids"]
    assert loaded.model_max_length == MAX_TOKENS
    assert loaded.pad_token_id == loaded.eos_token_id == len(loaded) - 1
    assert loaded.bos_token_id == len(loaded) - 2


def test_any_text_tokenizes_without_the_unknown_token(loaded: CLIPTokenizer) -> None:
    for text in STRANGE:
        inner = loaded(text)["input_ids"][1:-1]
        assert loaded.unk_token_id not in inner, text
        assert bool(inner) == bool(text)
    assert loaded(STRANGE[2])["input_ids"] != loaded(STRANGE[4])["input_ids"]


def test_tokens_decode_to_the_prompt(loaded: CLIPTokenizer) -> None:
    for text in ["an ant washing the dishes", "three hedgehogs", "zwölf quetzals"]:
        tokens = loaded(text)["input_ids"]
        assert loaded.decode(tokens, skip_special_tokens=True) == text


def test_each_training_prompt_has_tokens_of_its_own() -> None:
    table = PromptTable()
    assert table.tokens.shape == (339 + 69 + 1, MAX_TOKENS)
    assert len(table.tokens.unique(dim=0)) == len(table.texts) == len(set(table.texts))


def test_a_picture_gets_its_scenes_prompt_a_bare_name_or_none() -> None:
    table, draws = PromptTable(), torch.Generator().manual_seed(0)

    def texts(scene: Scene, dropped: float) -> dict[str, float]:
        places = table.choose(torch.full((4000,), SCENE_NUMBERS[scene]), dropped, draws)
        found, counts = places.unique(return_counts=True)
        return {
            table.texts[place]: count / 4000
            for place, count in zip(found.tolist(), counts.tolist(), strict=True)
        }

    assert texts(Scene("cat"), 0.1) == pytest.approx(
        {"a cat": 0.63, "cat": 0.27, "": 0.1}, abs=0.03
    )
    assert texts(Scene("owl"), 0.0) == pytest.approx({"an owl": 0.7, "owl": 0.3}, abs=0.03)
    assert texts(Scene("ant", "playing chess"), 0.0) == {"an ant playing chess": 1.0}
    assert texts(Scene("mouse", count=3), 0.0) == {"three mice": 1.0}
