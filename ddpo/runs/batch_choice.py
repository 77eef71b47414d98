"""Which batch sizes are tried where they are `auto`, and which of them is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TOLERANCE = 0.05
"""A batch may be so much slower than the fastest one if it is smaller: measured times differ by
that much by themselves, and a larger batch takes more memory."""


def candidates(
    shard_size: int, most: int, together: int = 1, given: int | str = "auto"
) -> list[int]:
    """Return the sizes to try, about a factor of two apart, from the smallest.

    Up to the shard's size, they divide it, as the sampler's batches must: for a shard of 64 images
    they are powers of two.

    Args:
        shard_size: Images per shard.
        most: No size is larger, unless it is the only one.
        together: All sizes are multiples of it.
        given: The other batch's size, if it is a number: equal sizes may be worth it.
    """
    divisors = [size for size in range(1, shard_size + 1) if shard_size % size == 0]
    sizes, power = {together}, 1
    while power < 2 * max(most, shard_size):
        sizes.add(max(size for size in divisors if size <= power))
        power *= 2
    size = shard_size
    while size <= most:
        sizes.add(size)
        size *= 2
    if given in divisors:
        sizes.add(int(given))
    fitting = (size for size in sizes if size <= most and size % together == 0)
    return sorted(fitting) or [together]


def no_longer_gains(seconds: Sequence[float]) -> bool:
    """Return whether the last two sizes that were measured are no faster than one before them.

    Args:
        seconds: Per image or item, in the order of the sizes.
    """
    return len(seconds) > 2 and min(seconds[-2:]) * (1 + TOLERANCE) > min(seconds[:-2])


def choose(
    sampling: Mapping[int, float], update: Mapping[int, float], apart: float | None
) -> tuple[int, int]:
    """Return the batch sizes of sampling and update.

    They are the smallest with which an epoch takes no more than :data:`TOLERANCE` above the least
    time. Among those, equal ones come first where it matters.

    Args:
        sampling: Seconds that an image of an epoch takes, by size; a size that is given has 0.
        update: Likewise, of all items that an image becomes.
        apart: Seconds per image that different sizes cost on top, such as for log-probs that are
            computed again; None where it does not matter whether sizes are equal.
    """
    if apart is None:
        return _smallest(sampling), _smallest(update)
    seconds = {
        (drawn, trained): sampling[drawn] + update[trained] + apart * (drawn != trained)
        for drawn in sampling
        for trained in update
    }
    limit = min(seconds.values()) * (1 + TOLERANCE)
    return min(
        (sizes for sizes, each in seconds.items() if each <= limit),
        key=lambda sizes: (sizes[0] != sizes[1], sum(sizes)),
    )


def _smallest(seconds: Mapping[int, float]) -> int:
    limit = min(seconds.values()) * (1 + TOLERANCE)
    return min(size for size, each in seconds.items() if each <= limit)
