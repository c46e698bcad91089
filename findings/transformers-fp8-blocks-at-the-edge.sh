#!/usr/bin/env bash
# transformers tells the size of FP8 blocks by dividing a weight's rows by its scales, not from weight_block_size. With
# blocks of 128, 192 rows have two scales, for 128 rows and for 64: transformers takes two blocks of 96, and rows 96 to 127
# are multiplied by the scale of others, without a sign of it. 576 rows, DeepSeek-V3's kv_a_proj_with_mqa, have five scales:
# that cannot be divided, and FineGrainedFP8Config(dequantize=True) fails on the published model.
#
# Takes 6 GB of disk (torch's wheel for x86 Linux brings CUDA, which is not used).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0

cat > "$folder/read.py" <<'PYTHON'
import sys
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
found = {}
for rows in (256, 192, 576):
    scales = torch.arange(1.0, -(-rows // 128) + 1)[:, None]
    ones = torch.ones(rows, 128).to(torch.float8_e4m3fn)
    try:
        read = Fp8Dequantize(None)._dequantize_one(ones, scales, torch.float32)[:, 0]
        found[rows] = int((read != 1 + torch.arange(rows) // 128).sum())
        print(f"{rows} rows: {found[rows]} have the scale of another block")
    except ValueError as error:
        found[rows] = None
        print(f"{rows} rows: {error}")
sys.exit(found != {256: 0, 192: 32, 576: None})
PYTHON
"$folder/venv/bin/python" "$folder/read.py"
