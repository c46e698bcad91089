"""Devices that share a model: FSDP learns what DDP does, resumes bit for bit, and is never silently something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from finetune.api.spec import Parallelism
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.train.distributed.sharing import Copies, Shards, sharing_of
from tests.unit.steps.flow import Workshop
from tests.unit.steps.processes import EVERY, TWO, finished, ready, report, stopped, weights

SHORT = {"maxSteps": 14, "parallelism": "FSDP"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    workshop = ready(tmp_path_factory.mktemp("sharing") / "undisturbed", **SHORT)
    finished(workshop, **TWO)
    return workshop


@pytest.mark.slow
def test_fsdp_learns_what_ddp_learns(undisturbed: Workshop, tmp_path: Path) -> None:
    """Sums in another order: the losses agree to six digits, the bf16 weights to their last bits."""
    copies = ready(tmp_path / "copies", **SHORT | {"parallelism": "DDP"})
    finished(copies, **TWO)
    ours, theirs = (json.loads((each.layout.trained / "training.json").read_text()) for each in (undisturbed, copies))
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["gradientNorm"] == pytest.approx(other["gradientNorm"], rel=1e-4)
    assert report(undisturbed)["result"]["validationLoss"] == pytest.approx(
        report(copies)["result"]["validationLoss"], rel=1e-5
    )
    first, second = (load_file(each.layout.trained / "model.safetensors") for each in (undisturbed, copies))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0.02, atol=2e-4)


@pytest.mark.slow
def test_fsdp_stopped_goes_on_to_equal_weights(undisturbed: Workshop, tmp_path: Path) -> None:
    workshop = ready(tmp_path / "stopped", **SHORT)
    stopped(workshop, **TWO)
    finished(workshop, **TWO)
    assert report(workshop)["resumedFromStep"] >= EVERY
    assert report(workshop)["result"]["exact"] is True
    assert weights(workshop) == weights(undisturbed)


@pytest.mark.slow
def test_fsdp_goes_on_with_another_number_of_devices_and_says_that_it_is_not_exact(tmp_path: Path) -> None:
    workshop = ready(tmp_path / "changed", **SHORT)
    stopped(workshop, **TWO)
    finished(workshop)
    assert (report(workshop)["result"]["steps"], report(workshop)["result"]["exact"]) == (14, False)
    record = json.loads((workshop.layout.trained / "training.json").read_text())
    losses = [entry["loss"] for entry in record["history"]]
    assert losses[-1] < losses[0]


def test_a_model_that_is_not_shared_as_asked_is_refused() -> None:
    """What accelerate makes of FSDP on a CPU, and of several devices when it sees only one."""
    plain = torch.nn.Linear(2, 2)
    for sharing in (Copies(2), Shards(2)):
        with pytest.raises(StepFailure) as failure:
            sharing.verify(plain)
        assert failure.value.error.reason == "NotSharedAsAsked"
        assert "over 2 devices, but the prepared model is a Linear" in failure.value.error.message
    for sharing in (Copies(1), Shards(1)):
        sharing.verify(plain)


def test_ddp_in_the_place_of_fsdp_is_refused() -> None:
    class Wrapped(DistributedDataParallel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    Copies(2).verify(Wrapped())
    with pytest.raises(StepFailure, match="FSDP over 2 devices, but the prepared model is a Wrapped"):
        Shards(2).verify(Wrapped())


@pytest.mark.parametrize(
    ("parallelism", "kind"), [(Parallelism.AUTO, Copies), (Parallelism.DDP, Copies), (Parallelism.FSDP, Shards)]
)
def test_each_parallelism_has_its_way(parallelism: Parallelism, kind: type[Copies]) -> None:
    assert type(sharing_of(parallelism, 2)) is kind
