"""The step `reload`: the extended model proves itself before it costs GPU time.

Whoever trains or serves the model loads it with transformers, in another process: so does this step. Each new token
must be one id that comes back as its text; everything old must be as it was, bit for bit.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.api.contract import ExitCode, Layout, Step, StepJob, StepReport
from finetune.api.spec import PROBE_PROMPT
from finetune.api.status import TokenProbability, TokensStatus
from finetune.steps.inference.likelihood import Continuation, Prompts
from finetune.steps.inference.single_precision import largest_part
from finetune.steps.model_files.checkpoint import read_checkpoint
from finetune.steps.model_files.config import UNQUANTISED, quantised, read_config
from finetune.steps.reload.compare import differences
from finetune.steps.reload.proof import Proof
from finetune.steps.reload.unproven import READ, gaps
from finetune.steps.runtime.disk import in_words
from finetune.steps.runtime.failure import StepFailure
from finetune.steps.runtime.memory import available_memory
from finetune.steps.runtime.progress import Progress
from finetune.steps.token_matrices.architectures import matrices_of
from finetune.steps.tokenizer_files.agreement import TOKENIZER, around, disagreement
from finetune.steps.tokenizer_files.base import as_written
from finetune.steps.tokenizer_files.conversion import NotConvertible, converted
from finetune.steps.weight_names.correspondence import correspondence
from finetune.steps.workspace.base_model import base_model
from finetune.steps.workspace.staging import published
from finetune.steps.workspace.token_record import TokenRecord, read_record

TRANSFORMERS: Any = transformers
"""Its loaders are typed for other uses than these."""

OLD_TEXT = "Why is the sky blue? The quick brown fox jumps over 13 lazy dogs.\nÜber naïve Zeichen: 水, 火."
SHOWN = 16
"""New tokens whose probability is in the status; the proof's file has all."""

COMPARED = 64
"""New tokens of a small model whose probability is computed in the base model too: each takes two passes."""

READING = 8 << 30
"""Bytes of weights that these passes may read beyond those for the tokens that are shown."""

OVERHEAD = 1.2
"""Memory of a loaded model over the size of its weights, activations of a short text included."""

LIBRARIES = 600 << 20
"""Memory of torch and transformers themselves."""

BIDIRECTIONAL = (
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "eurobert", "megatron-bert", "modernbert", "mpnet", "nomic_bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Model types whose attention sees what comes next, unless their configuration says is_decoder."""

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""How far logits of old tokens may move, relative to the largest: a matrix product of another size sums in another
order."""

Chances = tuple[float | None, float | None]
"""The probability of a text right after a user's message, and after the generation prompt that follows it."""

log = logging.getLogger(__name__)


class NotProven(Exception):
    """A proof failed; the message says which and where."""


@dataclass(frozen=True)
class Seen:
    """What a model made of old text (every hidden state, the last logits over old ids), and what it would say next."""

    hidden: Sequence[torch.Tensor]
    logits: torch.Tensor
    chances: Sequence[Chances]


def run(job: StepJob, layout: Layout) -> StepReport:
    """Prove the extended model (or the base model, when the job adds no tokens) and report TokensStatus's parts."""
    TRANSFORMERS.utils.logging.set_verbosity_error()
    TRANSFORMERS.utils.logging.disable_progress_bar()
    folder = base_model(layout)
    records = read_record(folder)
    message = job.spec.tokens.probe_prompt if job.spec.tokens else PROBE_PROMPT
    with Progress(Step.RELOAD, "byte") as progress:
        try:
            proof, warnings = _prove(folder, layout.model if records else None, records, message, progress)
        except NotProven as error:
            raise StepFailure(
                ExitCode.BAD_DATA,
                "ReloadFailed",
                f"the model with its new tokens does not load as it should: {error}",
                "Nothing was trained. Try another base model or other tokens; if both are ordinary, report the model's "
                "name and the tokens as a fault of the operator.",
            ) from error
    if not records:
        return StepReport(step=Step.RELOAD, result={"warnings": warnings} if warnings else {})
    proof.not_proven = list(gaps(folder, layout.model, records, proof))
    proof.write(layout.proof)
    earlier = (published(folder) or {}).get("warnings", [])
    parts = TokensStatus(
        proof=proof.sentence(),
        probabilities=proof.probabilities[:SHOWN] or None,
        warnings=[*earlier, *warnings][:16] or None,
    ).wire()
    wanted = ("proof", "probabilities", "warnings")
    return StepReport(step=Step.RELOAD, result={key: value for key, value in parts.items() if key in wanted})


def _prove(
    folder: Path, base: Path | None, records: Sequence[TokenRecord], message: str, progress: Progress
) -> tuple[Proof, list[str]]:
    checkpoint = read_checkpoint(folder)
    _require_causal_language_model(folder)
    done, total = 0, (3 if base else 1) * checkpoint.size

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress.update(min(done, total), total)

    tokenizer = _tokenizer_of(folder)
    former = as_written(base) if base else tokenizer
    new_ids = {record.id for record in records}
    _prove_tokens(tokenizer, records, _vocab_size(folder))
    proof = Proof(tokens=len(records), tensors=len(checkpoint.tensors), family=read_config(folder).get("model_type"))
    if base is not None:
        _prove_alike(folder, records)
        _prove_old_text(tokenizer, former, records)
        before = read_checkpoint(base)
        matrices = matrices_of(before).names
        for difference in differences(before, checkpoint, matrices, new_ids, count):
            raise NotProven(difference)
        proof.equal_bytes = sum(tensor.size for tensor in before.tensors.values())
        proof.not_loaded = _not_loaded(folder)
    needed = int(checkpoint.size * OVERHEAD) + largest_part(checkpoint.tensors) + LIBRARIES
    free = available_memory()
    if needed > free:
        _prove_structure(folder)
        return proof, [
            f"loading the model needs {in_words(needed)} of memory, {in_words(free)} are free: its files were checked "
            "tensor by tensor, but it was not run (prepare.resources.limits.memory)"
        ]
    dtype = DTYPES.get(next(iter(checkpoint.tensors.values())).dtype, torch.float32)
    old_ids = torch.tensor([id_ for id_ in range(_vocab_size(base or folder)) if id_ not in new_ids])
    ids = former(OLD_TEXT)["input_ids"]
    prompts = Prompts.of(tokenizer, message)
    listed = [record for record in records if record.piece is None]  # learned pieces come up within words
    seen = _run(folder, dtype, ids, old_ids, prompts, [[record.id] for record in listed])
    proof.was_run = True
    count(checkpoint.size)
    if base is not None:
        compared = listed[: max(SHOWN, min(COMPARED, READING // checkpoint.size))]
        pieces = [former.encode(record.content, add_special_tokens=False) for record in compared]
        was = _run(base, dtype, ids, old_ids, Prompts.of(former, message), pieces)
        count(checkpoint.size)
        proof.moved = _prove_equal(was, seen, dtype)
        proof.equal_states = len(seen.hidden)
        proof.message = message
        proof.probabilities = list(_probabilities(listed, was.chances, seen.chances))
    return proof, []


def _tokenizer_of(folder: Path) -> Any:
    try:
        return TRANSFORMERS.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # classes raise what they like, and the first line may be empty
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        if not (folder / TOKENIZER).is_file():
            try:
                converted(folder)
            except NotConvertible as more:
                reason = str(more)
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "UnsupportedTokenizer",
            f"spec.model: transformers cannot load its tokenizer: {reason}",
            "Use a model that ships a tokenizer.json which transformers loads.",
        ) from error


def _require_causal_language_model(folder: Path) -> None:
    try:
        config = TRANSFORMERS.AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise _unsupported(f"transformers does not know it: {str(error).partition(chr(10))[0]}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(
            f"{config.model_type!r} is an encoder-decoder, which answers with another part than it reads"
        )
    if config.model_type in BIDIRECTIONAL and not getattr(config, "is_decoder", False):
        raise _unsupported(f"{config.model_type!r} is a bidirectional encoder: it fills gaps and writes no text")
    if how := quantised(read_config(folder)):
        raise StepFailure(
            ExitCode.BAD_CONFIGURATION,
            "QuantisedModel",
            f"spec.model: its weights are quantised ({how}), and what is trained could not be written so that it loads",
            UNQUANTISED,
        )
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
    """Each new token is one id, comes back as its text, and has a row. A learned piece is one id within words."""
    for record in records:
        if record.piece is not None:
            _prove_learned(tokenizer, record, record.piece, rows)
            continue
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


def _prove_learned(tokenizer: Any, record: TokenRecord, piece: str, rows: int) -> None:
    """A learned piece has the id and the row that it was given, and its text survives, whatever pieces it gets."""
    if (known := tokenizer.convert_ids_to_tokens(record.id)) != piece:
        raise NotProven(f"the learned piece {piece!r} has id {record.id}, which the tokenizer knows as {known!r}")
    if record.id >= rows:
        raise NotProven(f"{piece!r} has id {record.id}, the embedding only {rows} rows")
    ids = tokenizer.encode(record.content, add_special_tokens=False)
    back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if back.removeprefix(" ") != record.content.removeprefix(" "):
        raise NotProven(f"the learned piece {record.content!r} comes back as {back!r}")


def _prove_alike(folder: Path, records: Sequence[TokenRecord]) -> None:
    """transformers, with whom the model is trained, and tokenizer.json, with which it is served, give the same ids."""
    texts = around(record.content for record in records[:READ] if record.piece is None)
    if (folder / TOKENIZER).is_file() and (left := disagreement(folder, texts)) is not None:
        raise NotProven(f"its tokenizer's files disagree: {left}")


def _prove_old_text(tokenizer: Any, base: Any, records: Sequence[TokenRecord]) -> None:
    """Text without new tokens is encoded as before."""
    has_new = any(record.content in OLD_TEXT for record in records if record.piece is None)
    has_new |= not {record.id for record in records}.isdisjoint(tokenizer(OLD_TEXT)["input_ids"])
    if not has_new and tokenizer(OLD_TEXT)["input_ids"] != base(OLD_TEXT)["input_ids"]:
        raise NotProven("text without new tokens is encoded differently than before")


def _not_loaded(folder: Path) -> tuple[str, ...]:
    """The tensors of the files that the model in memory has no place for, proven to be those by transformers' rules."""
    return correspondence(folder).not_loaded


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
    prompts: Prompts,
    continuations: Sequence[Sequence[int]],
) -> Seen:
    with _loaded(folder, dtype) as model:
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        if not bool(torch.isfinite(output.logits).all()):
            raise NotProven(f"{folder.name}/ gives logits that are not finite")
        return Seen(
            [state.clone() for state in output.hidden_states],
            output.logits[0, -1, old_ids].float().clone(),
            _chances(model, prompts, continuations) if continuations else [],
        )


def _chances(model: Any, prompts: Prompts, continuations: Sequence[Sequence[int]]) -> list[Chances]:
    """How likely each continuation is at the two places where templates may put it; None where it has no ids."""
    plain = Continuation(model, prompts.plain)
    generation = None if prompts.generation is None else Continuation(model, prompts.generation)
    return [
        (plain.probability(ids), None if generation is None else generation.probability(ids)) if ids else (None, None)
        for ids in continuations
    ]


def _probabilities(
    records: Sequence[TokenRecord], before: Sequence[Chances], after: Sequence[Chances]
) -> Iterator[TokenProbability]:
    for index, record in enumerate(records):
        was = before[index] if index < len(before) else (None, None)
        yield TokenProbability(
            token=record.content,
            without_prompt=after[index][0],
            with_prompt=after[index][1],
            without_prompt_before=was[0],
            with_prompt_before=was[1],
        )


def _prove_equal(before: Seen, after: Seen, dtype: torch.dtype) -> float:
    """The hidden states of old text are equal to the last bit, logits over old ids nearly: by how much they moved."""
    for layer, (old, new) in enumerate(zip(before.hidden, after.hidden, strict=True)):
        if not torch.equal(old, new):
            raise NotProven(f"hidden states of old text differ after layer {layer}")
    moved = float((before.logits - after.logits).abs().max() / before.logits.abs().max().clamp_min(1e-9))
    if moved > TOLERANCE[dtype]:
        raise NotProven(
            f"logits of old tokens moved by {moved:.2g} of the largest, at most {TOLERANCE[dtype]} is noise"
        )
    return moved
