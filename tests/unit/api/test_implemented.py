import pytest

from finetune.api.implemented import not_implemented
from finetune.api.spec import FineTuneJobSpec

RUNNABLE = {
    "model": {"uri": "hf://org/name"},
    "dataset": {"sources": [{"uri": "pvc://data/rows.jsonl"}]},
    "training": {"epochs": 1},
}


def job(**changes):
    spec = {key: dict(value) for key, value in RUNNABLE.items()}
    for path, value in changes.items():
        section, _, field = path.partition("__")
        if field:
            spec[section][field] = value
        else:
            spec[section] = value
    return FineTuneJobSpec.model_validate(spec)


def test_a_plain_job_can_run():
    assert not_implemented(job()) == ()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"layout": "SinglePod"}, "layout"),
        ({"model__uri": "s3://bucket/model"}, "model.uri"),
        ({"output": {"uri": "hf://org/name"}}, "output.uri"),
        ({"training__parallelism": "DeepSpeedZeRO"}, "training.parallelism"),
        ({"training__parallelism": "FSDP", "training__method": "LoRA"}, "training.parallelism"),
        ({"tokens": {"learn": {"source": {"uri": "gs://b/poems"}, "size": 5}}}, "tokens.learn.source.uri"),
        ({"dataset__sources": [{"uri": "gs://bucket/rows"}]}, "dataset.sources[0].uri"),
        ({"dataset__validation": {"source": {"uri": "az://box/rows"}}}, "dataset.validation.source.uri"),
    ],
)
def test_a_value_without_behaviour_is_named_with_a_remedy(changes, field):
    (missing,) = not_implemented(job(**changes))
    assert missing.field == field
    assert missing.sentence().startswith(f"spec.{field}: ")
    assert missing.remedy
