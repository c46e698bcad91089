"""Jobs of one namespace share what they download and extend."""

from __future__ import annotations

from tests.e2e.jobs import tiny_job, training
from tests.e2e.namespace import Namespace


def cached_job(name: str):
    return tiny_job(name, cache={"claimName": "shared"}, training=training(maxSteps=4))


def test_a_second_job_takes_both_models_from_the_cache(namespace: Namespace):
    namespace.apply(cached_job("first"))
    namespace.until(
        "first", lambda job: "claim shared" in job.get("status", {}).get("message", ""), "it waits, and says so"
    )
    namespace.apply(namespace.claim("shared"))
    first = namespace.until_phase("first", "Complete")["status"]
    assert not first["model"].get("fromCache") and not first["tokens"].get("fromCache")

    namespace.apply(cached_job("second"))
    second = namespace.until_phase("second", "Complete")["status"]
    assert second["model"]["fromCache"] and second["tokens"]["fromCache"]
    assert second["output"]["sha256"] == first["output"]["sha256"]
    entries = list((namespace.volume("shared") / "finetune-cache").glob("*/*"))
    assert sorted(entry.parent.name for entry in entries if not entry.name.startswith(".")) == ["extended", "models"]
