"""Quantised weights are written out as the methods' own libraries read them, rounded once, and none is passed over."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.api.contract import ExitCode
from finetune.steps.dequantisation import weights as dequantised_weights
from finetune.steps.dequantisation.codes import E4M3, FP4, NF4
from finetune.steps.dequantisation.weights import NotDequantisable
from finetune.steps.dequantisation.writing import write_plain
from finetune.steps.model_files.checkpoint import read_checkpoint
from finetune.steps.model_files.safetensors_file import Header, Tensor, write_header
from finetune.steps.runtime import disk
from finetune.steps.runtime.failure import StepFailure
from tests.unit.steps import quantised
from tests.unit.steps.families import edit_config, edit_tensors
from tests.unit.steps.quantised import KINDS, Tensors

GOLDEN = Path(__file__).parent / "golden" / "compressed_tensors.safetensors"
MXFP4 = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
BITSANDBYTES = {"quantization_config": {"quant_method": "bitsandbytes"}}


def fp8(block: Any = None, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block} | settings}


def plain(folder: Path, tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """What is written of these tensors."""
    source, target = folder / "quantised", folder / "plain"
    for each in (source, target):
        each.mkdir(parents=True)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    write_plain(source, target, lambda done, total: None)
    return load_file(target / "model.safetensors")


def plain_folder(source: Path) -> Path:
    target = source.with_name(f"{source.name}-plain")
    target.mkdir()
    write_plain(source, target, lambda done, total: None)
    return target


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of bf16 or f16 numbers: zeros of either sign are told apart."""
    return values.view(torch.int16)


def assert_nearest(found: torch.Tensor, exact: torch.Tensor) -> None:
    """No other number of the type is nearer, and of two that are as near it is the even one."""
    neighbours = [(bits(found) + step).view(found.dtype).double() for step in (-1, 1)]
    distance = (found.double() - exact).abs()
    odd = (bits(found) & 1).bool()
    for other in neighbours:
        further = (other - exact).abs()
        worse = (further < distance) | ((further == distance) & odd)
        assert not (worse & other.isfinite() & (found != 0)).any()


def test_mxfp4_is_what_transformers_makes_of_every_code_at_every_scale(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scales = torch.arange(253, dtype=torch.uint8)[None, :, None].repeat(2, 1, 32)  # 6 * 2**126 is beyond bf16
    blocks = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(2, 1)[None, None].repeat(2, 253, 1, 1)
    found = plain(tmp_path, {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}, MXFP4)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert found.keys() == {"e.down_proj"}
    assert found["e.down_proj"].shape == (2, 1024, 253)
    assert torch.equal(found["e.down_proj"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)], ids=str)
def test_fp8_in_blocks_is_what_transformers_makes_of_it(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    grid = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
    codes, scales = (torch.randn(shape) * 40).to(torch.float8_e4m3fn), (torch.rand(grid) / 50).to(dtype)
    found = plain(tmp_path, {"l.weight": codes, "l.weight_scale_inv": scales}, fp8([128, 128]))["l.weight"]
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    wide = scales.double().repeat_interleave(128, -2).repeat_interleave(128, -1)
    assert_nearest(found, codes.double() * wide)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [192, 576])
def test_blocks_at_the_edge_are_as_large_as_config_json_says(rows: int, tmp_path: Path) -> None:
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows. transformers divides rows by scales: 576 fail there, and of 192 it
    makes two blocks of 96."""
    codes, scales = torch.ones(rows, 128).to(torch.float8_e4m3fn), torch.arange(1.0, -(-rows // 128) + 1)[:, None]
    found = plain(tmp_path, {"l.weight": codes, "l.weight_scale_inv": scales}, fp8([128, 128]))["l.weight"]
    assert found[:, 0].tolist() == [row // 128 + 1 for row in range(rows)]


@pytest.mark.parametrize(
    ("scales", "config"),
    [
        (torch.tensor(0.013), fp8()),
        (torch.tensor([0.013]), fp8()),
        (torch.rand(48, 1), fp8()),
        (torch.rand(48), fp8()),
        (torch.rand(48, 1), {"quantization_config": {"quant_method": "fbgemm_fp8"}}),
    ],
)
def test_a_scale_may_be_for_the_tensor_or_for_each_row(
    scales: torch.Tensor, config: dict[str, Any], tmp_path: Path
) -> None:
    codes = (torch.randn(48, 32) * 40).to(torch.float8_e4m3fn)
    name = "l.weight_scale" if "fbgemm" in str(config) else "l.weight_scale_inv"
    found = plain(tmp_path, {"l.weight": codes, name: scales}, config)["l.weight"]
    assert_nearest(found, codes.double() * (scales.double().reshape(-1, 1) if scales.numel() > 1 else scales.double()))


def test_scales_that_are_powers_of_two_are_read_as_such(tmp_path: Path) -> None:
    codes = (torch.randn(128, 128) * 40).to(torch.float8_e4m3fn)
    scale = torch.tensor([[120]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = plain(tmp_path, {"l.weight": codes, "l.weight_scale_inv": scale}, fp8([128, 128]))["l.weight"]
    assert torch.equal(found, (codes.double() * 2.0**-7).bfloat16())


def test_the_tables_are_the_libraries_own() -> None:
    from bitsandbytes.backends.utils import _get_4bit_code

    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(E4M3, codes, equal_nan=True)
    for kind, table in (("nf4", NF4), ("fp4", FP4)):
        assert table.tolist() == _get_4bit_code(kind, torch.device("cpu")).double().tolist()


@pytest.mark.parametrize("shape", [(64, 128), (24, 96), (33, 62), (5, 6, 64)], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "absmax of absmax"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_four_bits_are_what_it_makes_of_them(
    kind: str, nested: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """By the code that it has for every processor. Its own for AVX-512 (0.50) takes the scales of other blocks where a
    row is no multiple of a block (24 x 96 here), and is as far off as if half of the weight were another."""
    import bitsandbytes.functional as bnb
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    torch.manual_seed(0)
    codes, state = bnb.quantize_4bit(torch.randn(shape).bfloat16() / 50, quant_type=kind, compress_statistics=nested)
    parts = {f"l.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    found = plain(tmp_path, {"l.weight": codes} | parts, BITSANDBYTES)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    code = _get_4bit_code(kind, torch.device("cpu"))
    expected = _dequantize_4bit_compute(codes.reshape(-1), absmax, code, 64, shape, torch.bfloat16).reshape(shape)
    assert found.keys() == {"l.weight"}
    assert torch.equal(found["l.weight"], expected)
    if shape[-1] % 64 == 0:
        assert torch.equal(found["l.weight"], bnb.dequantize_4bit(codes, state))


def test_bitsandbytes_codes_may_be_stored_as_numbers_of_another_type(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage, which FSDP needs."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(16, 128).bfloat16()
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    parts = {f"l.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    found = plain(tmp_path, {"l.weight": codes} | parts, BITSANDBYTES)["l.weight"]
    assert torch.equal(found, bnb.dequantize_4bit(codes, state))


def test_bitsandbytes_eight_bits_are_rounded_once(tmp_path: Path) -> None:
    """The library rounds three times; here that comes to the same."""
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    codes, scales, _ = bnb.int8_vectorwise_quant(torch.randn(48, 96).half() / 50)
    layout = torch.tensor(0, dtype=torch.uint8)
    found = plain(tmp_path, {"l.weight": codes, "l.SCB": scales, "l.weight_format": layout}, BITSANDBYTES)
    assert found.keys() == {"l.weight"}
    assert_nearest(found["l.weight"], codes.double() * scales.double()[:, None] / 127)
    assert torch.equal(found["l.weight"], bnb.int8_vectorwise_dequant(codes, scales).bfloat16())


def golden(case: str) -> tuple[Tensors, torch.Tensor, dict[str, Any]]:
    """The tensors of a module `l` as compressed-tensors left them, what it makes of them, and config.json."""
    with safe_open(GOLDEN, "pt") as file:
        settings = json.loads(file.metadata()[case])
    found = {name.removeprefix(f"{case}/"): v for name, v in load_file(GOLDEN).items() if name.startswith(f"{case}/")}
    expected = found.pop("expected")
    config = {"quantization_config": {"quant_method": "compressed-tensors"} | settings}
    return {f"l.{name}": value for name, value in found.items()}, expected, config


def cases() -> list[str]:
    with safe_open(GOLDEN, "pt") as file:
        return sorted(file.metadata())


@pytest.mark.parametrize("case", cases())
def test_compressed_tensors_are_what_the_package_makes_of_them(case: str, tmp_path: Path) -> None:
    tensors, expected, config = golden(case)
    if expected.dtype == torch.float16:
        config["dtype"] = "float16"
    found = plain(tmp_path, tensors, config)
    assert found.keys() == {"l.weight"}
    assert torch.equal(bits(found["l.weight"]), bits(expected.to(found["l.weight"].dtype)))


def test_a_model_in_f16_is_written_in_f16_which_holds_its_numbers_more_closely(tmp_path: Path) -> None:
    tensors, _, config = golden("float-channel-f16")
    exact = tensors["l.weight"].double() * tensors["l.weight_scale"].double()
    found = plain(tmp_path, tensors, config | {"torch_dtype": "float16"})["l.weight"]
    assert found.dtype == torch.float16
    assert_nearest(found, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_model_becomes_one_that_transformers_takes_for_unquantised(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = KINDS[kind](tmp_path / "model")
    target = plain_folder(source)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert {value.dtype for value in load_file(target / "model.safetensors").values()} <= {
        torch.bfloat16,
        torch.float32,
    }
    _, info = AutoModelForCausalLM.from_pretrained(target, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all("layers.2." in name for name in info["unexpected_keys"])  # DeepSeek-V3's further layer


def logits(folder: Path, **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.bfloat16} | options))
    if getattr(model, "is_quantized", False):
        model = model.dequantize(torch.bfloat16)
    with torch.no_grad():
        found: torch.Tensor = model.float().eval()(input_ids=torch.tensor([[5, 9, 40, 41]]), use_cache=False).logits
    return found


@pytest.mark.parametrize(
    "kind",
    ["gpt_oss (MXFP4)", "qwen3 (FP8)", "deepseek_v3 (FP8)", "mistral (FP8, a scale each)", "llama (bitsandbytes nf4)"],
)
def test_it_answers_as_the_model_that_transformers_dequantises(kind: str, tmp_path: Path) -> None:
    from transformers import FineGrainedFP8Config, Mxfp4Config

    source = KINDS[kind](tmp_path / "model")
    options: dict[str, Any] = {}
    if "MXFP4" in kind:
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if "FP8" in kind:
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    theirs, ours = logits(source, **options), logits(plain_folder(source))
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_in_which_it_is_written_change_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = KINDS[kind](tmp_path / "model")
    whole = load_file(plain_folder(source) / "model.safetensors")
    monkeypatch.setattr(dequantised_weights, "AT_ONCE", 1000)
    (source.with_name("model-plain")).rename(tmp_path / "first")
    pieces = load_file(plain_folder(source) / "model.safetensors")
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_memory_is_that_of_a_few_rows(tmp_path: Path) -> None:
    size = 8192
    tensors = {
        "l.weight": torch.zeros(size, size).to(torch.float8_e4m3fn),
        "l.weight_scale_inv": torch.ones(size // 128, size // 128),
    }
    tracemalloc.start()
    try:
        plain(tmp_path, tensors, fp8([128, 128]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size * size  # half of what is written, whatever its size


def test_scales_in_another_file_are_found_and_a_file_without_weights_is_left_out(tmp_path: Path) -> None:
    single = quantised.fp8_blocks(tmp_path / "single")
    whole = load_file(plain_folder(single) / "model.safetensors")
    source = quantised.sharded(single, lambda name: 2 if "scale" in name else 1)
    target = tmp_path / "target"
    target.mkdir()
    write_plain(source, target, lambda done, total: None)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00002.safetensors"}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    found = load_file(target / "model-00001-of-00002.safetensors")
    assert found.keys() == whole.keys() and all(torch.equal(whole[name], found[name]) for name in whole)
    assert read_checkpoint(target).tensors.keys() == whole.keys()


def test_a_file_in_which_nothing_is_quantised_is_not_copied(tmp_path: Path) -> None:
    source = quantised.sharded(
        quantised.fp8_blocks(tmp_path / "model"), lambda name: 1 if "embed" in name or "norm" in name else 2
    )
    target = plain_folder(source)
    name = "model-00001-of-00002.safetensors"
    assert (source / name).stat().st_ino == (target / name).stat().st_ino


def test_numbers_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    """As safetensors' own writer has it, for those who map files into memory; three bf16 numbers come after f32."""
    source, target = tmp_path / "model", tmp_path / "plain"
    source.mkdir()
    target.mkdir()
    tensors = [Tensor("a.weight", "F8_E4M3", (1, 3), 0, 3), Tensor("a.weight_scale_inv", "F32", (), 3, 7)]
    with (source / "model.safetensors").open("wb") as file:
        write_header(
            file, Header({each.name: each for each in [*tensors, Tensor("b.bias", "F32", (1,), 7, 11)]}, {}, 0)
        )
        file.write(b"\x38" * 3 + np.array([2, 5], "<f4").tobytes())
    (source / "config.json").write_text(json.dumps(fp8()))
    write_plain(source, target, lambda done, total: None)
    found = load_file(target / "model.safetensors")
    assert found["a.weight"].tolist() == [[2.0] * 3] and found["b.bias"].tolist() == [5.0]
    assert read_checkpoint(target).tensors["b.bias"].start == 0


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {each: value for each, value in held.items() if not each.endswith(name)}


def having(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda held: held | {name: value}


def changed(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda held: {name: change(v).contiguous() if name.endswith(end) else v for name, v in held.items()}


GPT_OSS = "gpt_oss (MXFP4)"
QWEN3 = "qwen3 (FP8)"
MISTRAL = "mistral (FP8, a scale each)"
BNB4 = "llama (bitsandbytes nf4)"
BNB8 = "llama (bitsandbytes int8)"
CT_FP8 = "llama (compressed-tensors FP8)"
W8A8 = "llama (compressed-tensors W8A8)"
W4A16 = "llama (compressed-tensors W4A16)"
FIRST = "model.layers.0.self_attn.q_proj"
STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [
        (GPT_OSS, without("0.mlp.experts.down_proj_scales"), "no tensor model.layers.0.mlp.experts.down"),
        (GPT_OSS, having("x_scales", torch.ones(3, dtype=torch.uint8)), "x_scales (U8) belongs to no weight"),
        (GPT_OSS, changed("down_proj_blocks", lambda v: v[..., :8]), "not [experts, rows, blocks, 16]"),
        (GPT_OSS, changed("down_proj_scales", lambda v: v[:, :, :1]), "not [4, 64, 2]"),
        (GPT_OSS, changed("down_proj_scales", lambda v: v * 0 + 255), "numbers that are not finite"),
        (GPT_OSS, having("model.layers.0.mlp.experts.down_proj", torch.ones(3)), "makes it too"),
        (QWEN3, without("0.self_attn.q_proj.weight_scale_inv"), f"no tensor {FIRST}.weight_scale_inv"),
        (QWEN3, having("x.weight_scale_inv", torch.ones(1)), "x.weight_scale_inv (F32) belongs to no weight"),
        (QWEN3, having("x.weight", torch.ones(2, 2).to(torch.float8_e5m2)), "x.weight (F8_E5M2) belongs to no"),
        (QWEN3, having("x.weight", torch.ones(2, 2, dtype=torch.int8)), "x.weight (I8) belongs to no weight"),
        (QWEN3, changed("gate_proj.weight_scale_inv", lambda v: v[:1]), "blocks of [128, 128] make [2, 1]"),
        (QWEN3, changed("gate_proj.weight_scale_inv", lambda v: v * torch.nan), "numbers that are not finite"),
        (MISTRAL, changed("q_proj.weight_scale_inv", lambda v: torch.ones(5)), "neither one scale nor"),
        (BNB4, without("0.self_attn.q_proj.weight.absmax"), f"no tensor {FIRST}.weight.absmax"),
        (BNB4, without(f"0.self_attn.q_proj.weight{STATE}"), f"{FIRST}.weight (U8) belongs to no"),
        (BNB4, changed("q_proj.weight", lambda v: v[:-1]), "its state says four bits for each of"),
        (BNB4, changed("q_proj.weight.quant_map", lambda v: v / 2), "has other numbers than nf4 has"),
        (BNB4, changed(f"q_proj.weight{STATE}", lambda v: v[:-1]), "no state of bitsandbytes"),
        (BNB8, without("0.self_attn.q_proj.SCB"), f"{FIRST}.weight (I8) belongs to no weight"),
        (BNB8, changed("q_proj.weight_format", lambda v: v + 1), "does not lie row by row"),
        (CT_FP8, without("0.self_attn.q_proj.weight_scale"), "(F8_E4M3) belongs to no weight"),
        (CT_FP8, having(f"{FIRST}.weight_global_scale", torch.ones(1)), "belongs to no weight"),
        (W8A8, changed("q_proj.weight_scale", lambda v: v[:2]), "has shape [2, 1], not [64, 1]"),
        (W4A16, without("0.self_attn.q_proj.weight_zero_point"), "is asymmetric, and"),
        (W4A16, without("0.self_attn.q_proj.weight_shape"), f"no tensor {FIRST}.weight_shape"),
        (W4A16, changed("q_proj.weight_shape", lambda v: v + 8), "does not hold 4 bits for"),
        (
            W4A16,
            having(f"{FIRST}.weight_g_idx", torch.zeros(64, dtype=torch.int32)),
            "does not put 32 columns into each of 2 groups",
        ),
    ],
)  # fmt: skip
def test_each_tensor_is_used_once_or_the_model_is_refused(
    kind: str, edit: Callable[[Tensors], Tensors], words: str, tmp_path: Path
) -> None:
    source = KINDS[kind](tmp_path / "model")
    edit_tensors(source, edit)
    with pytest.raises(NotDequantisable) as caught:
        plain_folder(source)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config changes weights in a way"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config changes weights in a way"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"format": "nvfp4-pack-quantized"}, "has the format 'nvfp4-pack-quantized', which is not known"),
        ({"config_groups": {}}, "no group of quantization_config.config_groups say"),
        ({"config_groups": {"a": {"targets": ["re:.*embed"], "weights": {}}}}, "no group of"),
        ({"quant_method": "gptq"}, "quantised by gptq, which is not one of mxfp4, fp8"),
        ({"quant_method": None}, "quantised by quantization_config, which"),
        ({"quant_method": "bitsandbytes"}, "config.json says bitsandbytes, and no tensor is quantised so"),
        ({"quant_method": "mxfp4"}, "how a llama has its weights in MXFP4 is not known"),
    ],
    ids=str,
)
def test_what_is_not_known_of_a_method_is_refused(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = KINDS["llama (compressed-tensors FP8)"](tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    edit_config(source, quantization_config=config["quantization_config"] | settings)
    with pytest.raises(NotDequantisable) as caught:
        plain_folder(source)
    assert words in str(caught.value)


def test_a_group_that_names_modules_counts_before_one_for_a_class(tmp_path: Path) -> None:
    four, four_expected, config = golden("pack-group-zero")
    eight, eight_expected, other = golden("float-channel")
    groups = {
        "four": config["quantization_config"]["config_groups"]["group_0"] | {"format": "pack-quantized"},
        "eight": other["quantization_config"]["config_groups"]["group_0"]
        | {"targets": ["re:.*attn"], "format": "float-quantized"},
    }
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    tensors = four | {name.replace("l.", "attn."): value for name, value in eight.items()}
    found = plain(tmp_path, tensors, {"quantization_config": settings})
    assert torch.equal(found["l.weight"], four_expected)
    assert torch.equal(found["attn.weight"], eight_expected)


def test_gpt2_by_bitsandbytes_is_refused_because_its_weights_lie_turned(tmp_path: Path) -> None:
    with pytest.raises(NotDequantisable, match="keeps the weights of a gpt2 turned"):
        plain(tmp_path, {"a.weight": torch.ones(2)}, BITSANDBYTES | {"model_type": "gpt2"})


def test_scales_of_activations_and_caches_are_left_out_and_named(tmp_path: Path) -> None:
    source = KINDS["llama (compressed-tensors FP8)"](tmp_path / "model")
    edit_tensors(
        source, lambda held: held | {f"{FIRST}.input_scale": torch.ones(1), "a.self_attn.k_scale": torch.ones(1)}
    )
    (tmp_path / "plain").mkdir()
    said = write_plain(source, tmp_path / "plain", lambda done, total: None)
    names = f"a.self_attn.k_scale, {FIRST}.input_scale"
    assert said["warnings"] == [f"2 scales of activations were left out ({names}): unquantised weights need none"]
    assert not any("scale" in name for name in read_checkpoint(tmp_path / "plain").tensors)


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = quantised.mxfp4(tmp_path / "model")
    usage = os.statvfs(tmp_path)
    free = type("Usage", (), {"free": 1000, "total": usage.f_blocks, "used": 0})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: free)
    target = tmp_path / "plain"
    target.mkdir()
    with pytest.raises(StepFailure, match="the model with its mxfp4 weights written out as bf16 takes") as caught:
        write_plain(source, target, lambda done, total: None)
    assert caught.value.code == ExitCode.BAD_CONFIGURATION and caught.value.error.reason == "DiskFull"
    assert list(target.iterdir()) == []


def test_progress_counts_what_is_written(tmp_path: Path) -> None:
    source, seen = quantised.mxfp4(tmp_path / "model"), []
    (tmp_path / "plain").mkdir()
    write_plain(source, tmp_path / "plain", lambda done, total: seen.append((done, total)))
    total = sum(math.prod(v.shape) * v.element_size() for v in load_file(tmp_path / "plain/model.safetensors").values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
