"""`finetune-operator`: the process. The only module that knows kopf, which does the watching and nothing else."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from typing import Any

import kopf

from finetune.api import KIND
from finetune.controller.cluster.access import Access, ConfigurationError
from finetune.controller.cluster.backoff import Unending
from finetune.controller.cluster.client import Api
from finetune.controller.replica import Replica
from finetune.controller.settings import MissingSettingError, Settings

log = logging.getLogger("finetune.operator")


class WatchError(Exception):
    """kopf ended by itself; it has logged the details."""


class NoDiffBase(kopf.DiffBaseStorage):
    """kopf compares each object with an annotation that it left; we decide from the whole state, and leave nothing."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None, ignored_fields: Any = None) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence | None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        return None


def watches(replica: Replica, access: Access, registry: kopf.OperatorRegistry) -> kopf.OperatorSettings:
    """Register a handler that only passes on what it sees: one that raises would not be called again."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = 0.5
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.networking.error_backoffs = Unending()
    resource = next(item for item in replica.watched if item.kind == KIND)
    settings.watching.label_selectors[resource.group, resource.plural] = resource.selector

    @kopf.on.event(resource.group, resource.version, resource.plural, registry=registry)
    async def see(*, event: Any, **_: Any) -> None:
        try:
            replica.saw(KIND, event["type"] or "ADDED", event["object"])
        except Exception:
            log.exception("an event of a FineTuneJob could not be read")

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return kopf.AiohttpSession(server=access.server, aiohttp_session=access.session(replica.patience))

    return settings


async def watch(replica: Replica, access: Access, stop: asyncio.Event) -> None:
    """Run kopf until `stop` is set."""
    registry = kopf.OperatorRegistry()
    namespaces = replica.settings.namespaces
    try:
        await kopf.operator(
            registry=registry,
            settings=watches(replica, access, registry),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=list(namespaces),
            stop_flag=stop,
        )
    except Exception as error:
        raise WatchError(f"the watch of FineTuneJobs ended: {error!r}") from error


async def run(settings: Settings) -> None:
    """Run one replica until a signal, or until some part of it ends."""
    stop = asyncio.Event()
    access = await Access.load()
    try:
        replica = Replica(settings, Api(access), of_lease=Api(access, connections=2))

        async def watched(replica: Replica, ended: asyncio.Event) -> None:
            running = asyncio.create_task(watch(replica, access, ended))
            await asyncio.sleep(0.1)  # kopf has put its own signal handlers up by now: replace them
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await running

        await replica.run(watched, stop)
    finally:
        await access.close()


def main() -> None:
    """The entry point. Everything is set through the environment; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="finetune-operator",
        description="Runs FineTuneJobs. Reaches the API server through the pod's service account, or KUBECONFIG.",
        epilog="Environment: FINETUNE_STEPS_IMAGE and FINETUNE_TRAIN_IMAGE (required), FINETUNE_NAMESPACES, "
        "FINETUNE_OPERATOR_NAMESPACE, FINETUNE_PROGRESS_URL, FINETUNE_HF_ENDPOINT and more: "
        "see finetune/controller/settings.py or the Helm chart's values.",
    )
    parser.add_argument("--namespaces", help="watch these namespaces, comma-separated (default: the whole cluster)")
    parser.add_argument("--log-level", help="DEBUG, INFO, WARNING or ERROR")
    arguments = parser.parse_args()
    environment = dict(os.environ)
    for name in ("namespaces", "log_level"):
        if value := getattr(arguments, name):
            environment[f"FINETUNE_{name.upper()}"] = value
    try:
        settings = Settings.from_environment(environment)
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLogger().level))
        gc.freeze()  # what the imports made stays for ever: no collection need look at it
        gc.set_threshold(5_000, 10, 10)
        asyncio.run(run(settings))
    except (MissingSettingError, ConfigurationError, WatchError) as error:
        sys.exit(f"finetune-operator: {error}")


if __name__ == "__main__":
    main()
