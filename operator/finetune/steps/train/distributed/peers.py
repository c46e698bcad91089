"""The pods of one attempt: they wait for each other, agree where to go on from, and notice when one of them is gone.

torchrun gives up a rendezvous after minutes, but pods of one attempt may get their machines hours apart; and it tells
nobody on another machine that a worker died. So each pod keeps one connection to the pod of index 0 from before the
start of training to its end. What ends one pod ends all of them, and all tell the same end: the operator learns it from
whichever pod is still there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.api.contract import NODE_RANK, NODES, PEER_LOST, RENDEZVOUS, ExitCode, StepError
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.distributed.outcome import Outcome

GRACE = 10.0
"""Seconds that the processes of a pod get to end by themselves when another pod has ended."""

LAST_WORD = 5.0
"""Seconds that a pod whose training broke off waits to hear whether another one knows why."""

_RETRY = 0.5
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""A machine that vanishes without a word is noticed after a minute."""

log = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where this pod stands among the pods of its attempt."""

    rank: int = 0
    nodes: int = 1
    host: str = ""
    port: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """As the operator says it; a pod by itself when it says nothing."""
        nodes = int(environment.get(NODES) or 1)
        if nodes == 1:
            return cls()
        host, _, port = environment[RENDEZVOUS].rpartition(":")
        return cls(int(environment[NODE_RANK]), nodes, host, int(port))

    def of_pod(self, rank: int) -> str:
        return f"pod {rank} of {self.nodes}"


class Peers:
    """The other pods, from the moment when all are there. Of a pod by itself there are none."""

    def __init__(self, place: Place, connections: Mapping[int, _Connection] | None = None) -> None:
        self._place = place
        self._connections = dict(connections or {})
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._end: Outcome | None = None
        self._left = False

    def watch(self, abandon: Callable[[], None]) -> None:
        """From now on call `abandon` some time after another pod has ended other than well."""
        for rank, connection in self._connections.items():
            name = f"pod-{rank}"
            threading.Thread(target=self._listen, args=(rank, connection, abandon), name=name, daemon=True).start()

    def _listen(self, rank: int, connection: _Connection, abandon: Callable[[], None]) -> None:
        word = connection.receive()
        if word is not None and word["code"] == ExitCode.OK:
            return
        with self._lock:
            if self._left or self._end is not None:
                return
            self._end = _end_of(self._place.of_pod(rank), word)
        self._ended.set()
        time.sleep(GRACE)
        if not self._left:
            log.warning(
                "%s has ended, and the processes of this pod have not: they are ended", self._place.of_pod(rank)
            )
            abandon()

    def why(self, outcome: Outcome) -> Outcome:
        """How the attempt ended, for a pod whose own part ended so: what broke off here may have its cause elsewhere.

        A pod that knows itself what is wrong believes nobody else.
        """
        if outcome.code != ExitCode.UNAVAILABLE or not self._connections:
            return outcome
        self._ended.wait(LAST_WORD)
        return self._end or outcome

    def farewell(self, outcome: Outcome) -> None:
        """Tell the others how this pod ended."""
        with self._lock:
            self._left = True
        error = outcome.error.model_dump() if outcome.error else None
        for connection in self._connections.values():
            connection.send({"code": int(outcome.code), "result": outcome.result, "error": error})
            connection.close()


def _end_of(pod: str, word: Message | None) -> Outcome:
    """The end that another pod's is for this one. `word` is None when it left without any."""
    if word is None:
        said = f"{pod} is gone without a word: it was killed, or its machine was lost"
        hint = "Its own status and log may say more; the operator starts all pods anew."
        return Outcome.of(StepFailure(ExitCode.UNAVAILABLE, PEER_LOST, said, hint))
    error = StepError.model_validate(word["error"]) if word["error"] else StepError(reason=PEER_LOST, message="ended")
    told = error.model_copy(update={"message": f"{pod}: {error.message}"})
    return Outcome(ExitCode(word["code"]), word["result"], told)


@contextlib.contextmanager
def met(place: Place, identity: str, agree: Message) -> Iterator[tuple[Peers, Message]]:
    """All pods of the attempt, once they are all there, and what the first of them said.

    `identity` keeps strangers out: it has to be the same in all pods. `agree` is what the first pod says to all.
    Waits without limit: the operator tells the user why a pod is not there yet.
    """
    if place.nodes == 1:
        yield Peers(place), agree
        return
    connections: dict[int, _Connection] = {}
    try:
        if place.rank == 0:
            _gather(place, identity, connections)
            for connection in connections.values():
                connection.send(agree)
            said = agree
        else:
            said = _join(place, identity, connections)
        peers = Peers(place, connections)
        try:
            yield peers, said
        except StepFailure as failure:
            peers.farewell(Outcome.of(failure))
            raise
    finally:
        for connection in connections.values():
            connection.close()


def _gather(place: Place, identity: str, connections: dict[int, _Connection]) -> None:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", place.port), family=family, dualstack_ipv6=dual) as server:
        while len(connections) < place.nodes - 1:
            missing = sorted(set(range(1, place.nodes)) - connections.keys())
            log.info("waiting for %s", ", ".join(map(place.of_pod, missing[:5])))
            accepted, _ = server.accept()
            connection = _Connection(accepted, timeout=10)
            hello = connection.receive()
            rank = hello.get("rank") if hello and hello.get("identity") == identity else None
            if not isinstance(rank, int) or not 0 < rank < place.nodes:
                connection.close()
                continue
            if former := connections.pop(rank, None):
                former.close()
            connection.patient()
            connections[rank] = connection


def _join(place: Place, identity: str, connections: dict[int, _Connection]) -> Message:
    log.info("waiting for %s at %s:%d", place.of_pod(0), place.host, place.port)
    while True:
        try:
            connection = _Connection(socket.create_connection((place.host, place.port), timeout=10), timeout=None)
        except OSError:  # not there yet: no name, no address, nobody listening
            time.sleep(_RETRY)
            continue
        connection.send({"identity": identity, "rank": place.rank})
        if (said := connection.receive()) is not None:
            connections[0] = connection
            return said
        connection.close()
        time.sleep(_RETRY)


class _Connection:
    """One JSON object a line."""

    def __init__(self, connected: socket.socket, timeout: float | None) -> None:
        self._socket = connected
        self._socket.settimeout(timeout)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if option := getattr(socket, name, None):
                self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
        self._lines = self._socket.makefile("rb")

    def patient(self) -> None:
        """Wait as long as it takes from now on."""
        self._socket.settimeout(None)

    def send(self, message: Message) -> None:
        """Best effort: who has left hears nothing."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message | None:
        """The next message; None when there will be none."""
        try:
            message = json.loads(self._lines.readline(1 << 20))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
