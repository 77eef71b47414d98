"""Any reward over HTTP: pictures in multipart, everything else JSON, nothing pickled.

What a request may be is bounded before it is taken in: the body is counted while it is read, a
picture's size is read from its header before it is decoded, and how many requests are held at once
is bounded too. What is over a bound is refused by a clear status, and the service goes on.
"""

from ddpo.rewards.service.app import create_app
from ddpo.rewards.service.limits import Limits
from ddpo.rewards.service.serving import serve

__all__ = ["Limits", "create_app", "serve"]
