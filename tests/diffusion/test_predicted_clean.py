"""The clean latents that a prediction implies, for all that models predict."""

from __future__ import annotations

import pytest
import torch

from tests.noised import KINDS, coefficients, process_of_kind


@pytest.mark.parametrize("kind", KINDS)
def test_clean_latents_follow_from_a_prediction_by_the_schedules_own_formula(kind: str) -> None:
    process = process_of_kind(kind)
    source = torch.Generator().manual_seed(1)
    clean, noise, other = (
        torch.randn(4, 4, 8, 8, generator=source, dtype=torch.float64) for _ in range(3)
    )
    noisy, target = process.schedule.noised(clean, noise, process.times)
    found = process.schedule.predicted_clean(noisy, target, process.times)
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)
    found = process.schedule.predicted_clean(noisy, other, process.times)
    for row, time in enumerate(process.times.tolist()):
        a, b = coefficients(kind, time)
        expected = a * noisy[row] + b * other[row]
        torch.testing.assert_close(found[row], expected, atol=1e-4 * abs(b) + 1e-6, rtol=1e-4)
