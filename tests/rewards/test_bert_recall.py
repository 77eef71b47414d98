"""BERTScore against the formula of arXiv 1904.09675, written out from hidden states."""

import importlib.util

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, DebertaConfig, DebertaModel

from ddpo.errors import ConfigError, RewardError
from ddpo.rewards.models import pinned
from ddpo.rewards.models.bert_recall import BERT, BERT_REVISION, BertRecall, encoder_tensors
from ddpo.rewards.models.pretrained import check_tensors
from tests.rewards.tiny_vlm import LAYERS, pickle_weights, save_deberta

PAIRS = [
    ("a cat rides a bike", "The image contains a cat riding a bike"),
    ("two", "The image contains a dog"),
    ("A horse is standing in a wide green field, and looks at us.", "a"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deberta")
    save_deberta(folder)
    return folder


def states(folder, text: str, layer: int) -> torch.Tensor:
    """Return unit vectors [tokens, D] of a text: a model that ends at that layer ends with them."""
    config = DebertaConfig.from_pretrained(folder, num_hidden_layers=layer)
    model = DebertaModel.from_pretrained(folder, config=config).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        inner = model(**tokens).last_hidden_state[0, 1:-1].double()  # without [CLS] and [SEP]
    return inner / inner.norm(dim=-1, keepdim=True)


def by_formula(folder, candidate: str, reference: str, layer: int) -> tuple[float, float, float]:
    """Recall, precision, F1; a token whose best cosine is negative counts as 0."""
    cosines = states(folder, reference, layer) @ states(folder, candidate, layer).T
    recall = cosines.max(dim=1).values.clamp(min=0).mean().item()
    precision = cosines.max(dim=0).values.clamp(min=0).mean().item()
    return recall, precision, 2 * recall * precision / (recall + precision)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize(("candidate", "reference"), PAIRS)
def test_recall_precision_and_f1_are_the_formulas(folder, candidate, reference, layer):
    found = BertRecall(str(folder), None, layer, "cpu").compare(candidate, reference)
    expected = by_formula(folder, candidate, reference, layer)
    np.testing.assert_allclose((found.recall, found.precision, found.f1), expected, atol=1e-5)


@pytest.mark.parametrize("layer", [0, LAYERS])
def test_the_embeddings_and_the_last_layer_can_be_compared_too(folder, layer):
    found = BertRecall(str(folder), None, layer, "cpu").compare(*PAIRS[0])
    expected = by_formula(folder, *PAIRS[0], layer)
    np.testing.assert_allclose((found.recall, found.precision, found.f1), expected, atol=1e-5)


def test_a_sentence_compared_with_itself_matches_and_the_layer_matters(folder):
    shallow, deep = (BertRecall(str(folder), None, layer, "cpu") for layer in (1, 3))
    assert shallow.compare(PAIRS[0][0], PAIRS[0][0]).recall == pytest.approx(1, abs=1e-5)
    assert abs(shallow.compare(*PAIRS[0]).recall - deep.compare(*PAIRS[0]).recall) > 1e-3


def test_sentences_beyond_the_context_are_cut_and_empty_ones_match_nothing(folder):
    bert = BertRecall(str(folder), None, 2, "cpu")
    assert bert.compare("cat " * 100, "cat " * 200).recall == pytest.approx(1, abs=1e-5)
    nothing = bert.compare("", "a cat")
    assert (nothing.recall, nothing.precision, nothing.f1) == (0, 0, 0)


def test_published_pickles_are_read_without_unpickling(folder, tmp_path, monkeypatch):
    save_deberta(tmp_path)
    pickle_weights(tmp_path)
    monkeypatch.setattr(torch, "load", None)
    pickled = BertRecall(str(tmp_path), None, 3, "cpu")
    plain = BertRecall(str(folder), None, 3, "cpu")
    assert pickled.compare(*PAIRS[0]) == plain.compare(*PAIRS[0])
    file = str(tmp_path / "pytorch_model.bin")
    assert pickled.revisions[file].startswith("sha256:")  # the weights themselves are pinned
    assert file not in plain.revisions


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_safetensors_go_before_a_pickle_beside_them(folder, tmp_path, shard_size):
    model = save_deberta(tmp_path)
    pickle_weights(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    shards = len(list(tmp_path.glob("model*.safetensors")))
    assert shards == 1 if shard_size == "1GB" else shards > 1
    assert (tmp_path / "pytorch_model.bin").is_file()
    both = BertRecall(str(tmp_path), None, 3, "cpu")
    assert both.revisions.keys() == {str(tmp_path)}
    assert both.compare(*PAIRS[0]) == BertRecall(str(folder), None, 3, "cpu").compare(*PAIRS[0])


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """A hub that has a tiny DeBERTa, pickled, under any name; what it is asked for."""
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.extend((name, pattern, revision) for pattern in allow_patterns)
        return str(tmp_path)

    def hf_hub_download(name, file, *, revision):
        asked.append((name, file, revision))
        return str(tmp_path / file)

    save_deberta(tmp_path)
    monkeypatch.setattr(pinned, "snapshot_download", snapshot_download)
    monkeypatch.setattr(pinned, "hf_hub_download", hf_hub_download)
    return asked


def test_the_default_is_fetched_with_its_pickle_and_no_other_weights(folder, fetched, tmp_path):
    pickle_weights(tmp_path)
    found = BertRecall(BERT, None, 3, "cpu").compare(*PAIRS[0])
    assert found == BertRecall(str(folder), None, 3, "cpu").compare(*PAIRS[0])
    assert (BERT, "pytorch_model.bin", BERT_REVISION) in fetched
    assert {(name, revision) for name, _, revision in fetched} == {(BERT, BERT_REVISION)}
    assert not [file for _, file, _ in fetched if file.endswith(".safetensors")]


def test_other_models_of_the_hub_are_fetched_as_safetensors(folder, fetched):
    commit = "c" * 40
    other = BertRecall("some/where", commit, 3, "cpu")
    assert other.revisions == {"some/where": commit}
    found = other.compare(*PAIRS[0])
    assert found == BertRecall(str(folder), None, 3, "cpu").compare(*PAIRS[0])
    assert ("some/where", "model.safetensors", commit) in fetched
    assert not [file for _, file, _ in fetched if file.endswith(".bin")]


def test_the_default_is_pinned_with_its_weights_and_another_commit_is_taken_for_both():
    weights = f"{BERT}/pytorch_model.bin"
    commit = "d" * 40
    assert BertRecall(BERT, None, 40, "cpu").revisions == dict.fromkeys(
        (BERT, weights), BERT_REVISION
    )
    assert BertRecall(BERT, commit, 40, "cpu").revisions == dict.fromkeys((BERT, weights), commit)
    with pytest.raises(ConfigError, match="pin a commit"):
        BertRecall("some/where", None, 40, "cpu")


def test_every_tensor_of_deberta_xlarge_mnli_finds_its_place():
    """Names as microsoft/DeBERTa's checkpoints for transformers have them; 48 layers of 1024."""
    width, inside = 1024, 4096
    layer = {
        "attention.self.in_proj.weight": (3 * width, width),
        "attention.self.q_bias": (width,),
        "attention.self.v_bias": (width,),
        "attention.self.pos_proj.weight": (width, width),
        "attention.self.pos_q_proj.weight": (width, width),
        "attention.self.pos_q_proj.bias": (width,),
        "attention.output.dense.weight": (width, width),
        "attention.output.dense.bias": (width,),
        "attention.output.LayerNorm.weight": (width,),
        "attention.output.LayerNorm.bias": (width,),
        "intermediate.dense.weight": (inside, width),
        "intermediate.dense.bias": (inside,),
        "output.dense.weight": (width, inside),
        "output.dense.bias": (width,),
        "output.LayerNorm.weight": (width,),
        "output.LayerNorm.bias": (width,),
    }
    shapes = {
        "embeddings.word_embeddings.weight": (50265, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "encoder.rel_embeddings.weight": (1024, width),
    }
    shapes |= {f"encoder.layer.{i}.{n}": s for i in range(48) for n, s in layer.items()}
    head = {
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
        "classifier.weight": (3, width),
        "classifier.bias": (3,),
    }
    published = {f"deberta.{n}": s for n, s in shapes.items()} | head
    tensors = {n: torch.empty(s, device="meta") for n, s in published.items()}
    config = DebertaConfig(
        vocab_size=50265,
        hidden_size=width,
        num_hidden_layers=48,
        num_attention_heads=16,
        intermediate_size=inside,
        max_position_embeddings=512,
        relative_attention=True,
        max_relative_positions=-1,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
        type_vocab_size=0,
    )
    with torch.device("meta"):
        model = DebertaModel(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    check_tensors("DeBERTa", encoder_tensors(tensors, DebertaModel.base_model_prefix), expected)


def test_positions_that_old_releases_saved_are_left_out():
    one = torch.ones(1)
    inside = {"bert.a": one, "bert.embeddings.position_ids": one, "classifier.weight": one}
    assert encoder_tensors(inside, "bert") == {"a": one}
    assert encoder_tensors({"a": one, "embeddings.position_ids": one}, "bert") == {"a": one}


def test_a_layer_that_the_model_lacks_is_named(folder):
    bert = BertRecall(str(folder), None, LAYERS + 1, "cpu")
    with pytest.raises(RewardError, match=r"bert_layer is 5, but .* has 4 layers; .* 0 to 4"):
        bert.compare("a", "b")


def test_without_torchmetrics_the_way_out_is_said_at_once(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"needs torchmetrics.*pip install -e '\.\[rewards\]'"):
        BertRecall(str(folder), None, 1, "cpu")
