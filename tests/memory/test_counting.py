"""What is counted, how a GPU's kernels are, and what published sizes come to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention

from bench.published import PUBLISHED, write_outline
from ddpo.config import LoraConfig, ModelConfig
from ddpo.memory.advice import check_fit
from ddpo.memory.counting import LiveBytes, Peaks
from ddpo.memory.estimate import estimate
from ddpo.memory.kernels import GpuKernels
from ddpo.models.numerics import resolve_numerics
from ddpo.models.outline import outline
from tests.tiny import tiny_config
from tests.tiny_families import SETTINGS


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_count_once_for_as_long_as_they_live(device: str) -> None:
    counter = LiveBytes()
    peaks = Peaks(counter)
    with counter:
        first = torch.zeros(100, device=device)
        view = first[10:]
        with peaks.phase("sample"):
            second = first + 1
            del second
            with peaks.phase("decode"):
                third = torch.zeros(300, device=device)
                assert counter.current == 4 * (100 + 300)
                del third
        del first
        assert counter.current == 4 * 100  # the view holds it
        del view
        assert counter.current == 0
    assert peaks.found == {"sample": 4 * 200, "decode": 4 * 400}


def test_what_a_backward_keeps_is_counted() -> None:
    with LiveBytes() as counter:
        weight = torch.zeros(1000, device="meta", requires_grad=True)
        result = (weight.exp() * 2).sum()
        assert counter.current == 4 * (1000 + 1000 + 1)  # exp keeps its output
        result.backward()
        del result
        assert counter.current == 4 * 2000


def test_attention_counts_as_one_kernel() -> None:
    heads, tokens, features = 8, 4096, 64
    with LiveBytes() as counter, GpuKernels():
        query, key, value = (
            torch.zeros(1, heads, tokens, features, device="meta", requires_grad=True)
            for _ in range(3)
        )
        output = scaled_dot_product_attention(query, key, value=value)
        output.sum().backward()
        assert query.grad is not None and query.grad.shape == query.shape
    assert counter.peak < 10 * 4 * heads * tokens * features  # the matrix alone would be 64 times


def test_autocast_on_meta_is_that_of_cuda() -> None:
    weight = torch.zeros(50, 50, device="meta", requires_grad=True)
    row = torch.zeros(1, 50, device="meta")
    with LiveBytes() as counter, GpuKernels():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = linear(row, weight)
            assert first.dtype == torch.bfloat16
            assert layer_norm(first, (50,)).dtype == torch.float32
            before = counter.current
            second = linear(row, weight)
            assert counter.current - before < weight.numel()  # the weight was cast before
        assert (row @ weight).dtype == torch.float32
        del second


SIZES = {
    # Parameters of the trained network, and of the text encoders, as counted on the Hub.
    "Stable Diffusion 1.5": (859_520_964, (123_060_480,)),
    "Stable Diffusion XL": (2_567_463_684, (123_060_480, 694_659_840)),
    "FLUX.1-dev": (11_901_408_320, (123_060_480, 4_762_310_656)),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_models_are_built_from_json_alone(tmp_path: Path, name: str) -> None:
    folder = write_outline(name, tmp_path)
    numerics = resolve_numerics(tiny_config(folder).numerics)
    policy = outline(ModelConfig(path=str(folder)), LoraConfig(), numerics)
    network, encoders = SIZES[name]
    trained = [p for p in policy.network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in policy.network.parameters()) == network + sum(
        p.numel() for p in trained
    )
    found = [
        sum(p.numel() for p in policy._modules()[part].parameters())
        for part in PUBLISHED[name][1]
        if part.startswith("text_encoder")
    ]
    assert tuple(found) == encoders


def test_settings_are_found_that_make_a_config_fit(pipelines: Mapping[str, Path]) -> None:
    config = tiny_config(pipelines["sd"])
    numerics = resolve_numerics(config.numerics)
    needs = estimate(config, numerics)
    assert needs.largest == "update"
    assert check_fit(config, numerics, needs.peak).fits
    tight = check_fit(config, numerics, needs.peak // 2)
    assert not tight.fits and "numerics.micro_batch_size" in tight.settings
    assert tight.then.peak <= needs.peak // 2
    assert "would fit with numerics.micro_batch_size=" in tight.message
    whole = config.changed(trainable={"type": "full"})
    hopeless = check_fit(whole, numerics, 1000)
    assert hopeless.settings["trainable"] == LoraConfig() and "does not fit" in hopeless.message


def test_micro_batches_that_fit_hold_what_a_loss_compares(pipelines: Mapping[str, Path]) -> None:
    config = tiny_config(
        pipelines["sd"],
        algorithm={"type": "dpo"},
        rollouts={"samples_per_prompt": 2},
        numerics={"micro_batch_size": 8},
    )
    numerics = resolve_numerics(config.numerics)
    needs = estimate(config, numerics)
    fixed = needs.frozen + 4 * needs.trained
    room_for_three = fixed + (needs.peak - fixed) * 7 // 16
    tight = check_fit(config, numerics, room_for_three, needs=needs)
    assert tight.settings["numerics.micro_batch_size"] == 2


def test_t5_is_left_out_where_it_does_not_fit(pipelines: Mapping[str, Path]) -> None:
    config = tiny_config(pipelines["sd3"], **SETTINGS["sd3"])
    numerics = resolve_numerics(config.numerics).model_copy(update={"device": "cuda"})
    needs = estimate(config, numerics, parts=())
    assert needs.largest == "encode"
    without = estimate(config.changed(model={"path": config.model.path, "t5": False}), numerics)
    assert without.text_encoders < needs.text_encoders


def test_a_view_of_what_is_passed_over_does_not_count() -> None:
    weight = torch.zeros(8, 4, device="meta")
    counter = LiveBytes()
    counter.pass_over([weight])
    with counter:
        view = weight.t()
        made = weight + 1
    assert counter.current == made.nbytes == 8 * 4 * 4
    assert view.shape == (4, 8)
