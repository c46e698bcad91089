"""Whatever the operator dies of: the work of a job that failed survives its deletion, and a retry finishes it."""

from __future__ import annotations

import pytest

from finetune.api import KIND
from finetune.api.contract import KEPT_LABEL, Step
from tests.builders import FineTuneJob
from tests.simulation.replica import Operator, Writes, finished, outcome, run
from tests.simulation.server import Server


def fails_once_saving() -> Server:
    ends = iter(["user-error"])
    server = Server(lambda pod, step: next(ends, "ok") if step == Step.SAVE else "ok")
    server.submit(FineTuneJob())
    return server


def claim(server: Server) -> dict:
    return server.objects["PersistentVolumeClaim", "tune-work"]


async def count_of_writes() -> int:
    server = fails_once_saving()
    writes = Writes(server)
    await run(server, writes)
    return writes.count


@pytest.mark.parametrize("after", [False, True])
async def test_a_failed_job_that_is_deleted_as_soon_as_it_says_so_leaves_its_checkpoints(after):
    for crash in range(1, await count_of_writes() + 1):
        server = fails_once_saving()
        await run(server, Writes(server, crash, after=after))
        server.remove("tune")
        for _ in range(20):
            server.tick()
        assert set(server.objects) == {("PersistentVolumeClaim", "tune-work")}, f"died at write {crash}"
        assert claim(server)["metadata"]["labels"][KEPT_LABEL] == "true"


@pytest.mark.parametrize("after", [False, True])
async def test_a_retry_saves_what_was_trained_and_the_claim_goes_with_the_job_again(after):
    for crash in (None, *range(1, 12)):
        server = fails_once_saving()
        await run(server)
        trained = [stage for _, stage, _ in server.started].count("train")
        server.edit("tune", retry={"limit": 3, "at": "now"})
        await run(server, Writes(server, crash, after=after), until=_complete)
        assert [stage for _, stage, _ in server.started].count("train") == trained
        assert outcome(server)["history"][-2:] == [("save", 1, "UserError"), ("save", 2, "Succeeded")]
        operator = Operator(server)
        await operator.visit()
        assert claim(server)["metadata"]["ownerReferences"][0]["uid"] == "job-1"
        assert KEPT_LABEL not in claim(server)["metadata"]["labels"]


async def test_a_spec_that_is_mended_while_suspended_goes_on_in_another_attempt():
    server = Server()
    server.submit(FineTuneJob())
    await run(server, until=lambda server: any(stage == "train" for _, stage, _ in server.started))
    server.edit("tune", suspend=True)
    await run(server, until=lambda server: server.objects[KIND, "tune"]["status"]["phase"] == "Suspended")
    training = server.objects[KIND, "tune"]["spec"]["training"]
    server.edit("tune", suspend=False, training={**training, "nodeSelector": {"gpu": "big"}})
    await run(server)
    end = outcome(server)
    assert end["phase"] == "Complete"
    assert [kind for stage, _, kind in end["history"] if stage == "train"] == ["Stopped", "Succeeded"]
    assert (end["attempts"]["failures"], end["attempts"]["preemptions"]) == (0, 0)


def _complete(server: Server) -> bool:
    return finished(server) and server.objects[KIND, "tune"]["status"]["phase"] == "Complete"
