"""What runs a comparison consists of, all of them checked before one is started."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpo.config import CompareConfig, RunConfig
from ddpo.config.compare import SHARED
from ddpo.config.files import apply_overrides, parse_comparison, parse_config, read_mapping
from ddpo.errors import ConfigError
from ddpo.runs.run import open_run
from ddpo.store import keys
from ddpo.store.objects import Store


@dataclass(frozen=True)
class Member:
    """A run of a comparison.

    Attributes:
        run_id: Its name.
        seed: Its seed.
        config: Its config.
    """

    run_id: str
    seed: int
    config: RunConfig


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison.

    Attributes:
        name: The comparison's name, which those of its runs begin with.
        config: What is compared.
        epochs: Epochs of each variant's run.
        shared: A run a seed that draws what the variants share, and learns nothing.
        variants: By variant, a run a seed, in the order of the seeds.
    """

    name: str
    config: CompareConfig
    epochs: int
    shared: Mapping[int, Member]
    variants: Mapping[str, Sequence[Member]]

    @property
    def shared_epochs(self) -> int:
        """How many epochs the variants of a seed have in common: the history's, or the first."""
        return self.epochs - 1 if self.config.offline else 1

    @property
    def samples_per_epoch(self) -> int:
        """Reward queries of an epoch, the same for all."""
        return self.members[0].config.rollouts.samples_per_epoch

    @property
    def members(self) -> list[Member]:
        """All runs in the order in which they are run: seed by seed, what is shared first."""
        runs = []
        for place, seed in enumerate(self.config.seeds):
            runs.append(self.shared[seed])
            runs += [of_variant[place] for of_variant in self.variants.values()]
        return runs


def read_comparison(
    path: str | Path, name: str | None = None, overrides: Sequence[str] = ()
) -> Comparison:
    """Read a comparison's file, and settle the config of each of its runs.

    Args:
        path: A YAML file, as :class:`ddpo.config.CompareConfig` describes it.
        name: The comparison's name; by default the file's.
        overrides: Changes of the base, as ``a.b=value``, applied in order.

    Returns:
        The comparison.

    Raises:
        ConfigError: One message that says what is wrong with which file or variant.
        InvalidKey: The name cannot be a run's.
    """
    file = Path(path)
    config = parse_comparison(read_mapping(file, "`base:` and `variants:`"), str(file))
    if isinstance(config.base, str):
        base_file = file.parent / config.base
        base = read_mapping(base_file, "`model:`, `prompts:` and `reward:`")
        source = str(base_file)
    else:
        base, source = copy.deepcopy(dict(config.base)), f"the base of {file}"
    apply_overrides(base, overrides)
    if base.get("fork"):
        raise ConfigError(
            f"{source} is a fork's config; a comparison starts from the base model: take `fork` out"
        )
    return plan(name or comparison_name(path), config, base, source)


def comparison_name(path: str | Path) -> str:
    """Name a comparison after its file: the same file goes on with the same runs."""
    return Path(path).stem.replace("_", "-")


def check_not_shared(store: Store, run_id: str) -> None:
    """Check that a run is none that draws what the variants of a comparison share.

    Such a run draws all of its epochs with the untrained model. Trained, it would contradict what
    it has committed, or go on with samples of another policy than the variants expect.

    Args:
        store: The store.
        run_id: The run, which need not be there.

    Raises:
        ConfigError: It is one; names the command that goes on with the comparison.
    """
    if not store.exists(keys.run_key(run_id)):
        return
    config = open_run(store, run_id).config
    name = config.tracking.parent
    if name and run_id == _run_id(name, config.seed, SHARED):
        raise ConfigError(
            f"run {run_id!r} draws the samples that the variants of the comparison {name!r} share, "
            "and is not trained by itself. Go on with the comparison, by the file and settings "
            f"that it was started with: ddpo compare CONFIG --name {shlex.quote(name)}"
        )


def plan(name: str, config: CompareConfig, base: Mapping[str, Any], source: str) -> Comparison:
    """Settle the config of each run.

    Args:
        name: The comparison's name.
        config: What is compared.
        base: A run's config, as it was read.
        source: Where that came from, for messages.

    Returns:
        The comparison.

    Raises:
        ConfigError: The base or a variant cannot be run.
        InvalidKey: The name cannot be a run's.
    """
    epochs = config.epochs or parse_config(base, source).epochs
    if epochs < 2:
        raise ConfigError(
            f"{source} has epochs {epochs}: the last one measures what those before it taught; "
            "set epochs to at least 2"
        )
    history = epochs - 1 if config.offline else 1
    shared: dict[int, Member] = {}
    variants: dict[str, list[Member]] = {variant: [] for variant in config.variants}
    for seed in config.seeds:
        branch = keys.validate_run_id(_run_id(name, seed, SHARED))
        fork: dict[str, Any] = {"run_id": branch, "epoch": 0}
        if config.offline:
            fork |= {"rollouts": history, "off_policy": True}
        for variant, changes in config.variants.items():
            run_id = keys.validate_run_id(_run_id(name, seed, variant))
            raw = _changed(base, changes) | {"seed": seed, "epochs": epochs, "fork": fork}
            settled = parse_config(_shown_below(raw, name), f"variant {variant!r} of {name}")
            if config.offline:
                algorithm = settled.algorithm.off_policy()
                settled = settled.model_copy(update={"algorithm": algorithm})
            variants[variant].append(Member(run_id, seed, settled))
        stored = {runs[-1].config.stored_trajectories for runs in variants.values()}
        shared[seed] = Member(
            branch,
            seed,
            _sharing(
                variants[next(iter(variants))][-1].config,
                history,
                "full" if "full" in stored else "final",
            ),
        )
    return Comparison(name, config, epochs, shared, variants)


def _run_id(name: str, seed: int, variant: str) -> str:
    return f"{name}-seed{seed}-{variant}"


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with a variant's changes, part by part; a part with a type replaces one."""
    raw = copy.deepcopy(dict(base))
    for part, value in changes.items():
        old = raw.get(part)
        merged = isinstance(value, dict) and isinstance(old, dict) and "type" not in value
        raw[part] = _changed(old, value) if merged else value  # pyright: ignore[reportArgumentType]
    return raw


def _shown_below(raw: dict[str, Any], name: str) -> dict[str, Any]:
    tracking = raw.get("tracking", {})
    return raw | {"tracking": {**tracking, "parent": name} if isinstance(tracking, dict) else None}


def _sharing(config: RunConfig, epochs: int, stored: str) -> RunConfig:
    """Return the config of the run that draws for all variants, from that of the first variant.

    Nothing of it is retired, since it is what all others begin with.
    """
    raw: dict[str, Any] = {**config.identity(), **config.operation()}
    raw["numerics"] = config.numerics.model_dump(mode="json")
    raw |= {"fork": None, "epochs": epochs}
    raw["rollouts"] |= {"store_trajectories": stored}
    raw["storage"] = {part: raw["storage"][part] for part in ("root", "s3")}
    return parse_config(raw, "the run that draws the shared samples")
