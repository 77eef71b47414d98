"""Seeds by name, and how much of a seed decides the numbers."""

from __future__ import annotations

import torch

from ddpo.basics.randomness import derive_seed, generator


def test_a_seed_depends_on_all_that_names_it_and_stays_what_it_was() -> None:
    assert derive_seed(0, "noise", 3, 7) == 852621771042717522
    seeds = {
        derive_seed(run, purpose, epoch, index)
        for run in range(3)
        for purpose in ("noise", "prompt")
        for epoch in range(5)
        for index in range(20)
    }
    assert len(seeds) == 3 * 2 * 5 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_lower_32_bits_of_a_seed_decide_the_numbers() -> None:
    """As documented: PyTorch's CPU generator, which plain diffusers uses too, takes no more."""
    seed = derive_seed(0, "noise", 0, 0)
    numbers = torch.randn(64, generator=generator(seed))
    assert torch.equal(numbers, torch.randn(64, generator=generator(seed % 2**32)))
    assert not torch.equal(numbers, torch.randn(64, generator=generator(seed ^ 1)))
