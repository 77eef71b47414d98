"""Prompt statistics as stored: the last rewards of each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ddpo.basics.digests import canonical_json
from ddpo.store.manifests import Artefact
from ddpo.training.state import PromptStatistics


class HoldsStatistics(Protocol):
    """An artefact with prompt statistics: a checkpoint, an advantage table, or `Statistics`."""

    def statistics(self) -> PromptStatistics:
        """Return the last rewards of each prompt, the oldest first."""
        ...


@dataclass(frozen=True)
class Statistics(Artefact):
    """Prompt statistics that were rebuilt from scores."""

    def statistics(self) -> PromptStatistics:
        """Return the last rewards of each prompt, the oldest first."""
        return statistics_from(self.document("statistics"))


def statistics_from(document: Mapping[str, Any]) -> PromptStatistics:
    """Return prompt statistics from their JSON."""
    return {prompt: tuple(rewards) for prompt, rewards in document.items()}


def statistics_to_json(statistics: PromptStatistics) -> dict[str, list[float]]:
    """Return prompt statistics as JSON."""
    return {prompt: list(rewards) for prompt, rewards in statistics.items()}


def encode_statistics(statistics: PromptStatistics) -> bytes:
    """Return prompt statistics as a JSON document."""
    return canonical_json(statistics_to_json(statistics))
