"""How those who learn say how far they are."""

from __future__ import annotations

from collections.abc import Callable

Watch = Callable[[int, int], None]
"""Called with how much is done, and of how much."""
