"""Keep proxies away from servers on this machine."""

from __future__ import annotations

import os

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def never_proxy_loopback() -> None:
    """Exempt this machine from the proxies that the environment names, here and in child processes.

    Clients of HTTP otherwise send what is meant for a server of this machine to the proxy, which
    cannot reach it. Without a proxy in the environment, nothing changes.
    """
    environment = {name.lower(): value for name, value in os.environ.items() if value}
    if not any(name.endswith("_proxy") and name != "no_proxy" for name in environment):
        return  # NO_PROXY alone would hide the proxies of macOS's settings from Python
    # As clients read them: the name in lower case takes precedence.
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in listed.split(",") if host.strip()]
    if "*" in hosts:
        return
    exempt = ",".join(dict.fromkeys([*hosts, *_LOOPBACK]))
    os.environ |= {"NO_PROXY": exempt, "no_proxy": exempt}
