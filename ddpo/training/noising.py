"""When, and with what noise, the final latents of an update are noised.

Shapes: N noised samples of one update or micro-batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from ddpo.algorithms.base import Update
from ddpo.algorithms.denoising import Times
from ddpo.basics.randomness import derive_seed, generator
from ddpo.diffusion import Process
from ddpo.models import Policy


@dataclass(frozen=True)
class Noising:
    """The noise that some samples are given."""

    times: Tensor
    """[N] float32, on the model's axis."""
    noise: Tensor
    """[N, C, h, w] float32, standard normal."""

    def part(self, rows: Tensor) -> Noising:
        """Return that of some rows, [n] int64."""
        return Noising(self.times[rows], self.noise[rows])

    @classmethod
    def draw(
        cls,
        run_seed: int,
        epoch: int,
        inner_epoch: int,
        samples: Sequence[int],
        policy: Policy,
        process: Process,
    ) -> Noising:
        """Draw times as in the model's training, and noise, from a sample's index and pass alone.

        Args:
            run_seed: The config's ``seed``.
            epoch: The epoch.
            inner_epoch: The pass over the epoch's samples.
            samples: N indices within the epoch.
            policy: Gives the shape of its latents.
            process: Gives the distribution of training times.

        Returns:
            Times and noise on the CPU.
        """
        times, noise = [], []
        for index in samples:
            source = generator(derive_seed(run_seed, "regression", epoch, inner_epoch, index))
            times.append(process.schedule.training_time(source))
            noise.append(torch.randn(policy.latent_shape, generator=source))
        return cls(torch.stack(times), torch.stack(noise))


class Noiser:
    """Draws the noise of an epoch's updates, as an algorithm's times say.

    Args:
        policy: Gives the shape of its latents.
        process: Gives the times of steps, and the distribution of training times.
        times: The algorithm's.
        run_seed: The config's ``seed``.
        epoch: The epoch.
        together: How many consecutive samples of an update share their times and noise.
    """

    def __init__(
        self,
        policy: Policy,
        process: Process,
        times: Times,
        run_seed: int,
        epoch: int,
        together: int = 1,
    ) -> None:
        self.policy, self.process, self.times = policy, process, times
        self.path = (run_seed, epoch)
        self.together = together
        self.steps = trained_steps(times, process.steps)
        self.times_per_sample = min(times.count or self.steps, self.steps)
        """How often a pass noises each sample."""
        if times.source == "training":
            self.times_per_sample = 1

    def of(self, update: Update) -> UpdateNoising:
        """Return what an update is noised with."""
        return UpdateNoising(self, update)

    def steps_of(self, inner_epoch: int, sample: int) -> list[int]:
        """Return the numbers of the sampler's steps at whose times a pass noises a sample.

        Each is at random in one of equal parts of the steps that are trained, in random order.
        """
        run_seed, epoch = self.path
        source = generator(derive_seed(run_seed, "times", epoch, inner_epoch, sample))
        count = self.times_per_sample
        first = [self.steps * part // count for part in range(count + 1)]
        drawn = [
            low + int(torch.randint(high - low, (), generator=source))
            for low, high in pairwise(first)
        ]
        return [drawn[i] for i in torch.randperm(count, generator=source).tolist()]


def trained_steps(times: Times, steps: int) -> int:
    """Return how many of the sampler's steps, from the noisiest, have times that are trained."""
    # In decimals, as the config says it: 0.29 of 100 steps are 29, and not 28.999.
    return max(int(Fraction(str(times.share)) * steps), 1)


class UpdateNoising:
    """What an update's samples are noised with, drawn when it is asked for.

    An update's noised samples are all samples at their first times, then all at their second ones,
    and so on; noise of all of them at once may not fit into memory.

    Args:
        noiser: The epoch's.
        update: The update.
    """

    def __init__(self, noiser: Noiser, update: Update) -> None:
        self._noiser, self._inner_epoch = noiser, update.inner_epoch
        self._drawn_from_training = noiser.times.source == "training"
        self.samples = [*update.samples] * noiser.times_per_sample
        """[N], the sample of each noised sample."""
        # Samples that share their noise have that of the first of them.
        first = [update.samples[i - i % noiser.together] for i in range(len(update.samples))]
        self._drawn_for = first * noiser.times_per_sample
        self._steps: list[int] = []
        if not self._drawn_from_training:
            steps = [noiser.steps_of(update.inner_epoch, sample) for sample in first]
            self._steps = [of[turn] for turn in range(noiser.times_per_sample) for of in steps]

    def part(self, rows: Tensor) -> Noising:
        """Draw the times and noise of some noised samples, [n] int64; on the CPU.

        Noise depends on run seed, epoch, pass, sample and step alone, the sample being the first of
        those that share it.
        """
        noiser, numbers = self._noiser, rows.tolist()
        (run_seed, epoch), inner = noiser.path, self._inner_epoch
        if self._drawn_from_training:
            samples = [self._drawn_for[row] for row in numbers]
            return Noising.draw(run_seed, epoch, inner, samples, noiser.policy, noiser.process)
        noise = [
            torch.randn(
                noiser.policy.latent_shape,
                generator=generator(
                    derive_seed(
                        run_seed, "noising", epoch, inner, self._drawn_for[row], self._steps[row]
                    )
                ),
            )
            for row in numbers
        ]
        steps = torch.tensor([self._steps[row] for row in numbers])
        return Noising(noiser.process.times.cpu()[steps], torch.stack(noise))
