"""What a trainer of the user's own left, made into what our own trainer leaves: complete, and said what it is.

Its exit code 0 said that the folder is complete. Files that it did not write (tokenizer, chat template, generation
settings) are the base's own: adding tokens happened before training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from finetune.api.contract import OUTPUT, ExitCode, Layout, StepJob
from finetune.api.spec import TrainerContainer
from finetune.steps.model_files.adapter import ADAPTER_CONFIG
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.staging import MANIFEST, digest, make_durable, published
from finetune.steps.workspace.training_record import FILE, write_training_record

NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.gguf", MANIFEST, ".*")


def adopt(job: StepJob, layout: Layout, container: TrainerContainer) -> None:
    """Publish `trained/` as the trainer left it; a StepFailure when there is no model in it."""
    folder = layout.trained
    if published(folder) is not None:
        return
    _require_model(folder)
    for path in base_model(layout).iterdir():
        if path.is_file() and not any(map(path.match, NOT_COPIED)) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    record = {
        "trainer": container.image or "the operator's training image",
        "command": container.command,
        "hyperparameters": job.spec.training.wire(),
        "history": [],
    }
    if not (folder / FILE).exists():
        write_training_record(folder, record)
    manifest = {"inputs": digest({"job": job.uid, "trainer": container.wire()}), "result": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    make_durable(folder)


def _require_model(folder: Path) -> None:
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return
    if (folder / ADAPTER_CONFIG).is_file():
        what, hint = "an adapter only", "Merge it before it is saved: model.merge_and_unload().save_pretrained(...)."
    else:
        what, hint = (
            "no config.json and *.safetensors",
            "Save there: trainer.save_model(os.environ['FINETUNE_OUTPUT']).",
        )
    raise StepFailure(
        ExitCode.BAD_DATA,
        "NoModel",
        f"spec.training.container: the trainer ended well and left {what} in {folder}, its ${OUTPUT}",
        hint,
    )
