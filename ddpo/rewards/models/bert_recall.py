"""BERTScore: how much of a reference another sentence says (arXiv 1904.09675), by torchmetrics."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ddpo.errors import RewardError
from ddpo.rewards.models.pinned import ModelFolder, WeightsFile, find_model, find_weights, load_part
from ddpo.rewards.models.pretrained import Device, LoadedOnce, build_model, pick_device, place

BERT = "microsoft/deberta-xlarge-mnli"
"""The model that the DDPO paper's code compares sentences with."""

BERT_REVISION = "5b07a9086c1dbb79981ff7b05b4d1ad83b3af51c"

BERT_LAYER = 40
"""The hidden layer that bert-score picks for it; torchmetrics would take the last, 48."""

_PICKLED = "pytorch_model.bin"  # the default model is published in this form only


@dataclass(frozen=True)
class SentenceMatch:
    """BERTScore of a candidate against a reference, each in 0..1, without idf or rescaling.

    Attributes:
        recall: Mean over the reference's tokens of the cosine of the candidate's nearest token.
        precision: The same the other way round.
        f1: Their harmonic mean.
    """

    recall: float
    precision: float
    f1: float


@dataclass(frozen=True)
class _Bert:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class BertRecall:
    """Compares sentences; loads its model when it first does.

    Args:
        model: A hub id or a folder: any encoder of transformers. Its weights are safetensors, or
            for a folder without them (and for the default) the ``pytorch_model.bin`` of
            ``torch.save``, which is read without unpickling.
        revision: Commit of a hub id; that of the default is pinned.
        layer: The hidden layer whose states are compared; 0 are the embeddings.
        device: Where it runs.

    Raises:
        ConfigError: The model is not pinned.
        RewardError: torchmetrics is not installed.
    """

    def __init__(self, model: str, revision: str | None, layer: int, device: Device) -> None:
        if importlib.util.find_spec("torchmetrics") is None:
            raise RewardError(
                "BERTScore needs torchmetrics, which is not installed; pip install -e '.[rewards]'"
            )
        if model == BERT:
            revision = revision or BERT_REVISION
        self._folder = find_model(model, revision)
        self._pickled = _find_pickled(self._folder)
        self._layer = layer
        self._device: Device = device
        self._loaded = LoadedOnce(self._load)

    @property
    def revisions(self) -> dict[str, str]:
        """Revisions of the model and, where it is a file by itself, of its weights."""
        found = {self._folder.name: self._folder.revision}
        if self._pickled is not None:
            found[self._pickled.name] = self._pickled.revision
        return found

    def compare(self, candidate: str, reference: str) -> SentenceMatch:
        """Compare one pair of sentences.

        One at a time: torchmetrics 1.9 sorts a batch by length, and then sorts it once more where
        it should undo that, so that sentences of a batch are compared with those of others. What
        goes beyond the model's context is cut. A candidate without words has the recall 0.
        """
        from torchmetrics.functional.text.bert import bert_score  # here: it takes seconds

        bert = self._loaded.get()
        found = bert_score(
            [candidate],
            [reference],
            model=bert.model,
            user_tokenizer=bert.tokenizer,
            num_layers=self._layer,
            max_length=bert.model.config.max_position_embeddings,
            truncation=True,
            batch_size=1,
            device=bert.model.device,
        )
        return SentenceMatch(*(_number(found[name]) for name in ("recall", "precision", "f1")))

    def _load(self) -> _Bert:
        where = pick_device(self._device)
        tokenizer = load_part("the tokenizer", AutoTokenizer.from_pretrained, self._folder)
        if self._pickled is None:
            model = load_part(
                "the model of BERTScore",
                AutoModel.from_pretrained,
                self._folder,
                weights=True,
                dtype=torch.float32,
            )
        else:
            config = load_part("the config", AutoConfig.from_pretrained, self._folder)
            with torch.device("meta"):
                kind = type(AutoModel.from_config(config))
            tensors = encoder_tensors(self._pickled.tensors(), kind.base_model_prefix)
            model = build_model(f"BERTScore, {self._pickled.name}", kind, config, tensors)
        layers = model.config.num_hidden_layers
        if not 0 <= self._layer <= layers:
            raise RewardError(
                f"bert_layer is {self._layer}, and {self._folder.name!r} has {layers} layers; "
                f"choose one of 0 to {layers}"
            )
        return _Bert(place(model, where), tokenizer)


def encoder_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Pick an encoder's tensors from those of a model with a head on it.

    Args:
        tensors: By name, as saved.
        prefix: What the encoder is called there, such as ``deberta``.

    Returns:
        Those of the encoder under its own names; all, where it was saved by itself. Buffers of
        positions, which older releases saved along, are left out.
    """
    start = f"{prefix}."
    inside = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return {n: t for n, t in (inside or tensors).items() if not n.endswith("position_ids")}


def _find_pickled(model: ModelFolder) -> WeightsFile | None:
    """Return the weights of a model that come as a zip of torch.save; None for safetensors."""
    if model.local is None:
        if model.name != BERT:
            return None
        return find_weights(f"{model.name}/{_PICKLED}", model.revision, None)
    file = model.local / _PICKLED
    if any(model.local.glob("model*.safetensors")) or not file.is_file():
        return None
    return find_weights(str(file), None, None)


def _number(found: object) -> float:
    """Return the only number of what torchmetrics returns, nan (no words) as 0."""
    number = float(torch.as_tensor(found).reshape(-1)[0])
    return 0.0 if number != number else number
