"""A diffusers pipeline seen as a policy."""

from ddpo.policies.loading import check_model
from ddpo.policies.policy import Policy, policy_digest

__all__ = ["Policy", "check_model", "policy_digest"]
