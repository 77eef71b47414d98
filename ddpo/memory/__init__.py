"""Whether a config fits into a device's memory, found by running its code without computing.

`counting.py` counts the bytes of live tensors; `outline.py` builds a policy on torch's `meta`
device from JSON files; `estimate.py` samples and trains with it; `advice.py` finds settings that
would make a config fit.
"""

from __future__ import annotations
