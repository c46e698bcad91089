"""The step `reload`: the extended model proves itself before it costs GPU time.

Whoever trains or serves the model loads it with transformers, in another process: so does this step. Each new token
must be one id that comes back as its text; everything old must be as it was, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.status import TokenProbability, TokensStatus
from finetune.steps.base import base_model
from finetune.steps.disk import in_words
from finetune.steps.failure import StepFailure
from finetune.steps.memory import available_memory
from finetune.steps.progress import Progress
from finetune.steps.staging import published
from finetune.steps.tokens.architectures import matrices_of
from finetune.steps.tokens.checkpoint import read_checkpoint
from finetune.steps.tokens.compare import differences
from finetune.steps.tokens.config import read_config
from finetune.steps.tokens.record import TokenRecord, read_record

TRANSFORMERS: Any = transformers
"""Its loaders are typed for other uses than these."""

QUESTION = "Why is the sky blue?"
OLD_TEXT = f"{QUESTION} The quick brown fox jumps over 13 lazy dogs.\nÜber naïve Zeichen: 水, 火."
SHOWN = 16
"""New tokens whose probability is reported."""

OVERHEAD = 1.2
"""Memory of a loaded model over the size of its weights, activations of a short text included."""

LIBRARIES = 600 << 20
"""Memory of torch and transformers themselves."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""How far logits of old tokens may move, relative to the largest: a matrix product of another size sums in another
order."""

log = logging.getLogger(__name__)


class NotProven(Exception):
    """A proof failed; the message says which and where."""


@dataclass(frozen=True)
class Seen:
    """What a model made of old text: every hidden state, the last logits over old ids, and new tokens' chances."""

    hidden: Sequence[torch.Tensor]
    logits: torch.Tensor
    probabilities: Sequence[TokenProbability]


def run(job: StepJob, layout: Layout) -> StepReport:
    """Prove the extended model (or the base model, when the job adds no tokens) and report TokensStatus's parts."""
    TRANSFORMERS.utils.logging.set_verbosity_error()
    TRANSFORMERS.utils.logging.disable_progress_bar()
    folder = base_model(layout)
    records = read_record(folder)
    with Progress(Step.RELOAD, "byte") as progress:
        try:
            probabilities, warnings = _prove(folder, layout.model if records else None, records, progress)
        except NotProven as error:
            raise StepFailure(
                ExitCode.BAD_DATA,
                "ReloadFailed",
                f"the model with its new tokens does not load as it should: {error}",
                "Nothing was trained. Try another base model or other tokens; if both are ordinary, report the model's "
                "name and the tokens as a fault of the operator.",
            ) from error
    earlier = (published(folder) or {}).get("warnings", []) if records else []
    parts = TokensStatus(probabilities=probabilities or None, warnings=[*earlier, *warnings][:16] or None).wire()
    return StepReport(
        step=Step.RELOAD, result={key: value for key, value in parts.items() if key in ("probabilities", "warnings")}
    )


def _prove(
    folder: Path, base: Path | None, records: Sequence[TokenRecord], progress: Progress
) -> tuple[list[TokenProbability], list[str]]:
    checkpoint = read_checkpoint(folder)
    _require_causal_language_model(folder)
    done, total = 0, (3 if base else 1) * checkpoint.size

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress.update(min(done, total), total)

    tokenizer = TRANSFORMERS.AutoTokenizer.from_pretrained(folder)
    new_ids = {record.id for record in records}
    _prove_tokens(tokenizer, records, _vocab_size(folder))
    if base is not None:
        _prove_old_text(tokenizer, TRANSFORMERS.AutoTokenizer.from_pretrained(base), records)
        before = read_checkpoint(base)
        matrices = matrices_of(before).names
        for difference in differences(before, checkpoint, matrices, new_ids, count):
            raise NotProven(difference)
    needed, free = int(checkpoint.size * OVERHEAD) + LIBRARIES, available_memory()
    if needed > free:
        _prove_structure(folder)
        return [], [
            f"loading the model needs {in_words(needed)} of memory, {in_words(free)} are free: its files were checked "
            "tensor by tensor, but it was not run (prepare.resources.limits.memory)"
        ]
    dtype = DTYPES.get(next(iter(checkpoint.tensors.values())).dtype, torch.float32)
    old_ids = torch.tensor([id_ for id_ in range(_vocab_size(base or folder)) if id_ not in new_ids])
    ids = (TRANSFORMERS.AutoTokenizer.from_pretrained(base) if base else tokenizer)(OLD_TEXT)["input_ids"]
    seen = _run(folder, dtype, ids, old_ids, tokenizer, records[:SHOWN])
    count(checkpoint.size)
    if base is not None:
        _prove_equal(_run(base, dtype, ids, old_ids, None, ()), seen, dtype)
        count(checkpoint.size)
    return list(seen.probabilities), []


def _require_causal_language_model(folder: Path) -> None:
    try:
        config = TRANSFORMERS.AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise _unsupported(f"transformers does not know it: {str(error).partition(chr(10))[0]}") from error
    if type(config) not in TRANSFORMERS.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unsupported(f"transformers has no causal language model for the model_type {config.model_type!r}")


def _unsupported(what: str) -> StepFailure:
    return StepFailure(
        ExitCode.BAD_CONFIGURATION,
        "UnsupportedModel",
        f"spec.model: {what}",
        "Use a model that makes text from text; of a model of several parts, its language model alone.",
    )


def _vocab_size(folder: Path) -> int:
    return int(read_config(folder)["vocab_size"])


def _prove_tokens(tokenizer: Any, records: Sequence[TokenRecord], rows: int) -> None:
    """Each new token is one id, comes back as its text, and has a row."""
    for record in records:
        ids = tokenizer.encode(record.content, add_special_tokens=False)
        if ids != [record.id]:
            raise NotProven(f"{record.content!r} is encoded as {ids[:8]}, not as its one id {record.id}")
        if record.id >= rows:
            raise NotProven(f"{record.content!r} has id {record.id}, the embedding only {rows} rows")
        # decoded after itself: some decoders take a space off the front of a text
        text = tokenizer.decode(
            [*ids, *ids], skip_special_tokens=not record.special, clean_up_tokenization_spaces=False
        )
        if text not in (record.content * 2, (record.content * 2).removeprefix(" ")):
            raise StepFailure(
                ExitCode.BAD_CONFIGURATION,
                "TokenNotDecodable",
                f"{record.content!r} is one token, but transformers' class for this model "
                f"({type(tokenizer).__name__}) decodes it as {tokenizer.decode(ids)!r}",
                f"Write the token with the space before it ({' ' + record.content!r}): that comes back whole.",
            )


def _prove_old_text(tokenizer: Any, base: Any, records: Sequence[TokenRecord]) -> None:
    """Text without new tokens is encoded as before."""
    if not any(record.content in OLD_TEXT for record in records) and tokenizer(OLD_TEXT) != base(OLD_TEXT):
        raise NotProven("text without new tokens is encoded differently than before")


def _prove_structure(folder: Path) -> None:
    """The files hold the tensors that the architecture asks for, in their shapes. Takes no memory for weights."""
    with _loaded(folder, "auto", device_map="meta"):
        pass


@contextlib.contextmanager
def _loaded(folder: Path, dtype: torch.dtype | str, **options: Any) -> Iterator[Any]:
    model, info = TRANSFORMERS.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise NotProven(f"{folder.name}/ does not load strictly: {what} {sorted(map(str, info[what]))[:4]}")
    if info.get("unexpected_keys"):
        log.warning("%s: transformers has no use for %s", folder, sorted(info["unexpected_keys"])[:8])
    model.eval()
    try:
        with torch.inference_mode():
            yield model
    finally:
        del model
        gc.collect()


def _run(
    folder: Path,
    dtype: torch.dtype,
    ids: Sequence[int],
    old_ids: torch.Tensor,
    tokenizer: Any,
    records: Sequence[TokenRecord],
) -> Seen:
    with _loaded(folder, dtype) as model:
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        if not bool(torch.isfinite(output.logits).all()):
            raise NotProven(f"{folder.name}/ gives logits that are not finite")
        chances = _probabilities(model, tokenizer, records) if records else []
        return Seen(
            [state.clone() for state in output.hidden_states], output.logits[0, -1, old_ids].float().clone(), chances
        )


def _probabilities(model: Any, tokenizer: Any, records: Sequence[TokenRecord]) -> list[TokenProbability]:
    """How likely each new token is right after a question, at the two places where templates may put it."""
    without, with_prompt = _next_token(model, tokenizer, prompt=False), _next_token(model, tokenizer, prompt=True)
    return [
        TokenProbability(
            token=record.content,
            without_prompt=_six_digits(without[record.id]),
            with_prompt=None if with_prompt is None else _six_digits(with_prompt[record.id]),
        )
        for record in records
    ]


def _next_token(model: Any, tokenizer: Any, *, prompt: bool) -> Any:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        encoded: Mapping[str, Any] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, return_tensors="pt", return_dict=True
        )
    elif prompt:
        return None
    else:
        encoded = tokenizer(QUESTION, return_tensors="pt")
    logits = model(input_ids=encoded["input_ids"], use_cache=False).logits
    return torch.softmax(logits[0, -1].double(), dim=-1)


def _six_digits(value: torch.Tensor) -> float:
    return float(f"{value.item():.6g}")


def _prove_equal(before: Seen, after: Seen, dtype: torch.dtype) -> None:
    """The hidden states of old text are equal to the last bit, logits over old ids nearly."""
    for layer, (old, new) in enumerate(zip(before.hidden, after.hidden, strict=True)):
        if not torch.equal(old, new):
            raise NotProven(f"hidden states of old text differ after layer {layer}")
    moved = float((before.logits - after.logits).abs().max() / before.logits.abs().max().clamp_min(1e-9))
    if moved > TOLERANCE[dtype]:
        raise NotProven(
            f"logits of old tokens moved by {moved:.2g} of the largest, at most {TOLERANCE[dtype]} is noise"
        )
