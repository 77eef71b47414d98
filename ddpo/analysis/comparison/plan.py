"""Plan the runs of a comparison; all configs are validated before any run starts."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpo.basics.paths import expand
from ddpo.config import CompareConfig, RunConfig
from ddpo.config.compare import SHARED
from ddpo.config.files import parse_comparison, parse_config, read_mapping
from ddpo.config.overrides import apply_overrides, apply_settings
from ddpo.errors import ConfigError
from ddpo.runs import open_run
from ddpo.store import keys
from ddpo.store.objects import Store


@dataclass(frozen=True)
class Member:
    """One run of a comparison."""

    run_id: str
    """Its name."""
    seed: int
    """Its seed."""
    config: RunConfig
    """Its config."""


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison."""

    name: str
    """The comparison's name, a prefix of the names of its runs."""
    config: CompareConfig
    """The comparison's config."""
    epochs: int
    """Epochs of each variant's run."""
    shared: Mapping[int, Member]
    """By seed, the run that samples what the variants share and does not train."""
    variants: Mapping[str, Sequence[Member]]
    """By variant, one run per seed, in the order of the seeds."""

    @property
    def samples_per_epoch(self) -> int:
        """Reward queries per epoch, the same for all runs."""
        return self.members[0].config.rollouts.samples_per_epoch

    @property
    def members(self) -> list[Member]:
        """All runs in the order in which they run: seed by seed, the shared run first."""
        runs = []
        for index, seed in enumerate(self.config.seeds):
            runs.append(self.shared[seed])
            runs += [members[index] for members in self.variants.values()]
        return runs


def read_comparison(
    path: str | Path,
    name: str | None = None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Comparison:
    """Read a comparison's file and resolve the config of each of its runs.

    Args:
        path: A YAML file, as described by :class:`ddpo.config.CompareConfig`.
        name: The comparison's name; by default derived from the file's.
        overrides: Changes to the base, as ``a.b=value``, applied in order.
        settings: Values of the base by dotted key, which take precedence; None leaves its own.

    Raises:
        ConfigError: The file or a variant is invalid.
        InvalidKey: The name is not valid in a run's name.
    """
    file = Path(expand(str(path)))
    config = parse_comparison(read_mapping(file, "`base:` and `variants:`"), str(file))
    if isinstance(config.base, str):
        base_file = file.parent / expand(config.base)
        base = read_mapping(base_file, "`model:`, `prompts:` and `reward:`")
        source = str(base_file)
    else:
        base, source = copy.deepcopy(dict(config.base)), f"the base of {file}"
    apply_overrides(base, overrides)
    apply_settings(base, settings or {})
    if base.get("fork"):
        raise ConfigError(
            f"{source} is the config of a fork, but a comparison starts from the base model; "
            "remove `fork`"
        )
    return plan(name or comparison_name(path), config, base, source)


def comparison_name(path: str | Path) -> str:
    """Derive a comparison's name from its file, so that the same file resumes the same runs."""
    return Path(path).stem.replace("_", "-")


def check_not_shared(store: Store, run_id: str) -> None:
    """Refuse to train the run that samples what the variants of a comparison share.

    Such a run samples all of its epochs with the untrained model. Training it would contradict what
    it has committed, or produce samples of a policy that the variants do not expect.

    Args:
        store: The store.
        run_id: A run, which need not exist.

    Raises:
        ConfigError: It is such a run; the message has the command that resumes the comparison.
    """
    if not store.exists(keys.run_key(run_id)):
        return
    config = open_run(store, run_id).config
    name = config.tracking.parent
    if name and run_id == _run_id(name, config.seed, SHARED):
        raise ConfigError(
            f"run {run_id!r} provides the samples shared by the variants of the comparison "
            f"{name!r} and cannot be trained by itself. Resume the comparison with the file and "
            f"settings it was started with: ddpo compare CONFIG --name {shlex.quote(name)}"
        )


def plan(name: str, config: CompareConfig, base: Mapping[str, Any], source: str) -> Comparison:
    """Resolve the config of each run.

    Args:
        name: The comparison's name.
        config: The comparison's config.
        base: The base config, as parsed from YAML.
        source: Where the base came from, for messages.

    Raises:
        ConfigError: The base or a variant is invalid.
        InvalidKey: The name is not valid in a run's name.
    """
    epochs = config.epochs or parse_config(base, source).epochs
    if epochs < 2:
        raise ConfigError(
            f"{source} has epochs {epochs}, but the last epoch only measures what the ones before "
            "it taught; set epochs to at least 2"
        )
    history = epochs - 1 if config.offline else 1
    shared: dict[int, Member] = {}
    variants: dict[str, list[Member]] = {variant: [] for variant in config.variants}
    for seed in config.seeds:
        shared_id = keys.validate_run_id(_run_id(name, seed, SHARED))
        fork: dict[str, Any] = {"run_id": shared_id, "epoch": 0}
        if config.offline:
            fork |= {"rollouts": history, "off_policy": True}
        for variant, changes in config.variants.items():
            run_id = keys.validate_run_id(_run_id(name, seed, variant))
            raw = _changed(base, changes) | {"seed": seed, "epochs": epochs, "fork": fork}
            resolved = parse_config(_nested_under(raw, name), f"variant {variant!r} of {name}")
            if resolved.rollouts.sample_ahead:
                raise ConfigError(
                    f"{source} has rollouts.sample_ahead, but a comparison measures the weights "
                    "before an epoch by the epoch's samples; leave it out, and compare such runs "
                    "by `ddpo evaluate`"
                )
            if config.offline:
                algorithm = resolved.algorithm.off_policy()
                resolved = resolved.changed(algorithm=algorithm)
            variants[variant].append(Member(run_id, seed, resolved))
        stored = {runs[-1].config.stored_trajectories for runs in variants.values()}
        shared[seed] = Member(
            shared_id,
            seed,
            _shared_config(
                variants[next(iter(variants))][-1].config,
                history,
                "full" if "full" in stored else "final",
            ),
        )
    return Comparison(name, config, epochs, shared, variants)


def _run_id(name: str, seed: int, variant: str) -> str:
    return f"{name}-seed{seed}-{variant}"


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a variant's changes into a config; a section that names a `type` is replaced whole."""
    raw = copy.deepcopy(dict(base))
    for part, value in changes.items():
        old = raw.get(part)
        merged = isinstance(value, dict) and isinstance(old, dict) and "type" not in value
        raw[part] = _changed(old, value) if merged else value  # pyright: ignore[reportArgumentType]
    return raw


def _nested_under(raw: dict[str, Any], name: str) -> dict[str, Any]:
    tracking = raw.get("tracking", {})
    return raw | {"tracking": {**tracking, "parent": name} if isinstance(tracking, dict) else None}


def _shared_config(config: RunConfig, epochs: int, stored: str) -> RunConfig:
    """Derive the config of the shared run from that of the first variant.

    Retention is off, since all other runs start from its data.
    """
    raw: dict[str, Any] = config.whole()
    raw |= {"fork": None, "epochs": epochs}
    raw["rollouts"] |= {"store_trajectories": stored}
    raw["storage"] = {part: raw["storage"][part] for part in ("root", "s3")}
    return parse_config(raw, "the run with the shared samples")
