import json
from pathlib import Path

import pytest

from finetune.api import API_VERSION
from finetune.cli import document
from finetune.cli.check import InvalidJob, checked
from tests.integration.bad_specs import BAD, CLOSE, GOOD
from tests.merge_patch import merged

ROOT = Path(__file__).parents[3]
EXAMPLES = [path for path in sorted((ROOT / "manifests/examples").rglob("*.yaml")) if path.stem != "claims"]
RULES = (ROOT / "manifests/crd.yaml").read_text()


def job(tmp_path, content):
    file = tmp_path / "job.yaml"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return document.jobs(document.read(file))[0]


def problems(tmp_path, content):
    with pytest.raises(InvalidJob) as refused:
        checked(job(tmp_path, content))
    return refused.value.problems


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_what_the_api_server_refuses_is_refused_here(tmp_path, bad):
    assert problems(tmp_path, bad.job)


@pytest.mark.parametrize("name", CLOSE)
def test_what_is_close_to_that_is_accepted(tmp_path, name):
    checked(job(tmp_path, CLOSE[name]))


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad.says in " ".join(RULES.split())], ids=lambda bad: bad.name)
def test_rules_speak_in_the_same_sentence(tmp_path, bad):
    assert any(bad.says in problem.message for problem in problems(tmp_path, bad.job))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_would_run(example):
    for found in document.jobs(document.read(example)):
        checked(found)


def test_a_problem_has_field_line_and_what_was_meant(tmp_path):
    text = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: job}
spec:
  model: {uri: "hf://org/model"}
  dataset:
    sources:
    - uri: hf://datasets/org/data
      spilt: train
  training:
    learning_rate: 1e-5
    epochs: 1
"""
    found = {problem.field: problem for problem in problems(tmp_path, text)}
    assert found["spec.dataset.sources[0].spilt"].line == 9
    assert found["spec.dataset.sources[0].spilt"].message == "no such field; did you mean split?"
    assert found["spec.training.learning_rate"].line == 11
    assert found["spec.training.learning_rate"].message == "no such field; did you mean learningRate?"


def test_numbers_are_yaml_1_2(tmp_path):
    text = json.dumps(GOOD).replace('"epochs": 1', '"epochs": 1, "learningRate": 1e-5')
    assert checked(job(tmp_path, text)).training.learning_rate == 1e-5


def test_text_is_no_number_as_for_the_api_server(tmp_path):
    (problem,) = problems(tmp_path, merged(GOOD, {"spec": {"training": {"learningRate": "1e-5"}}}))
    assert problem.field == "spec.training.learningRate"
    assert "'1e-5'" in problem.message


def test_what_nothing_acts_on_yet_is_refused_with_its_remedy(tmp_path):
    (problem,) = problems(tmp_path, merged(GOOD, {"spec": {"training": {"parallelism": "DeepSpeedZeRO"}}}))
    assert problem.field == "spec.training.parallelism"
    assert problem.message == "DeepSpeedZeRO is not implemented yet; use FSDP, which splits the model likewise"


def test_another_version_is_named(tmp_path):
    (problem,) = problems(tmp_path, merged(GOOD, {"apiVersion": "finetune.dev/v1"}))
    assert API_VERSION in problem.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1, 2", "job.yaml:1: "),
        ("", "holds no FineTuneJob"),
        ("kind: ConfigMap", "but ConfigMap"),
    ],
)
def test_a_file_without_a_job_is_named(tmp_path, text, says):
    with pytest.raises(document.UnreadableFile) as error:
        job(tmp_path, text)
    assert says in str(error.value)
