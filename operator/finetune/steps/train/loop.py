"""A training run from loading to saving, with everything that needs torch."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerState, TrainingArguments

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import Schedule, Switch
from finetune.steps.failure import StepFailure
from finetune.steps.progress import Progress
from finetune.steps.staging import publish
from finetune.steps.train.attempts import Attempts
from finetune.steps.train.callback import Watch
from finetune.steps.train.checkpoint import Checkpoint, Checkpoints
from finetune.steps.train.examples import Collator, Examples
from finetune.steps.train.facts import differences, facts
from finetune.steps.train.isolation import require_isolated
from finetune.steps.train.plan import Plan
from finetune.steps.train.result import summary, write_model, write_record
from finetune.steps.train.samples import answers, answers_before, as_chat, chances
from finetune.steps.train.stop import StopRequest
from finetune.steps.train.trainer import ResumableTrainer

SCHEDULES = {Schedule.LINEAR: "linear", Schedule.COSINE: "cosine", Schedule.CONSTANT: "constant_with_warmup"}

NEVER = 1 << 62

log = logging.getLogger(__name__)


class Loop:
    """One attempt: resumes, trains, evaluates, saves."""

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        checkpoints: Checkpoints,
        checkpoint: Checkpoint | None,
        stop: StopRequest,
        progress: Progress | None,
    ) -> None:
        self._plan, self._layout = plan, layout
        self._checkpoints, self._checkpoint = checkpoints, checkpoint
        self._stop, self._progress = stop, progress
        self._before: list[str] = []

    def run(self) -> dict[str, Any] | None:
        """Train to the end and publish `trained/`; the result on the first rank. A StepFailure with PREEMPTED when
        asked to stop, after a checkpoint."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        started = time.monotonic()
        trainer = self._trainer()
        log.info("loading took %.1f s", time.monotonic() - started)
        self._ask_before(trainer)
        self._stop.defer()
        try:
            if self._checkpoint and self._checkpoint.step >= self._plan.steps:
                trainer.state = self._state_of(self._checkpoint)
            else:
                trainer.train(resume_from_checkpoint=str(self._checkpoint.folder) if self._checkpoint else None)
            self._evaluate_at_the_end(trainer)
        finally:
            trainer.writer.wait()  # whatever happened, the checkpoint that is being written is worth having
        if trainer.stopping:
            raise self._preempted()
        if not trainer.args.should_save:
            return None
        return publish(self._layout.trained, self._plan.inputs, lambda folder: self._save(trainer, folder))

    def _trainer(self) -> ResumableTrainer:
        plan, training = self._plan, self._plan.training
        now = facts(plan)
        run: dict[str, Any] = {
            "seconds": 0.0,
            "tokens": 0,
            "resumptions": [],
            "exact": True,
            "changes": [],
            "checkpoints": {"written": 0, "stalledSeconds": 0.0, "bytes": 0},
        }
        reseed = False
        if self._checkpoint:
            then = self._checkpoint.facts
            changed = differences(then, now)
            reseed = any(then.get(name) != now[name] for name in ("worldSize", "device"))
            former = self._checkpoint.run
            run = former | {
                "resumptions": [*former["resumptions"], self._checkpoint.step],
                "exact": former["exact"] and not changed,
                "changes": [*former["changes"], *changed],
            }
            log.info("going on after step %d%s", self._checkpoint.step, "" if run["exact"] else ", not bit-exactly")
            if changed:
                log.warning("not as when the checkpoint was written: %s", "; ".join(changed))
        cuda = torch.cuda.is_available()
        examples = Examples(self._layout.dataset / "train")
        held_out = Examples(self._layout.dataset / "validation") if plan.validation_examples else None
        model = _model(self._checkpoint.folder if self._checkpoint else plan.model)
        collator = Collator(_pad(model.config), multiple=8 if cuda else 1)
        watch = Watch(self._progress)
        trainer = ResumableTrainer(
            checkpoints=self._checkpoints,
            stop=self._stop,
            facts=now,
            run=run,
            base=plan.model,
            reseed=reseed,
            model=model,
            args=self._arguments(cuda),
            train_dataset=examples,
            eval_dataset=held_out,
            data_collator=collator,
        )
        if examples.packed:
            difference = require_isolated(trainer.model, examples, collator)
            log.info("packed examples are isolated: logits differ by %.1g at most", difference)
        trainer.remove_callback(PrinterCallback)
        watch.watch(trainer)
        log.info(
            "%d examples, %d steps of %d (%d x %d x %d devices), %s",
            len(examples),
            plan.steps,
            training.batch_size,
            training.micro_batch_size,
            plan.accumulation,
            plan.devices,
            now["device"],
        )
        return trainer

    def _arguments(self, cuda: bool) -> TrainingArguments:
        plan, training = self._plan, self._plan.training
        every = training.evaluate_every_steps if plan.validation_examples else None
        return TrainingArguments(
            output_dir=str(self._layout.checkpoints),
            use_cpu=not cuda,
            ddp_backend="gloo" if plan.devices > 1 and not cuda else None,
            ddp_find_unused_parameters=False,
            bf16=cuda and torch.cuda.is_bf16_supported(),
            max_steps=plan.steps,
            per_device_train_batch_size=training.micro_batch_size,
            per_device_eval_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=plan.accumulation,
            optim="adamw_torch_fused",
            learning_rate=training.learning_rate,
            lr_scheduler_type=SCHEDULES[training.schedule],
            warmup_steps=int(training.warmup_ratio * plan.steps + 0.5),
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            activation_checkpointing=training.gradient_checkpointing == Switch.ENABLED,
            seed=training.seed,
            data_seed=training.seed,
            train_sampling_strategy="sequential" if plan.ordered else "random",
            save_strategy="steps",
            save_steps=training.checkpoint.every_steps,
            eval_strategy="steps" if every else "no",
            eval_steps=every or NEVER,
            eval_on_start=self._owes_evaluation(every),
            logging_steps=1,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=cuda,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            log_level="warning",
        )

    def _owes_evaluation(self, every: int | None) -> bool:
        """Whether the checkpoint was written because the evaluation after its step was broken off."""
        if not every or not self._checkpoint or self._checkpoint.step % every:
            return False
        return not _evaluated(self._state_of(self._checkpoint))

    def _state_of(self, checkpoint: Checkpoint) -> Any:
        return TrainerState.load_from_json(str(checkpoint.folder / "trainer_state.json"))

    def _evaluate_at_the_end(self, trainer: ResumableTrainer) -> None:
        if trainer.stopping or not self._plan.validation_examples or _evaluated(trainer.state):
            return
        trainer.evaluate()
        if trainer.stopping:
            trainer.save_checkpoint()

    def _preempted(self) -> StepFailure:
        newest = self._checkpoints.latest()
        assert newest is not None
        return StepFailure(
            ExitCode.PREEMPTED,
            "Preempted",
            f"stopped on request after step {newest.step} of {self._plan.steps}, whose checkpoint is complete",
            "The operator goes on from there.",
            result={"steps": newest.step, "checkpoint": newest.status()},
        )

    def _save(self, trainer: ResumableTrainer, folder: Path) -> dict[str, Any]:
        model, run = trainer.accelerator.unwrap_model(trainer.model), trainer.progress()
        write_model(model, self._plan.model, folder)
        model.float()  # the weights as they were just rounded, computed with as before training
        newest = self._checkpoints.latest()
        attempts = Attempts(self._checkpoints.folder, self._plan.inputs)
        result = summary(trainer.state, run, attempts.warnings()) | ({"checkpoint": newest.status()} if newest else {})
        write_record(
            folder / "training.json", self._plan, trainer.state, run, facts(self._plan),
            attempts=attempts.entries(), samples=self._samples(model),
            probabilities=chances(model, self._plan.model, self._layout.proof),
        )  # fmt: skip
        return result

    def _samples(self, model: Any) -> list[dict[str, str]]:
        """Each prompt with both answers, the second by the weights that were just written, as they were rounded."""
        training = self._plan.training
        if training.samples is None:
            return []
        after = answers(model, self._plan.model, training.samples, chat=as_chat(training))
        triples = zip(training.samples.prompts, self._before, after, strict=True)
        return [{"prompt": prompt, "before": one, "after": other} for prompt, one, other in triples]

    def _ask_before(self, trainer: ResumableTrainer) -> None:
        """Have what the model says before training, unless a former attempt asked it."""
        plan = self._plan

        def untrained() -> Any:
            if self._checkpoint is None:
                return trainer.model
            return _model(plan.model).to(trainer.args.device)

        if plan.training.samples and trainer.args.should_save:
            where = self._layout.checkpoints
            self._before = answers_before(untrained, plan.model, plan.training, plan.inputs["model"], where)


def _model(folder: Path) -> Any:
    """The model in f32: in bf16 an update at a small learning rate is mostly rounded away."""
    both: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, loaded = both
    for problem in ("missing_keys", "mismatched_keys"):
        if loaded[problem]:
            names = ", ".join(sorted(map(str, loaded[problem]))[:5])
            raise StepFailure(
                ExitCode.BAD_DATA,
                "WeightsIncomplete",
                f"{folder}: {problem.replace('_', ' ')}: {names}",
                "The model's files do not belong together.",
            )
    return model


def _pad(config: Any) -> int:
    """Any id that exists: padding is masked, and its labels are -100."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return int(pad) if isinstance(pad, int) and pad >= 0 else 0


def _evaluated(state: Any) -> bool:
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
