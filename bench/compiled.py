"""What ``numerics.compile`` saves, and what it costs at first: ``python -m bench.compiled``.

Loads a config's model twice, and alternates between forwards (sampling) and forwards with
backwards (update) of its batch sizes, compiled and not, in one process. Times are CPU seconds of
one thread, so that other work on the machine counts little; those of compilers that it starts are
not in them. An empty TORCHINDUCTOR_CACHE_DIR shows a cold start, the same one again a warm one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpo.config.files import read_config
from ddpo.models import Policy, load_policy
from ddpo.models.numerics import resolve_numerics


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds that some work takes in this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the first calls, and then the medians and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--config", default="configs/starter.yaml")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=c", dest="changes")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    config = read_config(
        given.config, ["numerics.device=cpu", "numerics.threads=1", *given.changes]
    )

    def loaded(compiled: bool) -> Policy:
        numerics = resolve_numerics(config.numerics.changed(compile=compiled))
        return load_policy(config.model, config.trainable, numerics, seed=config.seed)

    def predict(policy: Policy, batch: int) -> Tensor:
        noise = torch.Generator().manual_seed(0)
        latents = torch.randn(batch, *policy.latent_shape, generator=noise)
        conditioning = policy.encode(["a cat"] * batch)
        times = torch.full((batch,), 500.0)
        return policy.predict(latents, times, conditioning, config.sampler.guidance_scale)

    @torch.no_grad()
    def forward(policy: Policy) -> None:
        predict(policy, policy.numerics.sample_batch_size)

    def both(policy: Policy) -> None:
        predict(policy, policy.numerics.micro_batch_size).square().mean().backward()
        for parameter in policy.weights.parameters().values():
            parameter.grad = None

    policies = {"eager": loaded(False), "compiled": loaded(True)}
    parts = {"forward": forward, "forward and backward": both}
    for name, policy in policies.items():
        policy.prepare_prompts(["a cat"])
        for part, work in parts.items():
            seconds = timed(lambda work=work, policy=policy: work(policy))
            print(f"first {part}, {name}: {seconds:.1f} s", flush=True)
    for part, work in parts.items():
        found: dict[str, list[float]] = {name: [] for name in policies}
        for _ in range(given.rounds):
            for name, policy in policies.items():
                found[name].append(timed(lambda work=work, policy=policy: work(policy)))
        ratios = [e / c for e, c in zip(found["eager"], found["compiled"], strict=True)]
        print(
            f"{part}: eager {statistics.median(found['eager']):.3f} s, compiled "
            f"{statistics.median(found['compiled']):.3f} s; {statistics.median(ratios):.2f} times "
            f"as fast ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
