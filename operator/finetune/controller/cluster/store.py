"""What we last saw of every FineTuneJob and its children: fed by the watches and by the answers to our own writes.

Objects are kept slim, and as JSON text: a seventh of the memory of Python objects, parsed in microseconds when a job
is looked at. The newer resourceVersion wins, so that a watch that lags behind our own writes does not take them back.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from finetune.api import KIND
from finetune.api.contract import JOB_LABEL
from finetune.controller.decision.observed import Object, Observed, Warned, finished, job_of_pod, parent_of, terminal

Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""

_METADATA = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "labels",
    "ownerReferences",
)
_PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Job": (("suspend",), ("conditions", "startTime", "active", "ready", "terminating")),
    "Pod": (
        ("nodeName",),
        ("phase", "reason", "message", "conditions", "initContainerStatuses", "containerStatuses"),
    ),
    "PersistentVolumeClaim": ((), ("phase",)),
}
_CONTAINER = ("name", "state")
_REMEMBERED = 4096
_DEPARTED = 256
"""Children that ended and vanished before anybody looked; those whose job was visited since are of no use any more."""


class _Seen(NamedTuple):
    uid: str
    version: int
    job: Key
    text: bytes

    def item(self) -> Object:
        return dict(orjson.loads(self.text))


class Store:
    """The objects by kind, namespace and name, and the children of each job."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str, str], _Seen] = {}
        self._children: defaultdict[Key, set[tuple[str, str, str]]] = defaultdict(set)
        self._gone: OrderedDict[str, int | None] = OrderedDict()
        """UIDs that left, with the version that each left at; None for what was deleted for certain."""

        self._warnings: OrderedDict[str, Warned] = OrderedDict()
        self._departed: OrderedDict[str, _Seen] = OrderedDict()
        self._claims: defaultdict[Key, dict[Key, tuple[bool, str, str] | None]] = defaultdict(dict)

    def feed(self, item: Object) -> Key | None:
        """Take in an object as some answer or event showed it; the job it concerns, None when it was no news.

        Kinds that no decision looks at are not kept."""
        if item["kind"] != KIND and item["kind"] not in _PARTS:
            return None
        metadata = item["metadata"]
        key = (str(item["kind"]), str(metadata["namespace"]), str(metadata["name"]))
        known = self._objects.get(key)
        version = int(metadata["resourceVersion"])
        if self._left(str(metadata["uid"]), version) or (known is not None and known.version >= version):
            return None
        self._gone.pop(str(metadata["uid"]), None)
        job = job_of(item)
        # orjson leaves its whole buffer (8 KiB) behind a short text: only a copy is as short as the text.
        text = bytes(memoryview(orjson.dumps(slim(item), default=dict)))
        if known is not None and known.job != job:
            self._forget_child(known.job, key)  # somebody relabelled it
        self._objects[key] = _Seen(str(metadata["uid"]), version, job, text)
        if key[0] != KIND:
            self._children[job].add(key)
        elif claim := _claim_of(item):
            self._claims[key[1], claim][job] = _turn(item)
        return job

    def remove(
        self,
        kind: str,
        namespace: str,
        name: str,
        uid: str,
        version: int | None = None,
        *,
        last: Object | None = None,
    ) -> Key | None:
        """Take in that an object left our view at that resourceVersion, `last` as it was then; the job it concerned.

        A watch tells the loss of a label and a deletion alike, and who gets the label back comes back, newer. With
        neither it is deleted: nothing that is still said of it counts."""
        self._gone[uid] = int(last["metadata"]["resourceVersion"]) if last else version
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        self._warnings.pop(uid, None)
        key = (kind, namespace, name)
        known = self._objects.get(key)
        if known is None or known.uid != uid:
            return None
        del self._objects[key]
        self._keep_what_ended(known, {**last, "kind": kind} if last else known.item())
        self._forget_child(known.job, key)
        return known.job

    def _forget_child(self, job: Key, key: tuple[str, str, str]) -> None:
        if (children := self._children.get(job)) is not None:
            children.discard(key)
            if not children:
                del self._children[job]

    def warn(self, warned: Warned, namespace: str) -> Key | None:
        """Take in a warning Event; the job it concerns, None while the object is not known (yet)."""
        if self._warnings.get(warned.uid) == warned:
            return None
        self._warnings[warned.uid] = warned
        self._warnings.move_to_end(warned.uid)
        if len(self._warnings) > _REMEMBERED:
            self._warnings.popitem(last=False)
        known = self._objects.get((warned.kind, namespace, warned.name))
        return known.job if known is not None else None

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        known = self._objects.get((kind, namespace, name))
        return known.item() if known is not None else None

    def observe(self, key: Key) -> Observed | None:
        """Everything that a decision about the job looks at; None when there is no such job."""
        job = self._objects.get((KIND, *key))
        if job is None:
            return None
        children: dict[str, list[Object]] = {"Job": [], "Pod": [], "PersistentVolumeClaim": []}
        for child in sorted(self._children.get(key, ())):
            children[child[0]].append(self._objects[child].item())
        uids = [item["metadata"]["uid"] for items in children.values() for item in items]
        item = job.item()
        return Observed(
            job=item,
            jobs=tuple(children["Job"]),
            pods=tuple(children["Pod"]),
            claims=tuple(children["PersistentVolumeClaim"]),
            departed=tuple(seen.item() for seen in self._departed.values() if seen.job == key),
            claim_held_by=self._holder(key, item),
            warnings=tuple(self._warnings[uid] for uid in uids if uid in self._warnings),
        )

    def _left(self, uid: str, version: int) -> bool:
        """Whether an object left after that version of it."""
        at = self._gone.get(uid, -1)
        return at is None or at >= version

    def _keep_what_ended(self, known: _Seen, last: Object) -> None:
        """Remember how a child ended that vanished at once: one with a ttl may do so before its job is visited."""
        ended = finished(last) if last["kind"] == "Job" else last["kind"] == "Pod" and terminal(last)
        if ended and (KIND, *known.job) in self._objects:
            text = bytes(memoryview(orjson.dumps(slim(last), default=dict)))
            self._departed[known.uid] = _Seen(known.uid, known.version, known.job, text)
            if len(self._departed) > _DEPARTED:
                self._departed.popitem(last=False)

    def _holder(self, key: Key, item: Object) -> str:
        """The job that works in the claim which this one brings, if another one does: whichever began first, or was
        made first, and whoever still has a pod that runs."""
        if not (claim := _claim_of(item)):
            return ""
        users, mine = self._claims[key[0], claim], _turn(item)
        for other, turn in list(users.items()):
            known = self._objects.get((KIND, *other))
            if other == key:
                continue
            if self._runs(other) or (known and turn and (mine is None or turn < mine)):
                if known is None or _claim_of(known.item()) == claim:
                    return other[1]
                del users[other]  # it names another one meanwhile
            elif known is None:
                del users[other]
        return ""

    def _runs(self, key: Key) -> bool:
        """Whether something of that job is left that may still write: it may be finished, or gone itself."""
        children = [self._objects[child].item() for child in self._children.get(key, ())]
        pods = (pod for pod in children if job_of_pod(pod) and not terminal(pod))
        jobs = (job for job in children if parent_of(job) and not finished(job))
        return any(pods) or any(jobs)

    def jobs(self) -> Iterator[Object]:
        """All FineTuneJobs."""
        return (seen.item() for (kind, _, _), seen in list(self._objects.items()) if kind == KIND)

    def job_keys(self) -> list[Key]:
        """The keys of all FineTuneJobs."""
        return [seen.job for (kind, _, _), seen in self._objects.items() if kind == KIND]

    def lacks(self, kind: str, namespace: str, name: str, uid: str, version: int) -> bool:
        """Whether nothing as new as that version of the object was seen: neither itself nor its departure."""
        known = self._objects.get((kind, namespace, name))
        return not self._left(uid, version) and (known is None or known.version < version)

    def versions(self, kind: str) -> dict[tuple[str, str], tuple[str, int]]:
        """UID and resourceVersion of all objects of a kind, by namespace and name."""
        return {
            (namespace, name): (seen.uid, seen.version)
            for (which, namespace, name), seen in self._objects.items()
            if which == kind
        }


def job_of(item: Object) -> Key:
    """The FineTuneJob that an object is, or is labelled with."""
    metadata = item["metadata"]
    name = metadata["name"] if item["kind"] == KIND else (metadata.get("labels") or {}).get(JOB_LABEL, "")
    return str(metadata["namespace"]), str(name)


def _claim_of(job: Object) -> str:
    """The claim that a FineTuneJob brings; empty when it gets one of its own."""
    return str(((job.get("spec") or {}).get("workspace") or {}).get("claimName") or "")


def _turn(item: Object) -> tuple[bool, str, str] | None:
    """The place of a FineTuneJob among those that bring the same claim, the first the lowest; None when it is not
    going to work in it: it has finished, or has not begun and is suspended."""
    status, metadata = item.get("status") or {}, item["metadata"]
    begun = "startTime" in status
    if "completionTime" in status or (not begun and (item.get("spec") or {}).get("suspend")):
        return None
    return not begun, str(status.get("startTime") or metadata["creationTimestamp"]), str(metadata["name"])


def _writer_of_suspend(metadata: Mapping[str, Any]) -> str:
    """Who wrote spec.suspend last, as the server calls them; empty when it does not say."""
    fields = [
        entry
        for entry in metadata.get("managedFields") or ()
        if "f:suspend" in ((entry.get("fieldsV1") or {}).get("f:spec") or {})
    ]
    newest = max(fields, key=lambda entry: str(entry.get("time", "")), default=None)
    return str(newest.get("manager", "")) if newest else ""


def slim(item: Object) -> Object:
    """The parts that decisions look at."""
    metadata = {key: item["metadata"][key] for key in _METADATA if key in item["metadata"]}
    kind = item["kind"]
    kept: dict[str, Any] = {"kind": kind, "metadata": metadata}
    if kind == "Job" and (item.get("spec") or {}).get("suspend"):
        kept["suspendedBy"] = _writer_of_suspend(item["metadata"])
    if kind == KIND:
        kept |= {"spec": item.get("spec") or {}, "status": item.get("status") or {}}
    else:
        spec, status = item.get("spec") or {}, item.get("status") or {}
        of_spec, of_status = _PARTS[kind]
        kept["spec"] = {key: spec[key] for key in of_spec if key in spec}
        kept["status"] = {key: status[key] for key in of_status if key in status}
        for key in ("initContainerStatuses", "containerStatuses"):
            if key in kept["status"]:
                kept["status"][key] = [
                    {part: container[part] for part in _CONTAINER if part in container}
                    for container in kept["status"][key]
                ]
    return kept
