"""A small client of the API server for the cluster's own needs: JSON over one connection, and watches."""

import http.client
import json
import ssl
from collections.abc import Iterator
from typing import Any

from tests.cluster.layout import CONTROL_PLANE_ADDRESS, Layout
from tests.cluster.pki import PORT


class ApiError(Exception):
    """The API server refused; `status` is the HTTP status, `reason` Kubernetes' reason."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body.strip()}")
        self.status = status
        try:
            self.reason = str(json.loads(body).get("reason", ""))
        except ValueError:
            self.reason = ""


class Api:
    """A client with the certificate of one of the cluster's own users."""

    def __init__(self, layout: Layout, user: str = "admin", timeout: float = 10) -> None:
        self._context = ssl.create_default_context(cafile=str(layout.pki / "ca.crt"))
        self._context.load_cert_chain(layout.pki / f"{user}.crt", layout.pki / f"{user}.key")
        self._timeout = timeout

    def _connection(self, timeout: float | None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(CONTROL_PLANE_ADDRESS, PORT, context=self._context, timeout=timeout)

    def request(self, method: str, path: str, body: object = None, content_type: str = "application/json") -> Any:
        """One call; returns the decoded answer (text that is not JSON as it is)."""
        connection = self._connection(self._timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": content_type, "Accept": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        if response.status >= 400:
            raise ApiError(response.status, text)
        try:
            return json.loads(text)
        except ValueError:
            return text

    def apply(self, path: str, body: object) -> Any:
        """Server-side apply of one object."""
        path = f"{path}?fieldManager=finetune-cluster&force=true"
        return self.request("PATCH", path, body, "application/apply-patch+yaml")

    def ready(self) -> bool:
        """Whether the API server answers that it is ready."""
        try:
            return bool(self.request("GET", "/readyz") == "ok")
        except (OSError, http.client.HTTPException, ApiError):
            return False

    def watch(self, path: str, version: str, seconds: int = 300) -> Iterator[tuple[str, dict[str, Any]]]:
        """Events (type, object) after a resourceVersion, until the server ends the watch."""
        connection = self._connection(seconds + 30)
        try:
            separator = "&" if "?" in path else "?"
            query = f"watch=1&allowWatchBookmarks=true&timeoutSeconds={seconds}&resourceVersion={version}"
            connection.request("GET", f"{path}{separator}{query}", headers={"Accept": "application/json"})
            response = connection.getresponse()
            if response.status >= 400:
                raise ApiError(response.status, response.read().decode())
            while line := response.readline():
                event = json.loads(line)
                yield event["type"], event["object"]
        finally:
            connection.close()
