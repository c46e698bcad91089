"""save publishes whole folders that plain transformers loads, and never writes over what is not its own."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.api.contract import ExitCode, StepJob
from finetune.api.status import OutputStatus
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.save.step import run
from finetune.steps.workspace.staging import publish
from tests.models import tiny
from tests.unit.steps.flow import Workshop

HISTORY = [{"step": step, "loss": 5 / step, "learningRate": 1e-4 / step} for step in range(1, 31)]
RECORD: dict[str, Any] = {
    "hyperparameters": {"learningRate": 1e-4, "maxSteps": 30},
    "steps": 30,
    "history": [entry | ({"validationLoss": 0.5} if entry["step"] % 10 == 0 else {}) for entry in HISTORY],
    "seconds": 12.5,
    "tokens": 1000,
    "tokensPerSecond": 80.0,
    "peakMemoryBytes": 1 << 30,
    "resumptions": [10],
    "exact": True,
    "environment": {"device": "cpu", "torch": "2.15.0"},
}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    """A workspace as training leaves it."""
    workshop = Workshop.at(tmp_path)
    (workshop.layout.claims / "models").mkdir()

    def write(folder: Path) -> dict[str, Any]:
        tiny(folder)
        (folder / "training.json").write_text(json.dumps(RECORD))
        return {"steps": 30}

    publish(workshop.layout.trained, {}, write)
    publish(workshop.layout.dataset, {}, lambda _: {"sources": [{"format": "Instruction", "rows": 40}], "examples": 36})
    return workshop


def job(workshop: Workshop, uri: str | None = "pvc://models/team/answers", **changes: Any) -> StepJob:
    spec = {"output": {"uri": uri}} if uri else {}
    return workshop.job(**spec).model_copy(update=changes)


def save(workshop: Workshop, job: StepJob) -> dict[str, Any]:
    result = run(job, workshop.layout).result
    assert result is not None
    OutputStatus.model_validate({key: value for key, value in result.items() if key != "reused"})
    return result


def place(workshop: Workshop) -> Path:
    return workshop.layout.claims / "models/team/answers"


def refusal(workshop: Workshop, job: StepJob) -> StepFailure:
    with pytest.raises(StepFailure) as failure:
        run(job, workshop.layout)
    return failure.value


def test_the_published_folder_loads_in_plain_transformers(workshop: Workshop) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save(workshop, job(workshop))
    tokenizer = AutoTokenizer.from_pretrained(place(workshop))
    model = AutoModelForCausalLM.from_pretrained(place(workshop))
    assert model.dtype == torch.bfloat16
    ids = tokenizer("Why is the sky blue?", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()


def test_the_report_says_where_how_large_and_which(workshop: Workshop) -> None:
    result = save(workshop, job(workshop))
    weights = (place(workshop) / "model.safetensors").read_bytes()
    assert result["uri"] == "pvc://models/team/answers"
    assert result["sha256"] == hashlib.sha256(weights).hexdigest()
    assert result["sizeBytes"] == sum(
        path.stat().st_size for path in place(workshop).iterdir() if path.name != "finetune-manifest.json"
    )


def test_without_an_output_it_stays_in_the_workspace_without_a_second_copy(workshop: Workshop) -> None:
    save(workshop, job(workshop, uri=None))
    assert (workshop.layout.output / "model.safetensors").samefile(workshop.layout.trained / "model.safetensors")


def test_card_provenance_and_curve_lie_beside_the_weights(workshop: Workshop) -> None:
    save(workshop, job(workshop))
    card = (place(workshop) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: tests/tiny" in card
    assert "| validation loss | 0.5000 |" in card
    assert "bit-exact" in card
    document = json.loads((place(workshop) / "provenance.json").read_text())
    assert document["base"]["uri"] == "hf://tests/tiny"
    assert document["training"]["hyperparameters"]["learningRate"] == 1e-4
    assert (place(workshop) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_does_nothing_and_says_so(workshop: Workshop) -> None:
    first = save(workshop, job(workshop))
    before = (place(workshop) / "model.safetensors").stat().st_mtime_ns
    assert save(workshop, job(workshop)) == first | {"reused": True}
    assert (place(workshop) / "model.safetensors").stat().st_mtime_ns == before


def test_a_job_applied_anew_replaces_its_own_former_output(workshop: Workshop) -> None:
    save(workshop, job(workshop))
    (place(workshop) / "left-over.txt").write_text("of the former output")
    save(workshop, job(workshop, uid="another"))
    assert not (place(workshop) / "left-over.txt").exists()


@pytest.mark.parametrize("holder", ["another job", "somebody's files", "a file"])
def test_what_is_not_its_own_is_never_touched(workshop: Workshop, holder: str) -> None:
    if holder == "another job":
        save(workshop, job(workshop, name="other", uid="other"))
    elif holder == "somebody's files":
        place(workshop).mkdir(parents=True)
        (place(workshop) / "thesis.tex").write_text("years of work")
    else:
        place(workshop).parent.mkdir()
        place(workshop).write_text("years of work")
    before = snapshot(workshop)
    failure = refusal(workshop, job(workshop))
    assert (failure.code, failure.error.reason) == (ExitCode.BAD_CONFIGURATION, "OutputExists")
    assert failure.error.hint
    assert snapshot(workshop) == before


def snapshot(workshop: Workshop) -> dict[str, bytes]:
    root = workshop.layout.claims
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_an_empty_folder_is_taken(workshop: Workshop) -> None:
    place(workshop).mkdir(parents=True)
    save(workshop, job(workshop))
    assert (place(workshop) / "model.safetensors").exists()


def test_broken_off_it_leaves_nothing_and_the_former_output_stays(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.steps.save.step as module

    save(workshop, job(workshop))
    before = snapshot(workshop)

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "write_card", fail)
    with pytest.raises(OSError, match="Input/output"):
        run(job(workshop, uid="another"), workshop.layout)
    assert snapshot(workshop) == before
    assert [path.name for path in place(workshop).parent.iterdir()] == ["answers"]


def test_a_claim_that_is_not_mounted_is_named(workshop: Workshop) -> None:
    failure = refusal(workshop, job(workshop, uri="pvc://nowhere/answers"))
    assert (failure.code, failure.error.reason) == (ExitCode.NO_INPUT, "ClaimMissing")
    assert "pvc://nowhere/answers" in failure.error.message


def test_before_training_there_is_nothing_to_save(workshop: Workshop) -> None:
    shutil.rmtree(workshop.layout.trained)
    assert refusal(workshop, job(workshop)).error.reason == "StepMissing"


def test_torch_is_not_needed(workshop: Workshop) -> None:
    done = workshop.run_without_torch("save", job(workshop))
    assert done.returncode == 0, done.stderr
    assert (place(workshop) / "loss.png").exists()


# --- a trainer of the user's own

OWN = {"maxSteps": 3, "container": {"image": "mine:1", "command": ["python", "/scripts/train.py"]}}


@pytest.fixture
def own(tmp_path: Path) -> Workshop:
    """A workspace whose training was somebody else's: weights and configuration, nothing of ours."""
    workshop = Workshop.at(tmp_path)
    (workshop.layout.claims / "models").mkdir()
    workshop.layout.trained.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(workshop.layout.model / name, workshop.layout.trained / name)
    return workshop


def test_what_your_own_trainer_left_is_completed_from_the_base_and_published(own: Workshop) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = own.job(output={"uri": "pvc://models/own"}, training=OWN)
    result = save(own, job)
    folder = own.layout.claims / "models/own"
    assert result["sizeBytes"] > 0
    assert (folder / "chat_template.jinja").read_bytes() == (own.layout.model / "chat_template.jinja").read_bytes()
    assert "mine:1" in (folder / "README.md").read_text()
    assert not (folder / "loss.png").exists()
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert save(own, job)["reused"] is True


def test_a_tokenizer_that_your_own_trainer_wrote_is_kept(own: Workshop) -> None:
    (own.layout.trained / "tokenizer_config.json").write_text('{"mine": true}')
    save(own, own.job(output={"uri": "pvc://models/own"}, training=OWN))
    assert (own.layout.claims / "models/own/tokenizer_config.json").read_text() == '{"mine": true}'


@pytest.mark.parametrize(
    ("left", "says", "hint"),
    [
        ((), "no config.json and *.safetensors", "trainer.save_model"),
        (("config.json",), "no config.json and *.safetensors", "trainer.save_model"),
        (("adapter_config.json", "adapter_model.safetensors"), "an adapter only", "merge_and_unload"),
    ],
)
def test_a_trainer_that_left_no_model_is_told_where_it_belongs(
    own: Workshop, left: tuple[str, ...], says: str, hint: str
) -> None:
    shutil.rmtree(own.layout.trained)
    own.layout.trained.mkdir()
    for name in left:
        (own.layout.trained / name).write_text("{}")
    with pytest.raises(StepFailure) as failure:
        run(own.job(training=OWN), own.layout)
    assert (failure.value.code, failure.value.error.reason) == (ExitCode.BAD_DATA, "NoModel")
    assert says in failure.value.error.message
    assert hint in failure.value.error.hint
