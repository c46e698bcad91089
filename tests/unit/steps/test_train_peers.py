"""The pods of one attempt as threads of this process: who waits for whom, and what each hears at the end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from finetune.api.contract import ExitCode
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.distributed import peers
from finetune.steps.train.distributed.outcome import Outcome
from finetune.steps.train.distributed.peers import Peers, Place, met

AGREED = {"checkpoint": 6, "dataset": "x"}
OK = Outcome(ExitCode.OK)
STOPPED = Outcome.of(StepFailure(ExitCode.PREEMPTED, "Preempted", "after step 3", result={"checkpoint": {"step": 3}}))
BROKEN = Outcome.of(StepFailure(ExitCode.BAD_DATA, "LossNotFinite", "step 3: nan", "Lower it."))
FELL = Outcome.of(StepFailure(ExitCode.UNAVAILABLE, "Crashed", "connection closed by peer"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "GRACE", 0.2)
    monkeypatch.setattr(peers, "LAST_WORD", 2.0)
    monkeypatch.setattr(peers, "_RETRY", 0.02)


def places(nodes: int) -> list[Place]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    return [Place(rank, nodes, "127.0.0.1", port) for rank in range(nodes)]


def together(nodes: int, *works: Callable[[Peers, dict[str, Any]], Any]) -> list[Any]:
    """Each pod meets the others and does its work; what came of each. The last pods come first."""

    def pod(place: Place, work: Callable[[Peers, dict[str, Any]], Any]) -> Any:
        with met(place, "job/1", AGREED if place.rank == 0 else {}) as (others, agreed):
            return work(others, agreed)

    with ThreadPoolExecutor(nodes) as pool:
        pods = zip(places(nodes), works, strict=True)
        futures: list[Future[Any]] = [pool.submit(pod, place, work) for place, work in reversed(list(pods))]
        return [future.result(timeout=30) for future in reversed(futures)]


def says(own: Outcome) -> Callable[[Peers, dict[str, Any]], Outcome]:
    """A pod whose own part ended so, and what it then tells."""

    def work(others: Peers, _: dict[str, Any]) -> Outcome:
        others.watch(lambda: None)
        told = others.why(own)
        others.farewell(told)
        return told

    return work


def vanishes(others: Peers, _: dict[str, Any]) -> None:
    """Its connection closes without a word."""


def test_a_pod_by_itself_waits_for_nobody() -> None:
    with met(Place.of({}), "job/1", AGREED) as (others, agreed):
        assert agreed == AGREED
        assert others.why(FELL) is FELL


def test_a_place_is_what_operator_and_kubernetes_say() -> None:
    environment = {
        "FINETUNE_NODES": "3",
        "FINETUNE_RENDEZVOUS": "tune-train-1-0.tune-train:29400",
        "JOB_COMPLETION_INDEX": "2",
    }
    assert Place.of(environment) == Place(2, 3, "tune-train-1-0.tune-train", 29400)
    assert Place.of({"JOB_COMPLETION_INDEX": "0"}) == Place()


def test_all_hear_what_the_first_says() -> None:
    assert together(3, *[lambda others, agreed: agreed] * 3) == [AGREED] * 3


def test_nobody_starts_before_all_are_there() -> None:
    first, second = places(2)
    begun = threading.Event()

    def begin() -> None:
        with met(first, "job/1", AGREED):
            begun.set()

    thread = threading.Thread(target=begin)
    thread.start()
    assert not begun.wait(0.3)
    with met(second, "job/1", {}):
        assert begun.wait(5)
    thread.join()


def test_strangers_are_not_let_in() -> None:
    first, second = places(2)
    with ThreadPoolExecutor(1) as pool:

        def begin() -> Any:
            with met(first, "job/2", AGREED) as (_, agreed):
                return agreed

        future = pool.submit(begin)
        for text in (
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"identity": "job/1", "rank": 1}\n',
            b'{"identity": "job/2", "rank": 7}\n',
        ):
            while True:
                try:
                    stranger = socket.create_connection((first.host, first.port), timeout=5)
                    break
                except OSError:
                    continue
            with stranger:
                stranger.sendall(text)
                assert stranger.recv(100) == b""
        with met(second, "job/2", {}) as (_, agreed):
            assert agreed == AGREED
        assert future.result(timeout=5) == AGREED


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_pods_that_fell_tell_the_end_of_the_one_they_fell_with(culprit: int) -> None:
    works = [says(BROKEN if rank == culprit else FELL) for rank in range(3)]
    ends = together(3, *works)
    assert {end.code for end in ends} == {ExitCode.BAD_DATA}
    assert {end.error.reason for end in ends} == {"LossNotFinite"}
    assert all(end.error.message.endswith("step 3: nan") for end in ends)
    assert f"pod {culprit} of 3" in ends[(culprit + 1) % 3].error.message


def test_a_pod_that_fell_with_one_that_was_stopped_is_stopped_too_and_names_the_checkpoint() -> None:
    _, fallen = together(2, says(STOPPED), says(FELL))
    assert (fallen.code, fallen.result) == (ExitCode.PREEMPTED, {"checkpoint": {"step": 3}})


def test_a_pod_that_vanished_is_named() -> None:
    end, _ = together(2, says(FELL), vanishes)
    assert (end.code, end.error.reason) == (ExitCode.UNAVAILABLE, "PeerLost")
    assert end.error.message.startswith("pod 1 of 2 is gone without a word")


def test_a_pod_that_knows_what_is_wrong_believes_nobody_else() -> None:
    assert together(2, says(BROKEN), says(STOPPED))[0] is BROKEN


def test_a_pod_that_is_done_alarms_nobody() -> None:
    abandoned = threading.Event()

    def works_on(others: Peers, _: dict[str, Any]) -> bool:
        others.watch(abandoned.set)
        return abandoned.wait(0.6)

    assert together(2, works_on, says(OK))[0] is False


def test_processes_that_wait_for_a_lost_pod_for_ever_are_ended() -> None:
    abandoned = threading.Event()

    def hangs(others: Peers, _: dict[str, Any]) -> bool:
        others.watch(abandoned.set)
        return abandoned.wait(5)

    assert together(2, hangs, vanishes)[0] is True


def test_what_goes_wrong_between_meeting_and_training_is_told_to_the_others() -> None:
    def refuses(others: Peers, _: dict[str, Any]) -> None:
        raise StepFailure(ExitCode.BAD_CONFIGURATION, "WorkspaceNotShared", "other files")

    first, second = places(2)
    with ThreadPoolExecutor(1) as pool:

        def begin() -> Outcome:
            with met(first, "job/1", AGREED) as (others, _):
                return says(FELL)(others, {})

        future = pool.submit(begin)
        with pytest.raises(StepFailure), met(second, "job/1", {}) as (others, agreed):
            refuses(others, agreed)
        end = future.result(timeout=10)
    assert (end.code, end.error and end.error.reason) == (ExitCode.BAD_CONFIGURATION, "WorkspaceNotShared")
