import io

import pytest
from rich.console import Console

from finetune.api.contract import Step
from finetune.cli.job_picture import details, finished, picture
from finetune.cli.picture import State, duration, size, sparkline
from finetune.cli.runner import progress_words


def text(*renderables):
    console = Console(width=120, record=True, file=io.StringIO())
    for renderable in renderables:
        console.print(renderable)
    return console.export_text()


def condition(kind, status, reason="Done", message=""):
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


def job(*conditions, **status):
    return {
        "metadata": {"name": "job"},
        "status": {"startTime": "2026-01-01T00:00:00Z", "conditions": list(conditions), **status},
    }


PREPARED = [
    condition(kind, "True", message=f"{kind} it is")
    for kind in ("ModelDownloaded", "TokensAdded", "ModelReloaded", "DatasetLoaded")
]


def test_a_training_job_shows_its_bar_its_loss_and_what_is_left():
    progress = {
        "step": "train", "summary": "21% (120/562)", "percent": 21, "remaining": "12m", "loss": 1.5,
        "tokensPerSecond": 1000.0,
    }  # fmt: skip
    shown = text(picture(job(*PREPARED, phase="Training", progress=progress, tokens={"added": 4}), [2.0, 1.7]))
    assert "21%" in shown and "120/562, 1,000 tokens/s, 12m left" in shown
    assert "loss 1.5" in shown and "█" in shown
    assert "4 added" in shown


def test_a_failed_job_says_which_step_and_why():
    failed = job(
        *PREPARED[:3],
        condition("DatasetLoaded", "False", "MissingColumn"),
        condition("Failed", "True", "MissingColumn", "the template names reasoning; the rows have a, b"),
        phase="Failed",
        message="the template names reasoning; the rows have a, b",
    )
    assert finished(failed) is False
    shown = text(picture(failed), details(failed))
    assert "✘  load the dataset" in shown
    assert "the rows have a, b" in shown


def test_a_step_whose_pod_is_queued_is_not_shown_as_running():
    for reason, state in (("Running", State.RUNNING), ("Waiting", State.WAITING)):
        shown = picture(job(*PREPARED, condition("Trained", "False", reason)))
        assert next(line.state for line in shown.lines if line.step == Step.TRAIN) == state


def test_attempts_are_listed():
    history = [
        {
            "stage": "train",
            "number": 1,
            "outcome": "Preempted",
            "reason": "EvictionByEvictionAPI",
            "message": "drained",
        },
        {"stage": "train", "number": 2, "outcome": "Running", "resumedFromStep": 50, "node": "gpu-1"},
    ]
    shown = text(details(job(*PREPARED, attempts={"count": 2, "history": history})))
    assert "Preempted" in shown and "50" in shown and "gpu-1" in shown


def test_a_job_that_nobody_took_up_yet_shows_nothing_running():
    waiting = {"metadata": {"name": "job"}}
    assert finished(waiting) is None
    assert "Pending" in text(picture(waiting))


def test_a_complete_job_is_finished():
    assert finished(job(*PREPARED, condition("Complete", "True"), phase="Complete")) is True


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.44, "0.4 s"), (12, "12 s"), (59.9, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_sizes():
    assert [size(count) for count in (512, 1500, 269_060_552, 3e12)] == ["512 B", "1.5 kB", "269.1 MB", "3.0 TB"]


def test_a_sparkline_falls_with_the_loss_and_never_grows_too_wide():
    assert sparkline([2.0, 1.0, 0.0]) == "█▅▁"
    assert sparkline([1.0]) == "▁"
    assert len(sparkline([float(value) for value in range(1000)])) == 60


def test_progress_in_words():
    status = {"current": 120.0, "total": 562.0, "unit": "step", "remaining": 65, "tokens_per_second": 900.4}
    assert progress_words(status) == "120/562 steps, 900 tokens/s, 1 min 5 s left"
    assert progress_words({"current": 1.5e6, "total": 3e6, "unit": "byte"}) == "1.5 MB of 3.0 MB"


def test_every_step_has_a_summary_of_an_empty_result():
    from finetune.cli.results import summary

    for step in Step:
        assert isinstance(summary(step, {}), str)
