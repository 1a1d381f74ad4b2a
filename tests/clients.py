"""HTTP clients of tests."""

from typing import Any

import httpx

TRUSTED = httpx.create_ssl_context()
"""Read once: a client that reads the certificates itself spends 20 ms on them, and no test speaks TLS with it."""


def client(**options: Any) -> httpx.Client:
    """Make a client as `httpx.Client` does."""
    return httpx.Client(verify=TRUSTED, **options)
