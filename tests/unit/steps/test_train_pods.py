"""Two training pods as two processes on this machine: they wait for each other, stop together, fall together, and a run
that lost one of them ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune.api.contract import ExitCode
from tests.unit.steps.flow import Workshop
from tests.unit.steps.processes import (
    EVERY,
    TWO,
    finish,
    finished,
    newest,
    ready,
    spoil,
    start,
    until,
    until_gone,
    weights,
)

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = {"maxSteps": 14, "evaluateEverySteps": None}


@dataclass
class Pods:
    """The pods of one attempt; each has a report file of its own, as a container has its termination log."""

    workshop: Workshop
    processes: list[subprocess.Popen[str]]

    def finish(self) -> list[int]:
        """Their exit codes; pytest shows what they said when that is not as expected."""
        ended = [finish(process) for process in self.processes]
        for rank, (_, output) in enumerate(ended):
            print(f"---- pod {rank}\n{output}")
        return [code for code, _ in ended]

    def report(self, rank: int) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(report_file(self.workshop, rank).read_text())
        return document


def report_file(workshop: Workshop, rank: int) -> Path:
    return workshop.folder / f"report-{rank}.json"


def started(workshop: Workshop, ranks: tuple[int, ...] = (0, 1), port: int | None = None) -> Pods:
    where = f"127.0.0.1:{port or free_port()}"
    pods = []
    for rank in ranks:
        report_file(workshop, rank).unlink(missing_ok=True)
        environment = {
            "FINETUNE_NODES": "2",
            "FINETUNE_RENDEZVOUS": where,
            "JOB_COMPLETION_INDEX": str(rank),
            "FINETUNE_REPORT": str(report_file(workshop, rank)),
        }
        pods.append(start(workshop, **environment))
    return Pods(workshop, pods)


def free_port() -> int:
    """A port that is free, and the next one too; not among those that connections of other tests get by chance."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = ready(tmp_path_factory.mktemp("pods") / "undisturbed", **SHORT)
    pods = started(workshop)
    assert pods.finish() == [0, 0]
    assert pods.report(0)["result"]["steps"] == SHORT["maxSteps"]
    assert "result" not in pods.report(1)
    return workshop


def test_two_pods_learn_what_two_devices_of_one_pod_learn(undisturbed: Workshop, tmp_path: Path) -> None:
    workshop = ready(tmp_path / "one", **SHORT)
    finished(workshop, **TWO)
    assert weights(workshop) == weights(undisturbed)


def test_one_pod_asked_to_stop_stops_both_after_one_checkpoint_and_they_go_on_to_equal_weights(
    undisturbed: Workshop, tmp_path: Path
) -> None:
    workshop = ready(tmp_path / "stopped", **SHORT)
    pods = started(workshop)
    until(lambda: newest(workshop) >= EVERY, pods.processes[0])
    pods.processes[1].send_signal(signal.SIGTERM)
    assert pods.finish() == [ExitCode.PREEMPTED] * 2
    first, second = pods.report(0), pods.report(1)
    assert first["error"]["reason"] == second["error"]["reason"] == "Preempted"
    assert first["result"]["checkpoint"] == second["result"]["checkpoint"]
    pods = started(workshop)
    assert pods.finish() == [0, 0]
    assert pods.report(0)["resumedFromStep"] == first["result"]["checkpoint"]["step"]
    assert pods.report(0)["result"]["exact"] is True
    assert weights(workshop) == weights(undisturbed)


def test_a_pod_that_vanishes_without_a_word_does_not_hang_the_other(undisturbed: Workshop, tmp_path: Path) -> None:
    workshop = ready(tmp_path / "lost", **SHORT)
    pods = started(workshop)
    until(lambda: newest(workshop) >= EVERY, pods.processes[0])
    pods.processes[1].kill()
    begin = time.monotonic()
    code, output = finish(pods.processes[0])
    assert time.monotonic() - begin < 60
    assert code == ExitCode.UNAVAILABLE, output
    assert pods.report(0)["error"]["reason"] == "PeerLost"
    assert "pod 1 of 2" in pods.report(0)["error"]["message"]
    pods.processes[1].wait()
    until_gone(workshop)
    assert started(workshop).finish() == [0, 0]
    assert weights(workshop) == weights(undisturbed)


def test_both_pods_tell_what_one_of_them_found_wrong(tmp_path: Path) -> None:
    workshop = ready(tmp_path / "wild", dtype="float32", **SHORT)
    spoil(workshop)
    pods = started(workshop)
    assert pods.finish() == [ExitCode.BAD_DATA] * 2
    assert {pods.report(rank)["error"]["reason"] for rank in (0, 1)} == {"LossNotFinite"}


def test_pods_that_see_different_workspaces_say_so(tmp_path: Path) -> None:
    one, other = ready(tmp_path / "one", **SHORT), ready(tmp_path / "other", **SHORT)
    rows = other.layout.dataset / "finetune-manifest.json"
    manifest = json.loads(rows.read_text())
    rows.write_text(json.dumps(manifest | {"result": manifest["result"] | {"digest": "another"}}))
    port = free_port()
    pods = started(one, (0,), port), started(other, (1,), port)
    assert [finish(each.processes[0])[0] for each in pods] == [ExitCode.BAD_CONFIGURATION] * 2
    assert pods[0].report(0)["error"]["reason"] == pods[1].report(1)["error"]["reason"] == "WorkspaceNotShared"


def test_a_pod_that_waits_for_another_goes_at_once_when_asked(tmp_path: Path) -> None:
    for rank in (0, 1):
        workshop = ready(tmp_path / str(rank), **SHORT)
        pods = started(workshop, (rank,))
        process = pods.processes[0]
        assert process.stdout is not None
        while "waiting for pod" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        assert pods.finish() == [ExitCode.PREEMPTED]
        assert time.monotonic() - begin < 10


def test_on_another_number_of_pods_the_run_goes_on_and_says_that_it_is_not_exact(tmp_path: Path) -> None:
    workshop = ready(tmp_path / "changed", **SHORT)
    pods = started(workshop)
    until(lambda: newest(workshop) >= EVERY, pods.processes[0])
    pods.processes[0].send_signal(signal.SIGTERM)
    assert pods.finish() == [ExitCode.PREEMPTED] * 2
    code, output = finish(start(workshop))
    assert code == 0, output
    report = json.loads(workshop.layout.report_file.read_text())
    assert report["resumedFromStep"] >= EVERY
    assert (report["result"]["steps"], report["result"]["exact"]) == (SHORT["maxSteps"], False)
    record = json.loads((workshop.layout.trained / "training.json").read_text())
    assert "worldSize 2 -> 1" in record["changes"]
