"""Compiled regions of a denoising network: `torch.compile` on the blocks that it repeats.

Not on the whole network: blocks of the same shape share their kernels, so that the first forward
waits for few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddpo.errors import ConfigError

if TYPE_CHECKING:
    from ddpo.models.numerics import Numerics
    from ddpo.models.weights import Network

_OF_UNETS = ("ResnetBlock2D", "Transformer2DModel")
"""Blocks of a UNet, which names only those inside of Transformer2DModel: a third or more of what
compiling saves on the starter are in the others, and in the layers around them."""

_MOST_GRAPHS = 512
"""Of one class of blocks: the shapes of a network, times batch sizes, with and without adapter.
Beyond its own limit of 8, torch would go on without compiling, which rounds otherwise."""


@cache
def check_compiler(device: str) -> None:
    """Check that this machine can compile, by compiling and running a sum.

    Args:
        device: Kind of device to compile for.

    Raises:
        ConfigError: It cannot; says what is missing.
    """
    try:
        if device == "cpu":
            from torch._inductor import cpp_builder  # takes a second

            cpp_builder.get_cpp_compiler()  # even if all that is asked for is in the cache today
        _compiled(_double)(torch.ones(2, device=device))
    except Exception as error:  # of many kinds, none of them public
        needed = (
            "a C++ compiler (g++ or clang++) with Python's headers"
            if device == "cpu"
            else "Triton, a C compiler and Python's headers"
        )
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"numerics.compile is true, but torch cannot compile for {device!r} here "
            f"({reason[0]}). It needs {needed}; install them, or start the run with "
            "numerics.compile: false"
        ) from error


def _double(tensor: Tensor) -> Tensor:
    return tensor + tensor


class _Regions:
    """How the blocks of one network compute."""

    def __init__(self, batches: Collection[int]) -> None:
        self.batches = batches
        """The batches that run kernels; decided by each block, since checkpointing runs blocks
        again in the backward."""
        self.apart = False
        """Whether each block forgets what a backward through it would need."""

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """Run the kernels of training inside the block, without room for a backward.

        A graph for the forward alone would round otherwise than the one that saves activations,
        and the importance ratio would not start at 1.
        """
        self.apart = True
        try:
            with torch.enable_grad():
                yield
        finally:
            self.apart = False

    def compiles(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a call is of a batch that runs kernels."""
        latents: Tensor = args[0] if args else kwargs["hidden_states"]
        return len(latents) in self.batches


def compile_blocks(network: Network, numerics: Numerics) -> None:
    """Compile a network's blocks in place; its modules, weights and their names stay.

    Kernels are made at the first forward of a shape. Only batches of the numerics' sizes, and with
    guidance of twice those, run them; all others, such as a shard's last one or images of fixed
    prompts, are not worth kernels of their own and compute as without. With or without gradients,
    a batch runs the same kernels, so predictions in sampling equal those in the update to the bit.

    Args:
        network: With its adapter.
        numerics: Device and batch sizes.

    Raises:
        ConfigError: This machine cannot compile.
    """
    check_compiler(numerics.device)
    sizes = (numerics.sample_batch_size, numerics.micro_batch_size)
    regions = _Regions({*sizes, *(2 * size for size in sizes)})
    kinds = _blocks(network, numerics)
    for module in network.modules():
        if type(module).__name__ in kinds:
            module.forward = _block(module.forward, regions)
    network.forward = _network(network.forward, regions)  # pyright: ignore[reportAttributeAccessIssue]


def _blocks(network: Network, numerics: Numerics) -> Sequence[str]:
    """Return the classes of the blocks to compile, none of which contains another."""
    named: Sequence[str] = network._repeated_blocks or network._no_split_modules or ()
    if type(network).__name__ != "UNet2DConditionModel":
        return named
    # Checkpointing runs the innermost blocks again: what is around them cannot be one graph.
    return (*named, "ResnetBlock2D") if numerics.gradient_checkpointing else _OF_UNETS


def _block(forward: Callable[..., Any], regions: _Regions) -> Callable[..., Any]:
    compiled = _compiled(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not regions.compiles(args, kwargs):
            return forward(*args, **kwargs)
        output = compiled(*args, **kwargs)
        # What follows still has to see whether training would compute a gradient here.
        return _each(output, _cut) if regions.apart else output

    return run


def _network(forward: Callable[..., Any], regions: _Regions) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() or not regions.compiles(args, kwargs):
            return forward(*args, **kwargs)
        with regions.forward_only():
            output = forward(*args, **kwargs)
        return _each(output, Tensor.detach)

    return run


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The same kernels in every process, whatever it has seen before: for each shape its own, and
    # chosen without measuring. `fullgraph` raises where torch would compute without them.
    torch._dynamo.config.accumulated_recompile_limit = _MOST_GRAPHS
    return torch.compile(  # pyright: ignore[reportCallIssue]  # its overloads lack the limit
        function,
        fullgraph=True,
        dynamic=False,
        options={"deterministic": True},
        recompile_limit=_MOST_GRAPHS,
    )


def _cut(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, tuple):
        return tuple(_each(part, change) for part in output)
    return change(output) if isinstance(output, Tensor) else output
