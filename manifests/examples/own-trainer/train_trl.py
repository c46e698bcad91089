"""A trainer of your own: trl's SFTTrainer under the contract of docs/bring-your-own-trainer.md.

Everything that it needs is in its environment; everything that the operator needs is files and an exit code.
"""

import signal

REQUESTS = []  # to stop
if (
    __name__ == "__main__"
):  # before the slow imports: a container's first process ignores SIGTERM until somebody listens
    signal.signal(signal.SIGTERM, lambda number, frame: REQUESTS.append(number))

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

MODEL, DATASET, CHECKPOINTS, OUTPUT, REPORT = (
    os.environ[f"FINETUNE_{name}"] for name in ("MODEL", "DATASET", "CHECKPOINTS", "OUTPUT", "REPORT")
)
PREEMPTED = 75


class StopWhenAsked(TrainerCallback):
    """When asked to stop: end after this step, with a checkpoint, on all ranks alike."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked
        self.stopped = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        asked = torch.tensor(int(self._asked()), device=args.device)
        if args.world_size > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


def newest_checkpoint() -> str | None:
    """The newest folder in which the file that Trainer writes last is there."""
    complete = [path.parent for path in Path(CHECKPOINTS).glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.partition("-")[2]))) if complete else None


def train(asked: Callable[[], bool]) -> int:
    """Train until the end, or until `asked` says to stop; returns the exit code."""
    wanted = json.loads(Path(os.environ["FINETUNE_JOB"]).read_text())["spec"]["training"]
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    settings = SFTConfig(
        output_dir=CHECKPOINTS,
        max_steps=wanted.get("maxSteps") or -1,
        num_train_epochs=wanted.get("epochs") or 1,
        per_device_train_batch_size=wanted["microBatchSize"],
        gradient_accumulation_steps=wanted["batchSize"] // (wanted["microBatchSize"] * devices),
        learning_rate=wanted["learningRate"],
        seed=wanted["seed"],
        save_steps=wanted["checkpoint"]["everySteps"],
        save_total_limit=wanted["checkpoint"]["keep"],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        disable_tqdm=True,
        report_to="kubeflow",  # the operator speaks this protocol: kubectl get ftj shows progress and loss
    )
    stop = StopWhenAsked(asked)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),  # with the new tokens in it
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        args=settings,
        train_dataset=load_from_disk(DATASET),  # token ids and labels: nothing is tokenised twice
        callbacks=[stop],
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint())
    steps, losses = trainer.state.global_step, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"steps": steps, "loss": losses[-1]}
    if stop.stopped:
        result["checkpoint"] = {"step": steps}
    else:
        trainer.save_model(OUTPUT)
    if trainer.is_world_process_zero():  # the last word of the container: `result` becomes status.training
        Path(REPORT).write_text(json.dumps({"step": "train", "result": result}))
    return PREEMPTED if stop.stopped else 0


if __name__ == "__main__":
    sys.exit(train(lambda: bool(REQUESTS)))
