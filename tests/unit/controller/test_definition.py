"""The operator and the definition are of different ages: what one does not know of the other is kept, or left out."""

from __future__ import annotations

import copy

import pytest

from finetune.api import GROUP, KIND, VERSION
from finetune.api.crd import crd
from finetune.controller.cluster.apply import Applier
from finetune.controller.cluster.client import ApiError
from finetune.controller.cluster.definition import Definition, event
from finetune.controller.cluster.queue import WorkQueue
from finetune.controller.cluster.reconciler import Reconciler
from finetune.controller.cluster.store import Store
from tests.builders import FineTuneJob
from tests.simulation.replica import SETTINGS, Writes
from tests.simulation.server import Server

OURS = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


class OpenApi:
    """Serves a definition, or an error."""

    def __init__(self, schema=None, trouble=None) -> None:
        self.schema, self.trouble = schema, trouble

    async def get(self, path):
        assert path == f"/openapi/v3/apis/{GROUP}/{VERSION}"
        if self.trouble:
            raise self.trouble
        kind = {"group": GROUP, "version": VERSION, "kind": KIND}
        of_list = {"x-kubernetes-group-version-kind": [kind | {"kind": f"{KIND}List"}]}
        of_job = {**self.schema, "x-kubernetes-group-version-kind": [kind]}
        return {"components": {"schemas": {"List": of_list, "Job": of_job}}}


def older(*paths: str, words: tuple[str, ...] = ()) -> dict:
    """The definition before it had those fields of the status, and those words for its phase."""
    schema = copy.deepcopy(OURS)
    for path in paths:
        *parents, name = path.split(".")
        found = schema["properties"]["status"]
        for parent in parents:
            found = found["properties"][parent]
            found = found.get("items", found)
        del found["properties"][name]
    phases = schema["properties"]["status"]["properties"]["phase"]["enum"]
    schema["properties"]["status"]["properties"]["phase"]["enum"] = [word for word in phases if word not in words]
    return schema


OLDER = older("specDigest", "attempts.preemptions", "attempts.history.node", words=("Pending", "Saving"))


async def test_a_definition_of_the_same_age_knows_everything():
    definition = Definition(OpenApi(OURS))
    assert not await definition.read()
    assert definition.warning == ""
    status = {"phase": "Saving", "conditions": [], "attempts": {"history": [{"node": "n"}]}}
    assert definition.storable(status) == status


async def test_what_an_older_definition_does_not_know_is_named_with_its_remedy():
    api = OpenApi(OLDER)
    definition = Definition(api)
    assert await definition.read()
    assert definition.unknown == (
        "status.phase=Pending", "status.phase=Saving", "status.specDigest", "status.attempts.preemptions",
        "status.attempts.history[].node",
    )  # fmt: skip
    assert "status.specDigest" in definition.warning
    assert "apply manifests/crd.yaml" in definition.warning
    assert not await definition.read()
    api.schema = OURS
    assert await definition.read()
    assert definition.warning == ""


async def test_fields_of_the_spec_that_users_cannot_set_are_named_too():
    schema = older()
    del schema["properties"]["spec"]["properties"]["cache"]
    definition = Definition(OpenApi(schema))
    await definition.read()
    assert definition.unknown == ("spec.cache",)


async def test_unknown_fields_words_and_what_is_incomplete_without_them_are_left_out():
    schema = older("attempts.count")
    conditions = schema["properties"]["status"]["properties"]["conditions"]["items"]["properties"]["type"]
    conditions["enum"].remove("Saved")
    definition = Definition(OpenApi(schema))
    await definition.read()
    status = {
        "phase": "Pending",
        "attempts": {"count": 1},
        "conditions": [{"type": kind, "status": "True"} for kind in ("Trained", "Saved")],
    }
    assert definition.storable(status) == {"phase": "Pending", "conditions": [{"type": "Trained", "status": "True"}]}


@pytest.mark.parametrize("trouble", [ApiError(403, "Forbidden", "no"), ApiError(404, "NotFound", "no")])
async def test_where_it_cannot_be_read_all_counts_as_known(trouble):
    definition = Definition(OpenApi(trouble=trouble))
    assert not await definition.read()
    assert (definition.warning, definition.storable({"x": 1})) == ("", {"x": 1})


def test_the_same_warning_is_one_event_whichever_replica_tells_it():
    names = {event("older", "finetune-system", "lease", replica)["metadata"]["name"] for replica in ("a", "b")}
    assert len(names) == 1


async def test_under_an_older_definition_jobs_complete_without_a_write_too_many():
    async def writes(schema) -> tuple[int, dict]:
        server = Server()
        server.definition = schema["properties"]["status"]
        server.submit(FineTuneJob())
        counted = Writes(server)
        store, definition = Store(), Definition(OpenApi(schema))
        await definition.read()
        applier = Applier(counted, store, storable=definition.storable)
        reconciler = Reconciler(store, WorkQueue(), applier, lambda: SETTINGS, now=lambda: server.now)
        for _ in range(60):
            server.tick()
            for item in server.objects.values():
                store.feed(item)
            await reconciler.visit(("team", "tune"))
            await reconciler.visit(("team", "tune"))
        await applier.drain()
        return counted.count, server.objects[KIND, "tune"]["status"]

    expected, _ = await writes(OURS)
    count, status = await writes(OLDER)
    assert status["phase"] == "Complete"
    assert "specDigest" not in status
    assert count <= expected + 1  # without a phase to show, an earlier one is shown for a moment


async def test_a_newer_operators_status_is_gone_on_with_and_kept():
    """The newer one led until the middle of the job."""
    server = Server()
    server.definition = {}
    server.submit(FineTuneJob())
    store = Store()
    applier = Applier(Writes(server), store)
    reconciler = Reconciler(store, WorkQueue(), applier, lambda: SETTINGS, now=lambda: server.now)
    for second in range(60):
        server.tick()
        job = server.objects[KIND, "tune"]
        if second == 10:
            assert job["status"]["attempts"]["history"]
            began = job["status"]["startTime"]
            job["status"] |= {"newer": {"goodput": 0.5}, "phase": "Queued"}
            job["status"]["attempts"]["lost"] = 3
            job["status"]["attempts"]["history"][0] |= {"outcome": "Checked", "steps": 7}
            server._changed(job)
        for item in server.objects.values():
            store.feed(item)
        await reconciler.visit(("team", "tune"))
    await applier.drain()
    status = job["status"]
    assert (status["phase"], status["startTime"]) == ("Complete", began)
    assert (status["newer"], status["attempts"]["lost"]) == ({"goodput": 0.5}, 3)
    first = status["attempts"]["history"][0]
    assert (first["stage"], first["number"], first["outcome"], first["steps"]) == ("prepare", 1, "Checked", 7)
    assert len(server.succeeded) == 3
