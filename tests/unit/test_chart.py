from pathlib import Path

import yaml

from finetune.api.crd import crd

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/finetune-operator"


def test_the_charts_definition_is_the_generated_one():
    assert (CHART / "files/crd.yaml").read_text() == (ROOT / "manifests/crd.yaml").read_text(), "run `make generate`"


def test_helm_never_deletes_the_definition_and_with_it_all_jobs():
    assert crd()["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_every_value_stands_in_the_schema():
    import json

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    for name, value in values.items():
        known = schema["properties"][name].get("properties")
        if isinstance(value, dict) and known:
            assert set(value) == set(known), name


def test_chart_and_package_have_one_version():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project
