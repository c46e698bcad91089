"""Tiny checkpoints as quantised models are published: the tensors, names and configurations of each method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.unit.steps.families import edit_config, edit_tensors, tiny_of
from tests.unit.steps.published import with_prediction_layer

E4M3 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor], Tensors]


def mxfp4(folder: Path, **sizes: Any) -> Path:
    """gpt-oss: experts in blocks of 32 numbers, the rest in bf16."""
    tiny_of(folder, "gpt_oss", **({"hidden_size": 64, "intermediate_size": 64} | sizes))

    def blocks(name: str, value: torch.Tensor) -> Tensors:
        if value.ndim != 3 or "bias" in name:
            return {name: value}
        experts, inputs, outputs = value.shape
        return {
            f"{name}_blocks": torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8),
            f"{name}_scales": torch.randint(118, 122, (experts, outputs, inputs // 32), dtype=torch.uint8),
        }

    unquantised = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _changed(folder, blocks, {"quant_method": "mxfp4", "modules_to_not_convert": unquantised})


def fp8_blocks(folder: Path, family: str = "qwen3", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Qwen3 (bf16 scales) and DeepSeek-V3 (f32): blocks of 128 rows and columns."""
    if family == "deepseek_v3":
        with_prediction_layer(folder, family, copies=True)
    else:
        tiny_of(folder, family, hidden_size=128, intermediate_size=256)

    def blocks(name: str, value: torch.Tensor) -> Tensors:
        if not _is_linear(name, value) or "mlp.gate." in name:
            return {name: value}
        rows, columns = value.shape
        padded = torch.nn.functional.pad(value.float(), (0, -columns % 128, 0, -rows % 128))
        cells = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
        scales = (cells.abs().amax((1, 3)) / 448).to(dtype)
        codes = (cells / scales.float()[:, None, :, None]).clamp(-448, 448).reshape(padded.shape)[:rows, :columns]
        return {name: codes.to(E4M3), f"{name}_scale_inv": scales}

    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return _changed(folder, blocks, settings)


def fp8_tensors(folder: Path) -> Path:
    """Ministral 3: one scale for each weight, and one for what goes into it."""
    tiny_of(folder, "mistral", intermediate_size=128)

    def scaled(name: str, value: torch.Tensor) -> Tensors:
        if not _is_linear(name, value):
            return {name: value}
        scale = (value.float().abs().max() / 448).bfloat16()
        codes = (value.float() / scale.float()).clamp(-448, 448).to(E4M3)
        activations = {f"{name.removesuffix('weight')}activation_scale": torch.tensor(0.5, dtype=torch.bfloat16)}
        return {name: codes, f"{name}_scale_inv": scale} | activations

    settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    return _changed(folder, scaled, settings)


def bitsandbytes(folder: Path, **settings: Any) -> Path:
    """As transformers quantises and saves a Llama on this processor."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_of(folder, "llama", intermediate_size=128)
    config = BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder)
    return folder


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
EIGHT = {"load_in_8bit": True}


def compressed_tensors(folder: Path, kind: str) -> Path:
    """llm-compressor's Llama: `FP8` (a scale for each row), `W8A8` (integers), `W4A16` (packed, groups of 32 with zero
    points)."""
    tiny_of(folder, "llama", intermediate_size=128)
    weights: dict[str, Any] = {
        "FP8": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        "W8A8": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        "W4A16": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    }[kind]
    form = {"FP8": "float-quantized", "W8A8": "int-quantized", "W4A16": "pack-quantized"}[kind]

    def compressed(name: str, value: torch.Tensor) -> Tensors:
        if not _is_linear(name, value):
            return {name: value}
        if kind == "W4A16":
            return _packed(name, value)
        largest, dtype = (448, E4M3) if kind == "FP8" else (127, torch.int8)
        scale = (value.float().abs().amax(1, keepdim=True) / largest).bfloat16()
        codes = (value.float() / scale.float()).clamp(-largest, largest)
        return {name: (codes if kind == "FP8" else codes.round()).to(dtype), f"{name}_scale": scale}

    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    return _changed(folder, compressed, settings)


def _packed(name: str, value: torch.Tensor) -> Tensors:
    rows, columns = value.shape
    cells = value.float().reshape(rows, columns // 32, 32)
    scale = ((cells.amax(2) - cells.amin(2)) / 15).bfloat16()
    zero = (-cells.amin(2) / scale.float()).round().clamp(0, 15)
    codes = (cells / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).reshape(rows, columns)
    return {
        f"{name}_packed": pack(codes),
        f"{name}_scale": scale,
        f"{name}_zero_point": pack(zero.T).T.contiguous(),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight codes of four bits in a word, along the rows."""
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[1] % 8))
    words = (padded.reshape(len(codes), -1, 8) << 4 * torch.arange(8)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def sharded(folder: Path, shard_of: Callable[[str], int]) -> Path:
    """The single-file checkpoint in several files, each tensor where `shard_of` says."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{shard_of(name):05}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
        (folder / file).chmod(0o644)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


KINDS: Mapping[str, Callable[[Path], Path]] = {
    "gpt_oss (MXFP4)": mxfp4,
    "qwen3 (FP8)": fp8_blocks,
    "deepseek_v3 (FP8)": lambda folder: fp8_blocks(folder, "deepseek_v3", torch.float32),
    "mistral (FP8, a scale each)": fp8_tensors,
    "llama (bitsandbytes nf4)": lambda folder: bitsandbytes(folder, **NF4),
    "llama (bitsandbytes fp4)": lambda folder: bitsandbytes(folder, **FP4),
    "llama (bitsandbytes int8)": lambda folder: bitsandbytes(folder, **EIGHT),
    "llama (compressed-tensors FP8)": lambda folder: compressed_tensors(folder, "FP8"),
    "llama (compressed-tensors W8A8)": lambda folder: compressed_tensors(folder, "W8A8"),
    "llama (compressed-tensors W4A16)": lambda folder: compressed_tensors(folder, "W4A16"),
}
"""Every published form that can be written out, by model_type and method."""


def _is_linear(name: str, value: torch.Tensor) -> bool:
    plain = ("embed_tokens", "lm_head", "shared_head", "norm")
    return value.ndim == 2 and name.endswith("weight") and not any(part in name for part in plain)


def _changed(folder: Path, change: Change, settings: dict[str, Any]) -> Path:
    torch.manual_seed(1)
    edit_tensors(
        folder, lambda held: {new: v for name, value in held.items() for new, v in change(name, value).items()}
    )
    edit_config(folder, quantization_config=settings)
    return folder
