"""AdamW over a policy's trained parameters: restored from a checkpoint, stepped, saved again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpo.basics.tensors import held_like, is_split, whole
from ddpo.config import OptimizerConfig


def make_adamw(
    parameters: Mapping[str, torch.nn.Parameter],
    settings: OptimizerConfig,
    state: Mapping[str, Tensor],
) -> torch.optim.Optimizer:
    """Return AdamW in the state of a checkpoint.

    Args:
        parameters: What it steps, by name; existing gradients are discarded.
        settings: Learning rate and the rest.
        state: As :func:`optimizer_state` returned it; empty before the first step.

    Returns:
        The optimizer, with its moments on the devices of their parameters.

    Raises:
        MissingPackage: 8-bit moments need bitsandbytes.
    """
    if settings.eight_bit:
        from ddpo.training.eight_bit import adamw_class  # imports bitsandbytes

        kind = adamw_class()
    else:
        kind = torch.optim.AdamW
    adamw = kind(
        list(parameters.values()),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
    )
    adamw.zero_grad(set_to_none=True)  # an interrupted update leaves gradients behind
    for key, value in state.items():
        moment, name = key.split("/", 1)
        parameter = parameters[name]
        # torch keeps the step count on the CPU, moments beside their parameter.
        held = value if moment == "step" else held_like(value, parameter)
        adamw.state[parameter][moment] = held.clone()
    return adamw


def optimizer_state(
    adamw: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """Return AdamW's state as ``moment/parameter``; views, not copies."""
    return {
        f"{moment}/{name}": value
        for name, parameter in parameters.items()
        for moment, value in adamw.state[parameter].items()
    }


def take_step(
    adamw: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    settings: OptimizerConfig,
) -> float:
    """Clip the accumulated gradient, step unless it overflowed, and clear it.

    Args:
        adamw: The optimizer of ``parameters``.
        parameters: With their gradients.
        settings: Gives the norm that the gradient is clipped to.

    Returns:
        The gradient's norm before clipping; if it is NaN or infinite, no step was taken.
    """
    largest = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    norm = _norm([p.grad for p in parameters.values() if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), largest, norm)
    if torch.isfinite(norm):
        adamw.step()
    adamw.zero_grad(set_to_none=True)
    return float(norm)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, whole ones, which later steps do not change."""
    # All ranks have to gather in one order; that of a state depends on where it was read.
    found = {name: whole(tensors[name].detach()).to("cpu", copy=True) for name in sorted(tensors)}
    return {name: found[name] for name in tensors}


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together, of split ones as one process rounds it."""
    norm = torch.nn.utils.get_total_norm
    if any(is_split(gradient) for gradient in gradients):
        gradients = [norm([whole(gradient)]) for gradient in gradients]  # whole one at a time
    return norm(gradients)
