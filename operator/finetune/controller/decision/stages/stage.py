"""What a stage of the flow is. Each one is a module (prepare, train, save) that offers this."""

from __future__ import annotations

from typing import Any, Protocol

from finetune.api.contract import Step
from finetune.controller.decision.observed import Object, Observed
from finetune.controller.decision.stages.attempt import Outcome
from finetune.controller.decision.stages.pod import PodSettings


class Stage(Protocol):
    """One stage: what its attempts run, and how one of them goes."""

    STAGE: str
    """Its name in labels, in children's names and in the record of attempts."""

    STEPS: tuple[Step, ...]
    """The steps that it runs, in their order; it is done when their conditions hold."""

    def manifest(self, observed: Observed, settings: PodSettings, attempt: int) -> dict[str, Any]:
        """The Job of one attempt."""

    def outcome(self, observed: Observed, child: Object | None, number: int, pods: tuple[Object, ...]) -> Outcome:
        """How an attempt goes; `child` is None when its Job is gone, although a pod of it was seen once."""
