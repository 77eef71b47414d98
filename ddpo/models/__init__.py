"""A diffusers pipeline seen as a policy."""

from ddpo.models.hub import check_model
from ddpo.models.stable_diffusion import Policy, policy_digest

__all__ = ["Policy", "check_model", "policy_digest"]
