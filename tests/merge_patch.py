"""What a server makes of a JSON merge patch (RFC 7396)."""

from typing import Any


def merged(document: Any, patch: Any) -> Any:
    """The document under the patch."""
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
