"""`make bench-controller`: how fast the operator takes jobs up, what it costs, and how fresh a status is.

1,000 FineTuneJobs whose pods cannot be scheduled, beside 1,000 plain Jobs of the same client in the same run; then 100
running jobs whose pods change as a kubelet would change them. Prints a table and writes build/bench/controller.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from finetune.api import API_VERSION, KIND
from finetune.api.contract import CONTAINERS, OPERATOR_LABEL, Step
from finetune.controller.cluster.access import Access
from finetune.controller.cluster.client import Api
from finetune.controller.cluster.resources import CLAIMS, FINETUNEJOBS, JOBS, PODS, Resource
from tests.bench.table import Row, write
from tests.cluster import Cluster
from tests.integration.controller.process import OperatorProcess, fresh_namespace, install_crd

ROOT = Path(__file__).parents[2]
CLIENTS = 32
NOWHERE = {"finetune.dev/bench": "no-such-node"}
STEPS = (Step.DOWNLOAD, Step.ADD_TOKENS, Step.RELOAD, Step.LOAD_DATASET)
SECONDS_BETWEEN_CHANGES = 8.0
"""Of one pod; 100 jobs then change a dozen times a second."""

NOT_WORSE = 0.95
"""Of two runs of one and the same build one is up to a twentieth slower."""

SECONDS_AFTER_DEFINITION = 5.0
"""The server answers 429 while it takes in a definition that changed, and builds before this one end at that."""

PHASES = ("Downloading", "AddingTokens", "Reloading", "LoadingDataset")


def finetune_job(name: str, operator: str) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "labels": {OPERATOR_LABEL: operator}},
        "spec": {
            "model": {"uri": "hf://models/tiny"},
            "tokens": {"add": [{"content": "<think>"}, {"content": "</think>"}]},
            "dataset": {"sources": [{"uri": "hf://datasets/some/rows"}]},
            "training": {"maxSteps": 10, "batchSize": 1},
            "prepare": {"nodeSelector": NOWHERE},
        },
    }


def plain_job(name: str) -> dict[str, Any]:
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": NOWHERE,
        "containers": [{"name": "main", "image": "none", "command": ["true"]}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }


class Watched:
    """Everything that a watch brought, with the time of its arrival."""

    def __init__(self, api: Api, resource: Resource, namespace: str) -> None:
        self.seen: list[tuple[float, str, dict[str, Any]]] = []
        self.added: dict[str, tuple[float, dict[str, Any]]] = {}
        self._task = asyncio.create_task(self._follow(api, resource.path(namespace)))
        self.listener: Callable[[float, dict[str, Any]], None] = lambda when, item: None

    async def _follow(self, api: Api, path: str) -> None:
        query = {"resourceVersion": (await api.get(path, {"limit": "1"}))["metadata"]["resourceVersion"]}
        while True:
            async for change in api.watch(path, query):
                now = time.perf_counter()
                item = change["object"]
                query["resourceVersion"] = item["metadata"]["resourceVersion"]
                if change["type"] != "BOOKMARK":
                    slim = {"metadata": {key: item["metadata"][key] for key in ("name", "resourceVersion")}}
                    slim["metadata"]["owner"] = (item["metadata"].get("ownerReferences") or [{}])[0].get("name")
                    slim["status"] = {"phase": (item.get("status") or {}).get("phase")}
                    self.seen.append((now, change["type"], slim))
                    if change["type"] == "ADDED":
                        self.added[slim["metadata"]["name"]] = (now, slim)
                    self.listener(now, slim)

    def stop(self) -> None:
        self._task.cancel()


async def crowd(work: Iterable[Callable[[], Awaitable[None]]], clients: int = CLIENTS) -> None:
    """Do all of it, so many at a time."""
    todo = iter(work)

    async def client() -> None:
        for each in todo:
            await each()

    await asyncio.gather(*(client() for _ in range(clients)))


async def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        await asyncio.sleep(0.05)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def plain(api: Api, namespace: str, count: int) -> dict[str, float]:
    """Plain Jobs: what this client and this server can do at best."""
    jobs = Watched(api, JOBS, namespace)
    await asyncio.sleep(0.5)
    began = time.perf_counter()

    def create(name: str) -> Callable[[], Awaitable[None]]:
        async def send() -> None:
            await api.create(JOBS.path(namespace), plain_job(name))

        return send

    await crowd(create(f"job-{number}") for number in range(count))
    await until(lambda: len(jobs.added) >= count, 120, "plain Jobs")
    seconds = max(when for when, _ in jobs.added.values()) - began
    jobs.stop()
    return {"seconds": seconds, "rate": count / seconds}


async def ceiling(api: Api, source: str, namespace: str, count: int) -> dict[str, float]:
    """The requests of client and operator for so many jobs, sent by this client alone: what the server can take.

    The bodies are those of a job that the operator took up in the namespace `source`. As there, the Job controller and
    the scheduler work on what appears.
    """
    model = (await api.get(FINETUNEJOBS.path(source), {"limit": "1"}))["items"][0]
    claim, job = [
        next(
            item
            for item in (await api.get(kind.path(source)))["items"]
            if item["metadata"]["ownerReferences"][0]["uid"] == model["metadata"]["uid"]
        )
        for kind in (CLAIMS, JOBS)
    ]
    template = {
        "metadata": {key: job["spec"]["template"]["metadata"][key] for key in ("annotations",)},
        "spec": job["spec"]["template"]["spec"],
    }
    spec = {key: value for key, value in job["spec"].items() if key not in ("selector", "template", "manualSelector")}
    jobs = Watched(api, JOBS, namespace)
    await asyncio.sleep(0.5)
    began = time.perf_counter()

    def requests(name: str) -> Callable[[], Awaitable[None]]:
        async def send() -> None:
            made = await api.create(FINETUNEJOBS.path(namespace), finetune_job(name, "nobody"))
            head = {key: made["metadata"][key] for key in ("name", "namespace", "resourceVersion")}
            body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": head, "status": model["status"]}
            await api.apply(FINETUNEJOBS.path(namespace, name, "status"), body, "bench")
            await api.create(CLAIMS.path(namespace), {"metadata": {"name": name}, "spec": claim["spec"]})
            owner = {"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": made["metadata"]["uid"]}
            metadata = {"name": name, "labels": job["metadata"]["labels"], "ownerReferences": [owner]}
            body = {"metadata": metadata, "spec": {**spec, "template": template}}
            await api.create(JOBS.path(namespace), body)

        return send

    await crowd(requests(f"bare-{number}") for number in range(count))
    await until(lambda: len(jobs.added) >= count, 240, "the Jobs of the bare client")
    jobs.stop()
    return {"rate": count / (max(when for when, _ in jobs.added.values()) - began)}


async def submit(api: Api, namespace: str, operator: OperatorProcess, prefix: str, count: int) -> dict[str, float]:
    """Create FineTuneJobs as fast as the server takes them; when each was there."""
    created: dict[str, float] = {}

    def create(name: str) -> Callable[[], Awaitable[None]]:
        async def send() -> None:
            await api.create(FINETUNEJOBS.path(namespace), finetune_job(name, operator.name))
            created[name] = time.perf_counter()

        return send

    await crowd(create(f"{prefix}-{number}") for number in range(count))
    return created


async def taken_up(api: Api, namespace: str, operator: OperatorProcess, count: int) -> dict[str, float]:
    """FineTuneJobs: from their creation to their first Job. Only Jobs are watched, as for the plain ones."""
    jobs = Watched(api, JOBS, namespace)
    await asyncio.sleep(0.5)
    began = time.perf_counter()
    created = await submit(api, namespace, operator, "ftj", count)
    sent = time.perf_counter() - began
    await until(lambda: len(jobs.added) >= count, 240, "first Jobs")
    jobs.stop()
    first = {item["metadata"]["owner"]: when for when, item in jobs.added.values()}
    delays = [first[name] - created[name] for name in created]
    seconds = max(first.values()) - began
    await asyncio.sleep(15)  # their pods come, and are found unschedulable: memory is largest then
    return {
        "seconds": seconds,
        "rate": count / seconds,
        "client": sent,
        "p50": statistics.median(delays),
        "p99": quantile(delays, 0.99),
        "memory": operator.peak_memory() / 2**20,
    }


async def writes(api: Api, namespace: str, operator: OperatorProcess, count: int) -> int:
    """The most writes for one job before its pod exists, by the order of resourceVersions."""
    watches = {resource: Watched(api, resource, namespace) for resource in (FINETUNEJOBS, JOBS, PODS, CLAIMS)}
    await asyncio.sleep(0.5)
    await submit(api, namespace, operator, "few", count)
    await until(lambda: len(watches[PODS].added) >= count, 120, "first pods")
    await asyncio.sleep(1)
    pods = {
        item["metadata"]["owner"].removesuffix("-prepare-1"): int(item["metadata"]["resourceVersion"])
        for _, item in watches[PODS].added.values()
    }
    found: Counter[str] = Counter()
    for resource in (FINETUNEJOBS, JOBS, CLAIMS):
        for _, change, item in watches[resource].seen:
            job = item["metadata"]["owner"] or item["metadata"]["name"]
            ours = change == "MODIFIED" if resource is FINETUNEJOBS else change == "ADDED"
            if ours and int(item["metadata"]["resourceVersion"]) < pods.get(job, 0):
                found[job] += 1
    for watch in watches.values():
        watch.stop()
    return max(found.values())


async def freshness(api: Api, namespace: str, operator: OperatorProcess, count: int) -> dict[str, float]:
    """From the change of a pod to the status that shows it."""
    jobs, pods = Watched(api, FINETUNEJOBS, namespace), Watched(api, PODS, namespace)
    await asyncio.sleep(0.5)
    for number in range(count):
        await api.create(FINETUNEJOBS.path(namespace), finetune_job(f"live-{number}", operator.name))
    await until(lambda: len(pods.added) >= count, 60, "pods")
    await asyncio.sleep(3)
    loop = asyncio.get_running_loop()
    shown: defaultdict[tuple[str, str], asyncio.Future[float]] = defaultdict(loop.create_future)

    def listen(when: float, item: dict[str, Any]) -> None:
        future = shown[item["metadata"]["name"], str(item["status"]["phase"])]
        if not future.done():
            future.set_result(when)

    jobs.listener = listen
    delays: list[float] = []

    async def live(pod: str, job: str) -> None:
        await asyncio.sleep(random.random() * SECONDS_BETWEEN_CHANGES)
        for position, phase in enumerate(PHASES):
            statuses = [_container(step, index - position) for index, step in enumerate(STEPS)]
            status = {"initContainerStatuses": statuses[:3], "containerStatuses": statuses[3:], "phase": "Pending"}
            began = time.perf_counter()
            await api.merge(PODS.path(namespace, pod, "status"), {"status": status})
            delays.append(await asyncio.wait_for(shown[job, phase], 60) - began)
            await asyncio.sleep(SECONDS_BETWEEN_CHANGES * (0.5 + random.random()))

    await asyncio.gather(
        *(live(name, item["metadata"]["owner"].removesuffix("-prepare-1")) for name, (_, item) in pods.added.items())
    )
    jobs.stop()
    pods.stop()
    return {"p50": statistics.median(delays), "p99": quantile(delays, 0.99), "samples": len(delays)}


def _container(step: Step, distance: int) -> dict[str, Any]:
    report = json.dumps({"step": step.value, "result": {}})
    state: dict[str, Any] = {"waiting": {"reason": "PodInitializing"}}
    if distance == 0:
        state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    elif distance < 0:
        state = {"terminated": {"exitCode": 0, "message": report, "startedAt": None, "finishedAt": None}}
    image = {"image": "none", "imageID": "", "ready": distance < 0, "restartCount": 0}
    return {"name": CONTAINERS[step], "state": state, **image}


@dataclass(frozen=True)
class Build:
    """An operator's code: this checkout's, or a commit's in a worktree of its own."""

    name: str
    source: Path | None = None

    def install(self, cluster: Cluster) -> None:
        """Its own definition: an operator that is older than that cannot read what the server fills in."""
        install_crd(cluster, *([self.source.parent / "manifests" / "crd.yaml"] if self.source else []))
        time.sleep(SECONDS_AFTER_DEFINITION)


async def loaded(
    cluster: Cluster, api: Api, build: Build, count: int, log: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """What a build does with so many FineTuneJobs, and the rate of its requests without an operator."""
    build.install(cluster)
    with fresh_namespace(cluster, "bench-ftj", wait=True) as namespace:
        operator = OperatorProcess(cluster, namespace, namespace, log, build.source, FINETUNE_LEASE_SECONDS="15")
        operator.start()
        try:
            most = await writes(api, namespace, operator, max(10, count // 20))
            with fresh_namespace(cluster, "bench-bare", wait=True) as bare:
                limit = await ceiling(api, namespace, bare, count)
            return {**await taken_up(api, namespace, operator, count), "writes": most}, limit
        finally:
            operator.stop()


async def responsive(cluster: Cluster, api: Api, build: Build, live: int, log: Path) -> dict[str, float]:
    """How fresh a build keeps the status of so many running jobs."""
    build.install(cluster)
    with fresh_namespace(cluster, "bench-live", wait=True) as namespace:
        operator = OperatorProcess(cluster, namespace, namespace, log, build.source, FINETUNE_LEASE_SECONDS="15")
        operator.start()
        try:
            return await freshness(api, namespace, operator, live)
        finally:
            operator.stop()


async def measure(cluster: Cluster, count: int, live: int, builds: Sequence[Build], log: Path) -> list[Row]:
    os.environ["KUBECONFIG"] = str(cluster.kubeconfig)
    access = await Access.load()
    api = Api(access, connections=CLIENTS + 8, timeout=60)
    rows: list[Row] = []

    def row(case: str, metric: str, value: float, unit: str, goal: str = "", met: bool | None = None) -> None:
        rows.append(Row(case, metric, round(value, 3), unit, goal, met))

    try:
        case = f"{count} plain Jobs"
        with fresh_namespace(cluster, "bench-plain", wait=True) as namespace:
            peer = await plain(api, namespace, count)
            row(case, "until all exist", peer["seconds"], "s")
            row(case, "rate", peer["rate"], "jobs/s")
        results = {build.name: await loaded(cluster, api, build, count, log) for build in builds}
        for build in builds:
            found, limit = results[build.name]
            case, ours = f"{count} FineTuneJobs{build.name}", build.source is None
            row(case, "until all are created", found["client"], "s")
            row(case, "until all first Jobs exist", found["seconds"], "s")
            row(case, "rate", found["rate"], "jobs/s", *goal(">= 120", found["rate"] >= 120, ours))
            row(case, "rate of the same requests without an operator", limit["rate"], "jobs/s")
            row(case, "the operator's rate against that", found["rate"] / limit["rate"], "x")
            row(case, "creation to Job, p50", found["p50"], "s")
            row(case, "creation to Job, p99", found["p99"], "s")
            most, memory = found["writes"], found["memory"]
            row(case, "most writes before the pod", most, "writes/job", *goal("<= 3", most <= 3, ours))
            row(case, "peak memory of the operator", memory, "MiB", *goal("<= 120", memory <= 120, ours))
        fresh = {build.name: await responsive(cluster, api, build, live, log) for build in builds}
        for build in builds:
            case, p99 = f"{live} running jobs{build.name}", fresh[build.name]["p99"]
            row(case, "pod's change to status, p50", fresh[build.name]["p50"], "s")
            row(case, "pod's change to status, p99", p99, "s", *goal("< 1", p99 < 1, build.source is None))
        if len(builds) == 2:
            (now, bare), (former, former_bare) = (results[build.name] for build in reversed(builds))
            # Against the bare client's rate beside each: the server slows down as its store fills.
            rate = (now["rate"] / bare["rate"]) / (former["rate"] / former_bare["rate"])
            row("against the former build", "rate", rate, "x", f">= {NOT_WORSE}", rate >= NOT_WORSE)
            more = now["writes"] - former["writes"]
            row("against the former build", "writes before the pod", more, "more", "<= 0", more <= 0)
            memory = now["memory"] / former["memory"]
            row("against the former build", "peak memory", memory, "x", f"<= {2 - NOT_WORSE}", memory <= 2 - NOT_WORSE)
    finally:
        await access.close()
    return rows


def goal(words: str, met: bool, ours: bool) -> tuple[str, bool] | tuple[()]:
    """A goal is for this build; the former one is measured for comparison only."""
    return (words, met) if ours else ()


@contextlib.contextmanager
def former(commit: str | None) -> Iterator[list[Build]]:
    """The builds to measure, the former one first."""
    if commit is None:
        yield [Build("")]
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "former"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", place, commit], cwd=ROOT, check=True)
        try:
            yield [Build(f", {commit}", place / "operator"), Build("")]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--live", type=int, default=100)
    parser.add_argument(
        "--former", metavar="COMMIT", help="measure the operator of that commit as well, in the same run"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, former(arguments.former) as builds:
        log = Path(folder) / "operator.log"
        try:
            rows = asyncio.run(measure(Cluster.current(), arguments.jobs, arguments.live, builds, log))
        except Exception:
            Console(stderr=True).print(log.read_text()[-4000:] if log.exists() else "no log", markup=False)
            raise
    sys.exit(0 if write("controller", rows, "The controller under load") else 1)


if __name__ == "__main__":
    main()
