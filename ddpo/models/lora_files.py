"""An adapter as files for other programs: diffusers, and what reads kohya's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ddpo.config import LoraConfig
from ddpo.models.exports import save_tensors
from ddpo.models.lora import TEXT_TARGETS

_BASES = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
"""kohya's name of a base model, by the width of the text features that its UNet attends to."""


def write_diffusers(
    file: Path,
    adapter: Mapping[str, Mapping[str, Tensor]],
    config: LoraConfig,
    notes: Mapping[str, str],
) -> None:
    """Write diffusers' file, with rank and alpha in its header.

    alpha / rank is in the weights, so the alpha that a reader applies is the rank. Readers that do
    not look into the header take it to be just that. The header has no other setting: peft refuses
    those that are newer than it is.

    Args:
        file: Created or replaced.
        adapter: By the pipeline's part that it is for, the network's first, and by peft's names;
            with alpha / rank multiplied into lora_B.
        config: The adapter's settings.
        notes: Further entries of the header.
    """
    settings: dict[str, int | list[str]] = {}
    for number, part in enumerate(adapter):
        targets = TEXT_TARGETS if number else config.target_modules
        settings |= {
            f"{part}.r": config.rank,
            f"{part}.lora_alpha": config.rank,
            f"{part}.target_modules": list(targets),
        }
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings), **notes}
    tensors = {f"{p}.{name}": value for p, own in adapter.items() for name, value in own.items()}
    save_tensors(tensors, file, header)


def write_kohya(
    file: Path,
    adapter: Mapping[str, Mapping[str, Tensor]],
    config: LoraConfig,
    base: str | None,
    notes: Mapping[str, str],
) -> None:
    """Write the file that ComfyUI and AUTOMATIC1111 read, in the layout of kohya's trainer.

    Args:
        file: Created or replaced.
        adapter: As for `write_diffusers`.
        config: The adapter's settings.
        base: kohya's name of the base model, by which AUTOMATIC1111 sorts; see `kohya_base`.
        notes: Further entries of the header.
    """
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(float(config.rank)),
        "ss_output_name": file.stem,
        **({"ss_base_model_version": base, "ss_v2": str(base == "sd_v2")} if base else {}),
        **notes,
    }
    save_tensors(kohya_tensors(adapter, config.rank), file, header)


def kohya_tensors(adapter: Mapping[str, Mapping[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """Name an adapter's tensors as kohya's trainer does; the tensors have the same shapes there.

    A layer of the UNet is called ``lora_unet_`` and its path in diffusers with ``_`` for ``.``; one
    of a text encoder ``lora_te_``, or ``lora_te1_`` and ``lora_te2_`` where there are two. It
    has ``.lora_down.weight`` ([r, in] or [r, in, kh, kw]), ``.lora_up.weight`` ([out, r] or
    [out, r, 1, 1]) and ``.alpha``, a number; readers add alpha / r times up @ down.

    Args:
        adapter: As for `write_diffusers`.
        rank: r, which is therefore the alpha of every layer.
    """
    tensors: dict[str, Tensor] = {}
    both = "text_encoder_2" in adapter
    called = {"text_encoder": "te1" if both else "te", "text_encoder_2": "te2"}
    for part, own in adapter.items():
        for name, value in own.items():
            layer, _, side = name.removesuffix(".weight").rpartition(".")
            prefix = f"lora_{called.get(part, part)}_{layer.replace('.', '_')}"
            tensors[f"{prefix}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
            tensors[f"{prefix}.alpha"] = torch.tensor(float(rank))
    return tensors


def kohya_base(text_features: int) -> str | None:
    """Return kohya's name of a base model; None for one that its readers do not know.

    Args:
        text_features: Width of the text features that the UNet attends to.
    """
    return _BASES.get(text_features)
