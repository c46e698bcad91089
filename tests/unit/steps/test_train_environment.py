"""What decides the last bit of a sum is the same in every attempt."""

from finetune.steps.train.checkpoints import environment
from finetune.steps.train.checkpoints.environment import INSTRUCTIONS, pinned


def test_threads_are_shared_by_the_devices_of_a_pod(monkeypatch):
    monkeypatch.setattr(environment, "processors", lambda: 8)
    assert pinned({}, {}, devices=2)["OMP_NUM_THREADS"] == "4"
    assert pinned({}, {}, devices=16)["OMP_NUM_THREADS"] == "1"


def test_a_resumed_run_takes_the_threads_of_its_checkpoint(monkeypatch):
    monkeypatch.setattr(environment, "processors", lambda: 8)
    assert pinned({}, {"OMP_NUM_THREADS": "3"}, devices=1)["OMP_NUM_THREADS"] == "3"


def test_what_the_pod_says_takes_precedence():
    assert pinned({"OMP_NUM_THREADS": "5"}, {"OMP_NUM_THREADS": "3"}, devices=1)["OMP_NUM_THREADS"] == "5"


def test_instructions_that_this_machine_lacks_are_never_asked_for(monkeypatch):
    monkeypatch.setattr(environment, "_has_avx2", lambda: False)
    assert not INSTRUCTIONS.keys() & pinned({}, INSTRUCTIONS, devices=1).keys()
