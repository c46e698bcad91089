"""A hub for tests: serves folders over the Hugging Face protocol."""

from tests.hub.server import Hub

__all__ = ["Hub"]
