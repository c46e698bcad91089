"""How the API server is reached: what the official client loads of a pod's service account or of a kubeconfig, kept
fresh for as long as the process runs.

Loading is `kubernetes.aio`'s: exec plug-ins, token files, client certificates, tls-server-name, proxies. What it does
not do is load again: an answer 401 is the moment to, for kopf's requests and for ours alike.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from yarl import URL

log = logging.getLogger(__name__)

USER_AGENT = "finetune-operator"

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_TRIES = 3
_SECONDS_BETWEEN_LOADS = 5.0
_LOADING_SECONDS = 60.0
_BUFFER_BYTES = 2**16
"""Read ahead for each connection. The client's own 2 MiB are for readers that want a whole line in the buffer."""


class ConfigurationError(ValueError):
    """The operator cannot work as it is set up; the message says what to change."""


class Access:
    """Connections to one API server, with credentials that are loaded again when the server no longer takes them."""

    def __init__(self, configuration: Configuration, kubeconfig: str | None = None) -> None:
        self._configuration, self._kubeconfig = configuration, kubeconfig
        self._clients: list[ApiClient] = []
        self._loading: asyncio.Task[None] | None = None
        self._loaded_at = time.monotonic()
        self._origin = URL(configuration.host).origin()
        # A pod reaches its API server without a proxy, whatever the environment says for the rest of the world.
        self._trust_environment = kubeconfig is not None
        configuration.client_session_kwargs = {
            "middlewares": (self._authorise,),
            "read_bufsize": _BUFFER_BYTES,
            "trust_env": self._trust_environment,
        }

    @classmethod
    async def load(cls, environment: Mapping[str, str] = os.environ) -> Access:
        """From the pod's service account, or else from the kubeconfig files. Raises ConfigurationError."""
        kubeconfig = _kubeconfig(environment)
        configuration = Configuration()
        await _load_into(configuration, kubeconfig)
        return cls(configuration, kubeconfig)

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self._configuration.host)

    def client(self, connections: int) -> ApiClient:
        """The official client over a pool of that many connections; 0 for as many as are asked for."""
        self._configuration.connection_pool_maxsize = connections
        client = ApiClient(self._configuration)
        client.user_agent = USER_AGENT
        self._clients.append(client)
        return client

    def session(self, *middlewares: aiohttp.ClientMiddlewareType) -> aiohttp.ClientSession:
        """A session for requests that somebody else makes (kopf), with the same credentials; theirs to close."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._of_sessions.rest_client.ssl_context),
            headers={"User-Agent": USER_AGENT},
            proxy=self._configuration.proxy,
            trust_env=self._trust_environment,
            middlewares=(*middlewares, self._authorise),
            read_bufsize=_BUFFER_BYTES,
        )

    @functools.cached_property
    def _of_sessions(self) -> ApiClient:
        """Never called: it holds the TLS settings that sessions share."""
        return self.client(0)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()

    async def _authorise(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Give a request the credentials of the moment; where they are refused, load them anew and ask again."""
        if request.url.origin() != self._origin:  # credentials are for nobody else
            raise aiohttp.ClientConnectionError(f"the API server redirects to {request.url.origin()}")
        request.server_hostname = self._configuration.tls_server_name
        for left in reversed(range(_TRIES)):
            asked_at = time.monotonic()
            if token := await self._token():
                request.headers["Authorization"] = token
            if request.session.closed:  # by kopf, meanwhile: as aiohttp has it, which kopf knows how to mend
                raise RuntimeError("Session is closed")
            response = await handler(request)
            if response.status != 401 or not left:
                break
            response.close()  # the connection, too: it may stand for a client certificate that has expired
            await self._reload(asked_at)
        return response

    async def _token(self) -> str:
        """The credentials of the moment: the client reads a pod's token again every minute."""
        try:
            token = await self._configuration.get_api_key_with_prefix("BearerToken") or ""
        except (ConfigException, OSError) as error:  # the file is being replaced: as if the server could not be reached
            raise aiohttp.ClientConnectionError(str(error)) from error
        return token.strip()  # the client reads a token file to its end, line break included, which no header may have

    async def _reload(self, asked_at: float) -> None:
        """Load the credentials again, unless that happened since they were used. All requests wait for one loading, and
        none that is given up ends it."""
        if self._loaded_at > asked_at:
            return
        if self._loading is None:
            self._loading = asyncio.create_task(self._load_again())
        await asyncio.shield(self._loading)

    async def _load_again(self) -> None:
        """Not more often than now and then. What cannot be loaded leaves the credentials as they are."""
        try:
            await asyncio.sleep(max(0.0, self._loaded_at + _SECONDS_BETWEEN_LOADS - time.monotonic()))
            await _load_into(self._configuration, self._kubeconfig)
            if certificate := self._configuration.cert_file:
                for client in self._clients:
                    client.rest_client.ssl_context.load_cert_chain(certificate, self._configuration.key_file)
        except (ConfigurationError, OSError) as error:
            log.warning("the credentials could not be loaded again: %s", error)
        finally:
            self._loaded_at, self._loading = time.monotonic(), None


def _kubeconfig(environment: Mapping[str, str]) -> str | None:
    """The path, or paths, of the kubeconfig; None in a pod."""
    if "KUBERNETES_SERVICE_HOST" in environment and _ACCOUNT.exists():
        return None
    paths = environment.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    if not any(Path(path).expanduser().exists() for path in paths.split(os.pathsep) if path):
        raise ConfigurationError(f"not in a pod, and there is no kubeconfig at {paths}: set KUBECONFIG")
    return paths


async def _load_into(configuration: Configuration, kubeconfig: str | None) -> None:
    """Set server and credentials. Raises ConfigurationError with the reason."""
    try:
        if kubeconfig is None:
            load_incluster_config(client_configuration=configuration)
        else:
            async with asyncio.timeout(_LOADING_SECONDS):  # an exec plug-in may hang
                await load_kube_config(config_file=kubeconfig, client_configuration=configuration)
    except TimeoutError as error:
        raise ConfigurationError(f"the kubeconfig {kubeconfig} took longer than {_LOADING_SECONDS:.0f} s") from error
    except (ConfigException, OSError, ValueError, yaml.YAMLError) as error:
        where = f"the kubeconfig {kubeconfig}" if kubeconfig else "the pod's service account"
        raise ConfigurationError(f"{where} cannot be used: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:  # how the client takes what is missing
        raise ConfigurationError(
            f"the kubeconfig {kubeconfig} cannot be used: its current context names no user, or it is no kubeconfig"
        ) from error
    secured = str(configuration.host).startswith("https:")
    if secured and not configuration.cert_file and not configuration.api_key.get("BearerToken"):
        raise ConfigurationError(
            f"the kubeconfig {kubeconfig} gives its current user no credentials: it takes a token, a tokenFile, a "
            "client certificate or an exec plug-in; what such a plug-in says stands in the log before this line"
        )
