"""Rewards by a local vision-language model, against a greedy loop on the raw logits of LLaVA."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, GenerationConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.models import pinned
from ddpo.rewards.models.answers import is_right
from ddpo.rewards.models.bert_recall import BertRecall
from ddpo.rewards.models.vlm import VisionLanguageModel
from ddpo.rewards.models.vlm_tasks import QUESTION, Answer, score_alignment
from tests.rewards.tiny_models import PICTURES, PROMPTS
from tests.rewards.tiny_vlm import IMAGE_SIZE, IMAGE_TOKENS, SPECIAL, save_deberta, save_llava

QUESTIONS = ["How many cats are there in this image?", "What animal is in this image?", "dog ?"]
LONGEST = 6


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deberta")
    save_deberta(folder)
    return folder


def settings(llava, **more):
    return {
        "model": str(llava),
        "dtype": "float32",
        "device": "cpu",
        "max_new_tokens": LONGEST,
    } | more


def by_loop(folder, image, question: str) -> str:
    """The likeliest token, appended, and all of it again, until the end is the likeliest."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    asked = f"USER: {'<image>' * IMAGE_TOKENS}\n{question} ASSISTANT:"
    tokens = tokenizer(asked, return_tensors="pt")["input_ids"]
    said: list[int] = []
    while len(said) < LONGEST:
        now = torch.cat([tokens, torch.tensor([said], dtype=torch.long)], dim=1)
        with torch.no_grad():
            logits = model(input_ids=now, pixel_values=pixels).logits[0, -1]
        token = int(logits.argmax())
        if token == SPECIAL.index("</s>"):
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def test_answers_are_those_of_a_greedy_loop_whatever_the_company(llava):
    """Pictures of all shapes with questions of all lengths, in one batch and alone."""
    model = VisionLanguageModel(str(llava), None, "float32", LONGEST, "cpu")
    pairs = [(image, question) for image in PICTURES for question in QUESTIONS]
    expected = [by_loop(llava, image, question) for image, question in pairs]
    together = model.ask([image for image, _ in pairs], [text for _, text in pairs])
    assert [answer.text for answer in together] == expected
    for pair, text in zip(pairs[::5], expected[::5], strict=True):
        assert model.ask([pair[0]], [pair[1]])[0].text == text
    assert len(set(expected)) > 3  # so that a mix-up would show


def test_a_checkpoint_that_samples_by_default_is_greedy_all_the_same(llava, tmp_path):
    save_llava(tmp_path)
    GenerationConfig(
        do_sample=True, temperature=9.0, num_beams=1, eos_token_id=2, pad_token_id=3
    ).save_pretrained(tmp_path)
    plain, sampling = (
        VisionLanguageModel(str(each), None, "float32", LONGEST, "cpu")
        for each in (llava, tmp_path)
    )
    pairs = (PICTURES, [QUESTIONS[0]] * len(PICTURES))
    assert sampling.ask(*pairs) == plain.ask(*pairs)


def test_alignment_is_the_recall_of_the_caption_against_the_prompt(llava, deberta):
    parameters = settings(llava, bert_model=str(deberta), bert_layer=3)
    reward = load_reward("vlm_alignment", parameters)
    scores = score_images(reward, PICTURES, PROMPTS)
    bert = BertRecall(str(deberta), None, 3, "cpu")
    for index, (image, prompt) in enumerate(zip(PICTURES, PROMPTS, strict=True)):
        caption = by_loop(llava, image, QUESTION)
        assert scores.columns["caption"][index] == caption
        found = bert.compare(caption, f"The image contains {prompt.text}")
        assert scores.values[index] == pytest.approx(found.recall, abs=1e-6)
        assert scores.columns["bert_precision"][index] == pytest.approx(found.precision, abs=1e-6)
        assert scores.columns["bert_f1"][index] == pytest.approx(found.f1, abs=1e-6)
    assert np.ptp(scores.values) > 1e-3
    assert not scores.failed.any()
    alone = [reward([i], [p]).values[0] for i, p in zip(PICTURES, PROMPTS, strict=True)]
    np.testing.assert_allclose(scores.values, alone, atol=1e-6)


def test_captions_of_all_lengths_are_each_compared_with_their_own_prompt(deberta):
    captions = ["a cat that sleeps on a chair", "dogs", "a brown horse in a field", "two bees"]
    bert = BertRecall(str(deberta), None, 3, "cpu")
    found = score_alignment(
        PICTURES, PROMPTS, lambda *_: [Answer(c) for c in captions], bert, "?", "It is {prompt}"
    )
    expected = [
        bert.compare(caption, f"It is {prompt.text}").recall
        for caption, prompt in zip(captions, PROMPTS, strict=True)
    ]
    np.testing.assert_allclose(found.values, expected, atol=1e-7)


def test_a_sample_without_an_answer_fails_and_the_others_go_on(deberta):
    bert = BertRecall(str(deberta), None, 3, "cpu")
    said = [Answer("a cat"), Answer("", "lost"), Answer("{prompt}"), Answer("a bee")]
    prompts = [PROMPTS[0], PROMPTS[1], Prompt("{prompt} {0}"), PROMPTS[3]]
    found = score_alignment(PICTURES, prompts, lambda *_: said, bert, "?", "It is {prompt}")
    assert found.failed.tolist() == [False, True, False, False]
    assert found.columns["vlm_error"] == ["", "lost", "", ""]
    braces = bert.compare("{prompt}", "It is {prompt} {0}")  # braces of a prompt are its own
    assert found.values[2] == pytest.approx(braces.recall)


def asking(*pairs: tuple[str, str]) -> Prompt:
    questions, answers = zip(*pairs, strict=True)
    return Prompt("two cats", {"questions": list(questions), "answers": list(answers)})


def test_vqa_is_the_share_of_expected_answers_and_a_prompt_without_questions_fails(llava):
    first, second = (by_loop(llava, PICTURES[0], question) for question in QUESTIONS[:2])
    word = next(word for word in first.split() if word.isalpha())
    assert not is_right(second, "zebra")
    prompts = [
        asking((QUESTIONS[0], word), (QUESTIONS[1], "zebra")),
        Prompt("a cat"),
        asking((QUESTIONS[0], word)),
        Prompt("a cat", {"questions": ["Who?"], "answers": []}),
    ]
    images = [PICTURES[0], PICTURES[1], PICTURES[0], PICTURES[3]]
    reward = load_reward("vlm_vqa", settings(llava))
    scores = score_images(reward, images, prompts)
    assert scores.values[[0, 2]].tolist() == [0.5, 1.0]
    assert scores.failed.tolist() == [False, True, False, True]
    errors = scores.columns["vqa_error"]
    assert "has no questions" in errors[1] and "1 questions and 0 answers" in errors[3]
    assert errors[0] == errors[2] == ""
    told = json.loads(scores.columns["vqa_answers"][0])
    assert [each["answer"] for each in told] == [first, second]
    assert [each["right"] for each in told] == [True, False]
    alone = [reward([i], [p]) for i, p in zip(images, prompts, strict=True)]
    np.testing.assert_array_equal(scores.values, [each.values[0] for each in alone])


def test_no_pictures_are_no_scores(llava, deberta):
    parameters = settings(llava, bert_model=str(deberta), bert_layer=3)
    assert len(load_reward("vlm_alignment", parameters)([], [])) == 0
    assert len(load_reward("vlm_vqa", settings(llava))([], [])) == 0


# What is pinned, and what cannot be loaded.


def test_building_fetches_nothing_and_pins_all_models(monkeypatch):
    monkeypatch.setattr(pinned, "snapshot_download", None)
    for name, models in {"vlm_alignment": 3, "vlm_vqa": 1}.items():
        for model in ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"):
            identity = load_reward(name, {"model": model}).identity
            assert len(identity.revisions) == models
            assert all(len(revision) == 40 for revision in identity.revisions.values())
            assert model in identity.revisions
    with pytest.raises(ConfigError, match="'some/vlm' has the revision None; pin a commit"):
        load_reward("vlm_vqa", {"model": "some/vlm"})
    with pytest.raises(ConfigError, match=r"template is 'a picture', without \{prompt\}"):
        load_reward("vlm_alignment", {"template": "a picture"})


def test_another_chat_template_is_another_reward(tmp_path):
    save_llava(tmp_path)
    before = load_reward("vlm_vqa", settings(tmp_path)).identity
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert load_reward("vlm_vqa", settings(tmp_path)).identity.digest != before.digest


def test_models_of_the_hub_are_fetched_with_their_chat_template(llava, monkeypatch):
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, *allow_patterns))
        return str(llava)

    monkeypatch.setattr(pinned, "snapshot_download", snapshot_download)
    model = VisionLanguageModel("some/vlm", "a" * 40, "float32", LONGEST, "cpu")
    assert model.ask(PICTURES[:1], QUESTIONS[:1])[0].text
    assert {each[:2] for each in asked} == {("some/vlm", "a" * 40)}
    fetched = {pattern for each in asked for pattern in each[2:]}
    assert {"*.jinja", "*.json", "model-*.safetensors"} <= fetched


def test_a_model_that_cannot_be_had_is_named_with_the_way_out(monkeypatch):
    def refuse(*_, **__):
        raise LocalEntryNotFoundError("no network in tests")

    monkeypatch.setattr(pinned, "snapshot_download", refuse)
    reward = load_reward("vlm_alignment", {})
    with pytest.raises(
        RewardError, match=r"cannot download .*llava-1.5-7b-hf.* from the Hub: no netw"
    ):
        reward(PICTURES[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("chat_template.jinja", "has no chat template"),
        ("model.safetensors", r"cannot load the vision-language model of "),
        ("tokenizer.json", "cannot load the processor of "),
    ],
)
def test_what_is_missing_is_named(file, message, tmp_path):
    save_llava(tmp_path)
    (tmp_path / file).unlink()
    reward = load_reward("vlm_vqa", settings(tmp_path))
    with pytest.raises(RewardError, match=message):
        reward(PICTURES[:1], [asking(("dog ?", "dog"))])
