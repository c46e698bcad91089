import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from finetune.cli.run import going_on

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FAKE = Path(__file__).with_name("fake_step.py")
PROGRAM = f"""
import sys
from finetune.cli import process
process.COMMAND = (sys.executable, {str(FAKE)!r})
from finetune.cli.__main__ import main
main()
"""
JOB = """\
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: job}
spec:
  model: {uri: "hf://org/model"}
  tokens: {add: [{content: "<think>"}]}
  dataset: {sources: [{uri: "hf://datasets/org/data"}]}
  training: {epochs: 1}
"""


@pytest.fixture
def finetune(tmp_path):
    """Runs the command in a folder of its own, with steps that keep the contract and do nothing."""

    def command(*arguments, job=JOB, wait=True, **environment):
        (tmp_path / "job.yaml").write_text(textwrap.dedent(job))
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "operator"), "COLUMNS": "200", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not wait:
            return process
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    command.folder = tmp_path
    return command


def seen(folder, name="job"):
    """What each step that ran saw."""
    text = (folder / f"finetune-work/{name}/workspace/seen.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_all_steps_run_in_order_and_the_end_says_where_the_model_is(finetune):
    code, output = finetune("run", "job.yaml")
    assert code == 0, output
    steps = [entry["step"] for entry in seen(finetune.folder)]
    assert steps == ["download", "add-tokens", "reload", "load-dataset", "train", "save"]
    assert "40 steps, loss 0.31, validation loss 0.35" in output
    assert "the model is in finetune-work/job/workspace/output" in output
    assert "warning: <a> and <b> start from one source" in output


def test_without_tokens_none_are_added(finetune):
    finetune("run", "job.yaml", job=JOB.replace('  tokens: {add: [{content: "<think>"}]}\n', ""))
    assert "add-tokens" not in [entry["step"] for entry in seen(finetune.folder)]


def test_a_failed_step_ends_the_run_with_its_code_its_words_and_its_log(finetune):
    code, output = finetune("run", "job.yaml", FAKE_FAILS="load-dataset")
    assert code == 65
    assert "MissingColumn" in output
    assert "the template names reasoning" in output
    assert "hint: The rows have: a, b." in output
    assert "the log of load-dataset" in output
    assert seen(finetune.folder)[-1]["step"] == "load-dataset"


def test_a_killed_step_is_explained(finetune):
    code, output = finetune("run", "job.yaml", FAKE_KILLED="train")
    assert code == 128 + signal.SIGKILL
    assert "memory ran out" in output


def wait_for(path, text, seconds=60):
    deadline = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} never held {text}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_reaches_the_step_and_the_same_command_goes_on(finetune, number):
    process = finetune("run", "job.yaml", wait=False, FAKE_PAUSE="0.05", FAKE_STEPS="2000")
    wait_for(finetune.folder / "finetune-work/job/workspace/seen.jsonl", '"train"')
    time.sleep(1)  # the step installs its handler
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped, checkpoint after step" in output
    assert "This command goes on from here: finetune run job.yaml" in output
    code, output = finetune("run", "job.yaml")
    assert code == 0, output
    assert {entry["attempt"] for entry in seen(finetune.folder)} == {1, 2}


def test_two_runs_never_share_a_folder(finetune):
    process = finetune("run", "job.yaml", wait=False, FAKE_PAUSE="0.05", FAKE_STEPS="2000")
    wait_for(finetune.folder / "finetune-work/job/workspace/seen.jsonl", '"train"')
    code, output = finetune("run", "job.yaml")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert code == 69
    assert "another run works in finetune-work/job" in output


def test_claims_lie_where_they_are_said_to_lie(finetune):
    (finetune.folder / "corpus").mkdir()
    job = JOB.replace("hf://datasets/org/data", "pvc://corpus/a.jsonl") + '  output: {uri: "pvc://models/out"}\n'
    code, output = finetune("run", "job.yaml", job=job)
    assert code == 66
    assert "the claim corpus is a folder here, and claims/corpus does not exist" in output
    assert "--claim corpus=PATH" in output
    code, output = finetune("run", "job.yaml", "--claim", "corpus=corpus", job=job)
    assert code == 0, output
    links = Path(seen(finetune.folder)[-1]["FINETUNE_CLAIMS"])
    assert (links / "corpus").resolve() == finetune.folder / "corpus"
    assert (links / "models").resolve() == finetune.folder / "claims/models"


def test_the_cache_is_the_claim_of_the_job_or_a_folder_of_ones_own(finetune):
    finetune("run", "job.yaml")
    assert seen(finetune.folder)[0]["FINETUNE_CACHE"] is None
    code, output = finetune("run", "job.yaml", job=JOB + "  cache: {claimName: shared}\n")
    assert code == 0, output
    assert seen(finetune.folder)[-1]["FINETUNE_CACHE"] == str(finetune.folder / "claims/shared")
    finetune("run", "job.yaml", "--cache", "mine", job=JOB + "  cache: {claimName: shared}\n")
    assert seen(finetune.folder)[-1]["FINETUNE_CACHE"] == str(finetune.folder / "mine")


def test_a_model_that_is_here_takes_the_place_of_the_jobs(finetune):
    (finetune.folder / "smol").mkdir()
    code, output = finetune("run", "job.yaml", "--model", "smol")
    assert code == 0, output
    first = seen(finetune.folder)[0]
    assert first["model"] == "pvc://local-model/"
    assert (Path(first["FINETUNE_CLAIMS"]) / "local-model").resolve() == finetune.folder / "smol"


def test_a_list_of_tokens_comes_from_the_config_map_in_the_same_file(finetune):
    job = JOB.replace('{add: [{content: "<think>"}]}', "{addFrom: {configMap: {name: terms, key: terms.txt}}}")
    code, output = finetune("run", "job.yaml", job=job)
    assert code == 66
    assert "no ConfigMap terms with the key terms.txt" in output
    config_map = (
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: terms}\ndata:\n  terms.txt: |\n    BRCA1\n    TP53\n"
    )
    code, output = finetune("run", "job.yaml", job=job + config_map)
    assert code == 0, output
    assert (finetune.folder / "finetune-work/job/tokens").read_text() == "BRCA1\nTP53\n"


def test_a_chat_template_comes_from_the_config_map_in_the_same_file(finetune):
    config_map = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: templates}\ndata:\n  mine: '{{ messages }}'\n"
    uri = next(line for line in JOB.splitlines() if "model:" in line)
    job = JOB.replace(uri, uri.replace("}", ", chatTemplate: {configMap: {name: templates, key: mine}}}"))
    code, output = finetune("run", "job.yaml", job=job)
    assert code == 66
    assert "no ConfigMap templates with the key mine" in output
    code, output = finetune("run", "job.yaml", job=job + config_map)
    assert code == 0, output
    assert (finetune.folder / "finetune-work/job/chat_template.jinja").read_text() == "{{ messages }}"


def test_several_jobs_of_one_file_run_one_after_the_other(finetune):
    both = JOB + "---\n" + JOB.replace("name: job", "name: second")
    code, output = finetune("run", "job.yaml", job=both)
    assert code == 0, output
    assert seen(finetune.folder)[0]["step"] == seen(finetune.folder, "second")[0]["step"] == "download"
    code, output = finetune("run", "job.yaml", "--name", "third", job=both)
    assert code == 64
    assert "holds no FineTuneJob named third" in output


def test_training_is_told_its_devices_and_the_hub(finetune):
    finetune("run", "job.yaml", "--hf-endpoint", "http://hub.example.com")
    train = next(entry for entry in seen(finetune.folder) if entry["step"] == "train")
    assert train["FINETUNE_DEVICES"] == "1"
    assert train["HF_ENDPOINT"] == "http://hub.example.com"


def test_fresh_forgets_the_former_run(finetune):
    finetune("run", "job.yaml")
    finetune("run", "job.yaml", "--fresh")
    assert {entry["attempt"] for entry in seen(finetune.folder)} == {1}


def test_a_bad_job_is_refused_before_anything_starts(finetune):
    code, output = finetune("run", "job.yaml", job=JOB.replace("epochs: 1", "epochs: 1, maxSteps: 2"))
    assert code == 78
    assert "job.yaml:8  spec.training  training takes exactly one of epochs and maxSteps" in output
    assert not (finetune.folder / "finetune-work").exists()


def test_render_writes_every_default_as_a_job_that_renders_the_same(finetune):
    code, output = finetune("render", "job.yaml")
    assert code == 0, output
    assert "maxLength: 1024" in output
    assert finetune("render", "job.yaml", job=output) == (0, output)


def test_a_missing_file_is_one_sentence(finetune):
    code, output = finetune("render", "absent.yaml")
    assert (code, output) == (66, "error: absent.yaml does not exist\n")


def test_a_trainer_of_your_own_is_for_a_cluster(finetune):
    job = JOB.replace("{epochs: 1}", "{epochs: 1, container: {image: mine}}")
    code, output = finetune("run", "job.yaml", job=job)
    assert code == 78
    assert "spec.training.container is another trainer" in output


def test_several_pods_become_one_machine_with_the_same_batch(finetune):
    job = JOB.replace("{epochs: 1}", "{epochs: 1, nodes: 2}") + "  workspace: {accessModes: [ReadWriteMany]}\n"
    code, output = finetune("run", "job.yaml", job=job)
    assert code == 0, output
    assert "the job asks for 2 training pods" in output


def test_the_command_that_goes_on_erases_nothing():
    assert going_on(["run", "my job.yaml", "--fresh", "--work", "w"]) == "finetune run 'my job.yaml' --work w"
