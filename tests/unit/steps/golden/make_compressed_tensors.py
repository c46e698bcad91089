"""Makes compressed_tensors.safetensors: weights as the package compressed-tensors compresses them, and what it makes of
them again. It is not installed here; to make the file anew, in an environment with torch and numpy:

    pip install compressed-tensors==0.20.1  && python make_compressed_tensors.py FILE
    pip install compressed-tensors==0.10.2  && python make_compressed_tensors.py FILE g_idx     # adds the case of g_idx

The second is for columns in an order of their own (`actorder: group`), which newer versions neither write nor read.
Tensors are called CASE/NAME, the library's result CASE/expected; the configuration of CASE is in the file's metadata.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
INT = {"num_bits": 8, "type": "int"}
FOUR = {"num_bits": 4, "type": "int"}
BLOCKS = {"strategy": "block", "block_structure": [16, 16]}
ROWS = {"strategy": "channel", "symmetric": False}
GROUPS = {"strategy": "group", "group_size": 32}
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, tuple[int, int]]] = {
    "float-tensor": ("float-quantized", FLOAT | {"strategy": "tensor"}, torch.bfloat16, (24, 64)),
    "float-channel": ("float-quantized", FLOAT | {"strategy": "channel"}, torch.bfloat16, (24, 64)),
    "float-channel-f32": ("float-quantized", FLOAT | {"strategy": "channel"}, torch.float32, (24, 64)),
    "float-channel-f16": ("float-quantized", FLOAT | {"strategy": "channel"}, torch.float16, (24, 64)),
    "float-block": ("float-quantized", FLOAT | BLOCKS, torch.bfloat16, (24, 40)),
    "int-channel": ("int-quantized", INT | {"strategy": "channel", "symmetric": True}, torch.bfloat16, (24, 64)),
    "int-channel-zero": ("int-quantized", INT | ROWS, torch.bfloat16, (24, 64)),
    "pack-group": ("pack-quantized", FOUR | GROUPS | {"symmetric": True}, torch.bfloat16, (24, 64)),
    "pack-group-zero": ("pack-quantized", FOUR | GROUPS | {"symmetric": False}, torch.bfloat16, (20, 64)),
    "pack-channel-zero": ("pack-quantized", FOUR | ROWS, torch.bfloat16, (20, 44)),
    "pack-eight": ("pack-quantized", INT | ROWS, torch.bfloat16, (22, 44)),
    "pack-two": ("pack-quantized", FOUR | GROUPS | {"num_bits": 2, "symmetric": True}, torch.bfloat16, (24, 64)),
}  # fmt: skip


def extremes(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest number of each block."""
    rows, columns = weight.shape
    if args.strategy == "tensor":
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        blocks = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    blocks = weight.reshape(rows, -1, args.group_size or columns)
    return blocks.amin(2), blocks.amax(2)


def compressed() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every case, by the newest version."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    tensors, configurations = {}, {}
    for case, (form, settings, dtype, shape) in CASES.items():
        args = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        weight = torch.randn(*shape).to(dtype) * 0.02
        scale, zero = calculate_qparams(*extremes(weight, args), args)
        compressor = BaseCompressor.get_value_from_registry(form)
        state = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        expected = compressor.decompress(state, scheme)["weight"]
        tensors |= {f"{case}/{name}": torch.as_tensor(value).contiguous() for name, value in state.items()}
        tensors[f"{case}/expected"] = expected.contiguous()
        group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
        configurations[case] = json.dumps({"format": form, "config_groups": {"group_0": group}})
    return tensors, configurations


def in_an_order() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Groups of columns that do not lie side by side."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    settings = FOUR | GROUPS | {"symmetric": True, "actorder": "group"}
    args, weight = QuantizationArgs(**settings), torch.randn(24, 64).bfloat16() * 0.02
    order = torch.randperm(64)
    index = torch.empty(64, dtype=torch.int32)
    index[order] = (torch.arange(64) // 32).int()
    scale = torch.stack([weight[:, index == group].abs().amax(1) / 7 for group in (0, 1)], 1)
    compressor = PackedQuantizationCompressor()
    state = compressor.compress_weight(weight, scale, args, zero_point=torch.zeros_like(scale), g_idx=index)
    state |= {"weight_scale": scale, "weight_g_idx": index}
    state["expected"] = compressor.decompress_weight(state, args)
    group = {"targets": ["Linear"], "weights": settings}
    configuration = {"format": "pack-quantized", "config_groups": {"group_0": group}}
    return {f"pack-g_idx/{name}": value for name, value in state.items()}, {"pack-g_idx": json.dumps(configuration)}


def main(path: Path, further: bool) -> None:
    """Write the file, or add to it."""
    torch.manual_seed(0)
    tensors, configurations = in_an_order() if further else compressed()
    if further:
        tensors |= load_file(path)
        with safe_open(path, "pt") as file:
            configurations |= file.metadata()
    save_file(tensors, path, metadata=configurations)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["g_idx"])
