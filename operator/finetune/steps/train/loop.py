"""A training run from loading to saving, with everything that needs torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerState, TrainingArguments

from finetune.api.contract import ExitCode, Layout
from finetune.api.spec import EarlyStopping, Method, Objective, Optimizer, Preference, Schedule, Switch
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.progress import Progress
from finetune.steps.train.checkpoints.checkpoint import Checkpoint, Checkpoints
from finetune.steps.train.checkpoints.facts import differences, facts
from finetune.steps.train.data.culprits import Culprits
from finetune.steps.train.data.examples import Collator, Examples
from finetune.steps.train.data.isolation import require_isolated
from finetune.steps.train.distributed.sharing import sharing_of
from finetune.steps.train.methods.average import WeightAverage
from finetune.steps.train.methods.merging import adapted_layers, weights_adapted
from finetune.steps.train.methods.model import (
    is_adapted,
    loaded,
    model_of,
    new_rows_moved,
    require_no_bias,
    trained_weights,
    write_weights,
)
from finetune.steps.train.methods.neutral import require_neutral
from finetune.steps.train.methods.targets import beyond_text, in_short, left_out, tensors_in_short
from finetune.steps.train.methods.whole import require_home, round_as_written, write_whole
from finetune.steps.train.phase import Phase, PhaseName
from finetune.steps.train.plan import Plan
from finetune.steps.train.reporting.attempts import Attempts
from finetune.steps.train.reporting.callback import Watch
from finetune.steps.train.reporting.history import STATE, WarmupHistory, joined
from finetune.steps.train.reporting.result import summary, write_beside_weights, write_record
from finetune.steps.train.reporting.samples import Answer, answers, answers_before, as_chat, chances, endless
from finetune.steps.train.stop import StopRequest
from finetune.steps.train.trainer.early_stopping import StopEarly, exhausted
from finetune.steps.train.trainer.preference import PairCollator, Pairs, PreferenceTrainer, Reference
from finetune.steps.train.trainer.resumable import ResumableTrainer
from finetune.steps.weight_names.correspondence import Correspondence, correspondence
from finetune.steps.workspace.merge_record import write_merge_record
from finetune.steps.workspace.staging import publish
from finetune.steps.workspace.training_data import TRAIN, VALIDATION

SCHEDULES = {Schedule.LINEAR: "linear", Schedule.COSINE: "cosine", Schedule.CONSTANT: "constant_with_warmup"}
OPTIMIZERS = {Optimizer.ADAMW: "adamw_torch_fused", Optimizer.ADAMW_8BIT: "adamw_bnb_8bit"}

NEVER = 1 << 62

log = logging.getLogger(__name__)


class Loop:
    """One attempt: resumes, trains phase after phase, evaluates, saves."""

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
        self._stop, self._watch = stop, Watch(progress)
        self._cuda = torch.cuda.is_available()
        self._facts = facts(plan)
        self._run: dict[str, Any] = {
            "seconds": 0.0,
            "tokens": 0,
            "resumptions": [],
            "exact": True,
            "changes": [],
            "checkpoints": {"written": 0, "stalledSeconds": 0.0, "bytes": 0},
        }
        self._reseed = False
        self._warmup: WarmupHistory | None = None
        self._before: list[str] = []

    def run(self) -> dict[str, Any] | None:
        """Train to the end and publish `trained/`; the result on the first rank. A StepFailure with PREEMPTED when
        asked to stop, after a checkpoint."""
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        if self._plan.training.method == Method.FULL:
            require_home(self._names)
        if self._checkpoint:
            self._resume(self._checkpoint)
        done = self._checkpoint.step if self._checkpoint else 0
        for phase in self._plan.phases[:-1]:
            if done < phase.last:
                self._run = self._trained(phase).progress()
                self._checkpoint = self._checkpoints.latest()
        trainer = self._trained(self._plan.phases[-1])
        model = trainer.whole_model()
        if not trainer.args.should_save:
            return None
        return publish(self._layout.trained, self._plan.inputs, lambda folder: self._save(trainer, model, folder))

    @cached_property
    def _names(self) -> Correspondence:
        """How the base's files and the model in memory belong together."""
        return correspondence(self._plan.model)

    def _resume(self, checkpoint: Checkpoint) -> None:
        then, former = checkpoint.facts, checkpoint.run
        changed = differences(then, self._facts)
        self._reseed = any(then.get(name) != self._facts[name] for name in ("worldSize", "device"))
        self._run = former | {
            "resumptions": [*former["resumptions"], checkpoint.step],
            "exact": former["exact"] and not changed,
            "changes": [*former["changes"], *changed],
        }
        log.info("going on after step %d%s", checkpoint.step, "" if self._run["exact"] else ", not bit-exactly")
        if changed:
            log.warning("not as when the checkpoint was written: %s", "; ".join(changed))

    def _trained(self, phase: Phase) -> ResumableTrainer:
        """Train a phase, from the checkpoint inside it if there is one."""
        started = time.monotonic()
        inside = self._checkpoint if self._checkpoint and self._checkpoint.step > phase.first else None
        state = _state_of(inside) if inside else None
        trainer = self._trainer(phase, inside, state)
        log.info("%s: loading took %.1f s", phase.name, time.monotonic() - started)
        self._ask_before(trainer)
        self._stop.defer()
        try:
            if state and self._is_over(phase, state):
                trainer.state = state
                if trainer.average:
                    trainer.average.follow(trainer.model)
            else:
                trainer.train(resume_from_checkpoint=str(inside.folder) if inside else None)
            self._evaluate_at_the_end(trainer)
        finally:
            trainer.writer.wait()  # whatever happened, the checkpoint that is being written is worth having
        if trainer.stopping:
            raise self._preempted()
        if is_adapted(model := trainer.accelerator.unwrap_model(trainer.model)):
            log.info("%s: of %d new rows moved: %s", phase.name, len(self._plan.new_rows), new_rows_moved(model))
        return trainer

    def _is_over(self, phase: Phase, state: Any) -> bool:
        rule = self._rule(phase)
        return state.global_step >= phase.steps or (rule is not None and exhausted(state.log_history, rule))

    def _rule(self, phase: Phase) -> EarlyStopping | None:
        return self._plan.training.early_stopping if phase.name == PhaseName.TRAINING else None

    def _trainer(self, phase: Phase, inside: Checkpoint | None, state: Any) -> ResumableTrainer:
        plan, training = self._plan, self._plan.training
        main = phase.name == PhaseName.TRAINING
        names = (TRAIN, VALIDATION) if plan.validation_examples else (TRAIN,)
        parts = {name: Examples(self._layout.dataset / name) for name in names}
        arguments = self._arguments(phase, state)
        log.info("training on %s", arguments.device)  # asking for it has the ranks find each other
        sharing = sharing_of(training.parallelism, plan.devices)
        model = model_of(plan, phase, self._checkpoint, sharing.loading())
        collator = Collator(_pad(model.config), multiple=8 if self._cuda else 1)
        if main and phase.first:
            assert self._checkpoint is not None
            self._warmup = WarmupHistory.up_to(phase, self._checkpoint)
        average = (
            WeightAverage(training.ema.decay, inside.folder if inside else None) if training.ema and main else None
        )
        options: dict[str, Any] = {
            "phase": phase,
            "total": plan.steps,
            "checkpoints": self._checkpoints,
            "sharing": sharing,
            "stop": self._stop,
            "facts": self._facts,
            "run": self._run,
            "base": plan.model,
            "culprits": Culprits(parts[TRAIN], plan.model, plan.sources),
            "average": average,
            "pieces": [self._warmup] if self._warmup else [],
            "reseed": self._reseed,
            "model": model,
            "args": arguments,
        }
        if training.objective == Objective.PREFERENCE:
            trainer = _preference_trainer(training.preference, parts, collator, inside, options)
        else:
            trainer = ResumableTrainer(
                train_dataset=parts[TRAIN], eval_dataset=parts.get(VALIDATION), data_collator=collator, **options
            )
        if parts[TRAIN].packed and training.objective != Objective.PREFERENCE:
            difference = require_isolated(trainer.model, parts[TRAIN], collator)
            log.info("packed examples are isolated: logits differ by %.1g at most", difference)
        if is_adapted(model):
            self._require_publishable(model, phase)
            if inside is None and training.method != Method.QLORA:  # 4-bit layers that were asked in eval stay packed
                log.info("the adapter begins neutral: %.1g", require_neutral(trainer.model, plan.new_rows))
        trainer.remove_callback(PrinterCallback)
        if rule := self._rule(phase):
            trainer.add_callback(StopEarly(rule))
        self._watch.watch(trainer)
        log.info(
            "%s: %d examples, %d steps of %d (%d x %d x %d devices), %s",
            phase.name,
            plan.examples,
            phase.steps,
            training.batch_size,
            training.micro_batch_size,
            plan.accumulation,
            plan.devices,
            self._facts["device"],
        )
        return trainer

    def _require_publishable(self, model: Any, phase: Phase) -> None:
        if phase.name != PhaseName.TRAINING:
            return
        if self._plan.merges:
            adapted_layers(model, self._names)
        elif self._plan.new_rows:
            require_no_bias(model)

    def _scope(self, model: Any) -> dict[str, list[str]]:
        """What was trained and what was not, for status and record."""
        skeleton, scope = self._names.model, {}
        untouched = list(self._names.not_loaded)
        if is_adapted(model):
            adapted = weights_adapted(model)
            scope = {"adapted": in_short(adapted), "leftOut": in_short(left_out(skeleton, adapted))}
        else:
            untouched += beyond_text(skeleton)
        return {name: lines for name, lines in (scope | {"notTrained": tensors_in_short(untouched)}).items() if lines}

    def _arguments(self, phase: Phase, state: Any) -> TrainingArguments:
        plan, training, cuda = self._plan, self._plan.training, self._cuda
        every = training.evaluate_every_steps if plan.validation_examples else None
        return TrainingArguments(
            output_dir=str(self._layout.checkpoints),
            use_cpu=not cuda,
            ddp_backend="gloo" if plan.devices > 1 and not cuda else None,
            ddp_find_unused_parameters=False,
            bf16=cuda and torch.cuda.is_bf16_supported(),
            max_steps=phase.steps,
            per_device_train_batch_size=training.micro_batch_size,
            per_device_eval_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=plan.accumulation,
            optim=OPTIMIZERS[training.optimizer],
            learning_rate=phase.learning_rate,
            lr_scheduler_type=SCHEDULES[phase.schedule],
            warmup_steps=phase.rising,
            weight_decay=phase.weight_decay,
            max_grad_norm=training.max_grad_norm,
            activation_checkpointing=training.gradient_checkpointing == Switch.ENABLED,
            seed=training.seed,
            data_seed=training.seed,
            train_sampling_strategy="sequential" if plan.ordered else "random",
            save_strategy="steps",
            save_only_model=True,  # the trainer's word for "I save what there is myself", as ours does
            save_steps=training.checkpoint.every_steps,
            eval_strategy="steps" if every else "no",
            eval_steps=every or NEVER,
            # whether the checkpoint was written because the evaluation after its step was broken off
            eval_on_start=bool(every and state and state.global_step % every == 0 and not _evaluated(state)),
            logging_steps=1,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=cuda,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            log_level="warning",
        )

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

    def _save(self, trainer: ResumableTrainer, model: Any, folder: Path) -> dict[str, Any]:
        run = trainer.progress()
        newest = self._checkpoints.latest()
        attempts = Attempts(self._checkpoints.folder, self._plan.inputs)
        said: list[Answer] = []
        history = joined(self._warmup, trainer.phase, trainer.state.log_history)
        scope = self._scope(model)
        with trainer.average.applied() if trainer.average else nullcontext():
            if is_adapted(model):
                run["newRowsMoved"] = new_rows_moved(model)
                write_weights(model, trained_weights(model), folder)
                if self._plan.merges:
                    write_merge_record(folder, adapted_layers(model, self._names))
            else:
                round_as_written(model, self._names)
                write_whole(model, self._names, self._plan.model, folder)
            write_beside_weights(self._plan.model, folder)
            said = self._answers(model)
            write_record(
                folder, self._plan, trainer.step, history, run, self._facts,
                attempts=attempts.ended(), samples=self._samples(said),
                probabilities=chances(model, self._plan.model, self._layout.proof),
                **scope,
            )  # fmt: skip
        samples = self._plan.training.samples
        unended = endless(said, samples.max_tokens) if samples and as_chat(self._plan.training) else []
        result = summary(trainer.state, trainer.phase, run, [*attempts.warnings(), *unended]) | scope
        return result | ({"checkpoint": newest.status()} if newest else {})

    def _answers(self, model: Any) -> list[Answer]:
        """What the model says by the weights that were just written, as they were rounded."""
        training = self._plan.training
        if training.samples is None:
            return []
        return answers(model, self._plan.model, training.samples, self._plan.ends, chat=as_chat(training))

    def _samples(self, said: Sequence[Answer]) -> list[dict[str, str]]:
        """Each prompt with both answers."""
        samples = self._plan.training.samples
        triples = zip(samples.prompts, self._before, said, strict=True) if samples else ()
        return [{"prompt": prompt, "before": one, "after": other.text} for prompt, one, other in triples]

    def _ask_before(self, trainer: ResumableTrainer) -> None:
        """Have what the model says before training, unless a former attempt asked it."""
        plan = self._plan

        def untrained() -> Any:
            if self._checkpoint is None and not trainer.sharing.together:
                return trainer.model
            return loaded(plan.model).to(trainer.args.device)

        if plan.training.samples and trainer.args.should_save and not self._before:
            where = self._layout.checkpoints
            self._before = answers_before(untrained, plan.model, plan.training, plan.inputs["model"], where, plan.ends)


def _preference_trainer(
    settings: Preference | None,
    examples: Mapping[str, Examples],
    collator: Collator,
    inside: Checkpoint | None,
    options: dict[str, Any],
) -> ResumableTrainer:
    parts = {name: Pairs(rows) for name, rows in examples.items()}
    reference = Reference(parts)
    trainer = PreferenceTrainer(
        beta=(settings or Preference()).beta,
        reference=reference,
        train_dataset=parts[TRAIN],
        eval_dataset=parts.get(VALIDATION),
        data_collator=PairCollator(collator),
        **options,
    )
    if inside:
        reference.load(inside.folder)
    else:
        reference.measure(trainer)
    return trainer


def _state_of(checkpoint: Checkpoint) -> Any:
    return TrainerState.load_from_json(str(checkpoint.folder / STATE))


def _pad(config: Any) -> int:
    """Any id that exists: padding is masked, and its labels are -100."""
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    return int(pad) if isinstance(pad, int) and pad >= 0 else 0


def _evaluated(state: Any) -> bool:
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
