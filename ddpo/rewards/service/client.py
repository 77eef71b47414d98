"""What rewards that a service computes have in common: where it runs, and how long to wait."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from pydantic import NonNegativeInt, PositiveFloat

from ddpo.basics.trust import check_trusted
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.service.endpoints import Endpoints, Patience, Service
from ddpo.rewards.service.wire import check_variable


@dataclass(kw_only=True, eq=False)
class ServedReward:
    """A reward that a service computes; its fields are parameters of every such reward.

    Where the service runs is not part of its identity: it may be stopped, restarted, moved or given
    a second endpoint, at no cost but the delay.
    """

    thread_safe: ClassVar[bool] = True

    endpoints: tuple[str, ...] = ()
    """Base addresses, ``http://host:port`` with an optional path; tried in turn."""
    endpoints_variable: str
    """Environment variable that overrides `endpoints` if set, with addresses separated by commas:
    the service can move while the config stays. Several such rewards need one variable each."""
    connect_timeout_s: PositiveFloat = 5.0
    """Seconds to connect to an endpoint."""
    timeout_s: PositiveFloat = 120.0
    """Seconds in which an endpoint must respond to a request, including time in its queue."""
    retries: NonNegativeInt = 60
    """How often all endpoints are tried again for a request."""
    give_up_after_s: PositiveFloat = 600.0
    """Seconds after which a request fails."""
    start_within_s: PositiveFloat = 15.0
    """Seconds to wait for the service when the reward is built."""
    identity: RewardIdentity = field(init=False, repr=False)
    """What the service says that it computes."""
    connection: tuple[str, ...] = field(init=False, repr=False)
    """Where it is reached, and with which token: a reward elsewhere is another object."""

    def _connect(self, *, what: str, start: str, example: str, token_parameter: str) -> Endpoints:
        """Return the service's endpoints.

        Args:
            what: As in `Service`.
            start: As in `Service`.
            example: As in `Service`.
            token_parameter: Name of the parameter that names the variable with the token.

        Raises:
            ConfigError: A variable's name or the token is malformed, or a config may not name it.
            NotTrusted: A stored run that is not trusted names the endpoints.
        """
        usual = {field.name: field.default for field in fields(self)}
        for parameter in ("endpoints_variable", token_parameter):
            check_variable(getattr(self, parameter), parameter, str(usual[parameter]))
        if self.endpoints:
            check_trusted("its reward sends images to addresses that it names")
        endpoints = Endpoints(
            self.endpoints,
            Service(
                what=what,
                start=start,
                example=example,
                variable=self.endpoints_variable,
                token_variable=getattr(self, token_parameter),
            ),
            Patience(self.connect_timeout_s, self.timeout_s, self.retries, self.give_up_after_s),
        )
        self.connection = endpoints.connection
        return endpoints
