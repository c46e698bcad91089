"""A curriculum on the cluster: LoRA with new tokens, merged; then preferences, from what the first job made."""

from __future__ import annotations

import json

from tests.e2e.jobs import condition, tiny_job, training
from tests.e2e.namespace import Namespace

STEPS = 10


def test_a_merged_adapter_is_the_base_of_a_job_that_learns_preferences(namespace: Namespace):
    adapted = tiny_job(
        "adapted",
        training=training(method="LoRA", maxSteps=STEPS, samples={"prompts": ["What is 2 plus 3?"]}),
        output={"uri": "pvc://models/adapted"},
    )
    namespace.apply(namespace.claim("models"), adapted)
    first = namespace.until_phase("adapted", "Complete")
    assert first["status"]["tokens"]["added"] == 2
    output = namespace.volume("models") / "adapted"
    files = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "report.html", "README.md"} <= files and "adapter_config.json" not in files
    assert "What is 2 plus 3?" in (output / "report.html").read_text()

    preferred = tiny_job(
        "preferred",
        model={"uri": "pvc://models/adapted"},
        tokens=None,
        dataset={"sources": [{"uri": "hf://datasets/tests/pairs"}], "maxLength": 256},
        training=training(objective="Preference", maxSteps=STEPS),
        output={"uri": "pvc://models/preferred"},
    )
    preferred["spec"].pop("tokens")
    namespace.apply(preferred)
    second = namespace.until_phase("preferred", "Complete")
    assert second["status"]["training"]["steps"] == STEPS
    assert condition(second, "ModelReloaded")["status"] == "True"
    assert second["status"]["output"]["sha256"] != first["status"]["output"]["sha256"]
    tokenizer = json.loads((namespace.volume("models") / "preferred/tokenizer.json").read_text())
    assert "<think>" in {token["content"] for token in tokenizer["added_tokens"]}


def test_an_adapter_is_published_beside_the_extended_base_that_it_needs(namespace: Namespace):
    job = tiny_job(
        "adapter",
        training=training(method="LoRA", maxSteps=STEPS),
        output={"uri": "pvc://models/adapter", "format": "Adapter"},
    )
    namespace.apply(namespace.claim("models"), job)
    namespace.until_phase("adapter", "Complete")
    output = namespace.volume("models") / "adapter"
    assert (output / "adapter_model.safetensors").is_file()
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"]
