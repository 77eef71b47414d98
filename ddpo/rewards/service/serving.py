"""The process of a reward service: `ddpo serve-reward`."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

import uvicorn

from ddpo.basics.children import ordinary_children
from ddpo.errors import ConfigError
from ddpo.rewards.base import Reward, group_weights
from ddpo.rewards.registry import load_reward
from ddpo.rewards.service.app import create_app
from ddpo.rewards.service.limits import Limits
from ddpo.rewards.service.wire import TOKEN_VARIABLE, read_token

_KEEP_ALIVE_S = 30
_SHUTDOWN_S = 30

_logger = logging.getLogger(__name__)


def serve(
    name: str,
    parameters: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8100,
    limits: Limits | None = None,
    say: Callable[[str], None] = _logger.info,
) -> None:
    """Serve a reward until the process is asked to stop.

    Args:
        name: A registered reward or an import path.
        parameters: Its parameters.
        host: Address to listen on. One that other machines can reach requires a token.
        port: Port to listen on; 0 selects a free one.
        limits: Bounds of a request.
        say: Called with a line when the service listens, and with one when the reward is loaded.

    Raises:
        ConfigError: There is no such reward, the address is not available, or other machines can
            reach it and there is no token.
        RewardError: The reward could not be built.
    """
    token = read_token(TOKEN_VARIABLE)
    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"{host!r} can be reached from other machines, but there is no token; set the "
            f"environment variable {TOKEN_VARIABLE} here and for the run, or listen on 127.0.0.1"
        )
    failures: list[Exception] = []

    def load() -> Reward:
        try:
            reward = load_reward(name, parameters)
            if group_weights(reward):
                raise ConfigError(
                    f"reward {name!r} has `normalise: group`, which decides how a run computes "
                    "advantages and so cannot be served; serve its components, and let the run's "
                    "own sum name them by `http`"
                )
        except Exception as error:
            failures.append(error)
            server.should_exit = True
            raise
        say(f"ready: {reward.identity.reward_id}")
        if limits is not None and limits.workers > 1 and not getattr(reward, "thread_safe", False):
            say(
                f"{limits.workers} workers share a reward that scores one request at a time; if "
                "several threads may call it, set its attribute `thread_safe = True`"
            )
        return reward

    app = create_app(load, token=token, limits=limits)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )
    with _listen(host, port) as listener, ordinary_children():
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        say(f"reward {name} on {url}, its API on {url}/docs")
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {error.strerror}; choose another with --port "
            "or --host"
        ) from error
