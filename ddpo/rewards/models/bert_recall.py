"""BERTScore by torchmetrics: how much of a reference a sentence covers (arXiv 1904.09675)."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ddpo.errors import RewardError
from ddpo.rewards.models.pinned import ModelFolder, WeightsFile, find_model, find_weights, load_part
from ddpo.rewards.models.pretrained import Device, LoadedOnce, build_model, pick_device, place

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

BERT = "microsoft/deberta-xlarge-mnli"
"""The model with which the DDPO paper's code compares sentences."""

BERT_REVISION = "5b07a9086c1dbb79981ff7b05b4d1ad83b3af51c"

BERT_LAYER = 40
"""The hidden layer that bert-score selects for it; torchmetrics would use the last, 48."""

_PICKLED = "pytorch_model.bin"  # the only form in which the default model is published


@dataclass(frozen=True)
class SentenceMatch:
    """BERTScore of a candidate against a reference, each in 0..1, without idf or rescaling."""

    recall: float
    """Mean over the reference's tokens of the cosine to the candidate's nearest token."""
    precision: float
    """The same with candidate and reference exchanged."""
    f1: float
    """Their harmonic mean."""


@dataclass(frozen=True)
class _Bert:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    lock: threading.Lock = field(default_factory=threading.Lock)


class BertRecall:
    """Compares sentences; its model is loaded by the first comparison.

    Args:
        model: A Hub id or a folder: any encoder of transformers. Its weights are safetensors; for
            the default, and for a folder without safetensors, they are a ``pytorch_model.bin``
            written by ``torch.save``, which is read without unpickling.
        revision: Commit of a Hub id; that of the default is pinned.
        layer: The hidden layer whose states are compared; 0 is the embeddings.
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
        self._loaded = LoadedOnce(
            self._load, self._folder, *([self._pickled] if self._pickled else [])
        )

    @property
    def revisions(self) -> dict[str, str]:
        """Revisions of the model and, if they are a separate file, of its weights."""
        revisions = {self._folder.name: self._folder.revision}
        if self._pickled is not None:
            revisions[self._pickled.name] = self._pickled.revision
        return revisions

    def compare(self, candidate: str, reference: str) -> SentenceMatch:
        """Compare one pair of sentences.

        One at a time, because torchmetrics 1.9 sorts a batch by length and then sorts it again
        instead of undoing that, which compares sentences with those of other samples. Text beyond
        the model's context is cut. A candidate without words has recall 0.
        """
        from torchmetrics.functional.text.bert import bert_score  # takes seconds to import

        bert = self._loaded.get()
        with bert.lock:  # a fast tokenizer keeps its truncation settings as state
            scores = bert_score(
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
        return SentenceMatch(*(_number(scores[name]) for name in ("recall", "precision", "f1")))

    def _load(self) -> _Bert:
        import torch
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        device = pick_device(self._device)
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
                f"bert_layer is {self._layer}, but {self._folder.name!r} has {layers} layers; "
                f"choose one of 0 to {layers}"
            )
        return _Bert(place(model, device), tokenizer)


def encoder_tensors(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Extract an encoder's tensors from those of a model with a head.

    Args:
        tensors: By name, as saved.
        prefix: Name of the encoder in the model, such as ``deberta``.

    Returns:
        The encoder's tensors under its own names; all tensors, if it was saved by itself. Position
        buffers, which older releases saved too, are dropped.
    """
    start = f"{prefix}."
    inside = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
    return {n: t for n, t in (inside or tensors).items() if not n.endswith("position_ids")}


def _find_pickled(model: ModelFolder) -> WeightsFile | None:
    """Return a model's weights if they are a file of torch.save; None for safetensors."""
    if model.local is None:
        if model.name != BERT:
            return None
        return find_weights(f"{model.name}/{_PICKLED}", model.revision, None)
    file = model.local / _PICKLED
    if any(model.local.glob("model*.safetensors")) or not file.is_file():
        return None
    return find_weights(str(file), None, None)


def _number(value: object) -> float:
    """Return the single number that torchmetrics returned; nan (no words) as 0."""
    import torch

    number = float(torch.as_tensor(value).reshape(-1)[0])
    return 0.0 if number != number else number
