"""A step that keeps the contract and does nothing: `python fake_step.py STEP`, told by variables what to play."""

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime

from finetune.api.contract import PROGRESS_PREFIX, ExitCode, Layout, Step, StepError, StepJob, StepReport

RESULTS = {
    Step.DOWNLOAD: {"commit": "0123456789abcdef", "sizeBytes": 269_060_552},
    Step.ADD_TOKENS: {
        "added": 4,
        "vocabularySizeBefore": 49152,
        "vocabularySize": 49156,
        "embeddingRowsBefore": 49152,
        "embeddingRows": 49216,
        "warnings": ["<a> and <b> start from one source"],
    },
    Step.RELOAD: {"probabilities": [{"token": "<think>", "withPrompt": 0.0312}]},
    Step.LOAD_DATASET: {"examples": 900, "validationExamples": 100, "tokens": 81234, "trainedTokens": 40321},
    Step.TRAIN: {"steps": 40, "loss": 0.31, "validationLoss": 0.35},
    Step.SAVE: {"uri": "pvc://models/out", "sizeBytes": 270_000_000},
}


def progress(current, total, **metrics):
    values = {"current": current, "total": total, **metrics}
    report = {
        "lastUpdatedTime": datetime.now(UTC).isoformat(),
        "progressPercentage": current * 100 // total,
        "estimatedRemainingSeconds": total - current,
        "metrics": [{"name": name, "value": str(value)} for name, value in values.items()],
    }
    print(PROGRESS_PREFIX + json.dumps(report), flush=True)


def main():
    step, layout = Step(sys.argv[1]), Layout.from_environment()
    job = StepJob.model_validate_json(layout.job_file.read_bytes())
    with (layout.workspace / "seen.jsonl").open("a") as seen:
        names = ("HF_ENDPOINT", "FINETUNE_DEVICES", "OMP_NUM_THREADS", "FINETUNE_CLAIMS", "FINETUNE_CACHE")
        environment = {name: os.environ.get(name) for name in names}
        seen.write(
            json.dumps({"step": step, "attempt": job.attempt, "model": job.spec.model.uri, **environment}) + "\n"
        )
    print(f"the log of {step}", flush=True)
    report = StepReport(step=step, result=RESULTS[step])
    code = ExitCode.OK
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    count = int(os.environ.get("FAKE_STEPS", "5")) if step == Step.TRAIN else 2
    for current in range(1, count + 1):
        metrics = {"loss": round(2 / current, 3), "tokens_per_second": 1234.5} if step == Step.TRAIN else {}
        progress(current, count, unit="byte" if step == Step.DOWNLOAD else "step", **metrics)
        time.sleep(float(os.environ.get("FAKE_PAUSE", "0")))
        if stopped:
            code = ExitCode.PREEMPTED
            report = StepReport(
                step=step,
                result={"checkpoint": {"step": current}},
                error=StepError(reason="Preempted", message="stopped"),
            )
            break
    if step == os.environ.get("FAKE_KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    if step == os.environ.get("FAKE_FAILS"):
        code = ExitCode.BAD_DATA
        error = StepError(reason="MissingColumn", message="the template names reasoning", hint="The rows have: a, b.")
        report = StepReport(step=step, error=error)
    layout.report_file.write_text(report.to_json())
    print(report.to_json(), flush=True)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
