#!/usr/bin/env bash
# On a processor with AVX-512, bitsandbytes reads 4-bit weights wrong whose rows are a multiple of 32 but not of the block
# (64): it takes the scales of other blocks. dequantize_4bit is then as far from the weight as its largest numbers, without
# a sign of it. The package's own general code, which other processors use, reads the same bytes right.
#
# Rows of 96, 160, 288, ... occur in small models and in down_proj of odd widths; on GPUs all is well.
#
# Takes 6 GB of disk (torch's wheel for x86 Linux brings CUDA, which is not used) and a processor with AVX-512.
set -euo pipefail
grep -q avx512bw /proc/cpuinfo || { echo "this processor has no AVX-512"; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.15.0 bitsandbytes==0.50.2 numpy

cat > "$folder/read.py" <<'PYTHON'
import sys
import bitsandbytes
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
wrong = []
for columns in (64, 96, 128, 160, 192, 200):
    weight = torch.randn(64, columns) / 50
    codes, state = quantize_4bit(weight.bfloat16(), quant_type="nf4")
    code = _get_4bit_code("nf4", torch.device("cpu"))
    general = _dequantize_4bit_compute(codes.reshape(-1), state.absmax, code, 64, (64, columns), torch.bfloat16)
    general, own = general.reshape(64, columns).float(), dequantize_4bit(codes, state).float()
    error = [(read - weight).abs().max().item() for read in (own, general)]
    print(f"64 x {columns}: off by {error[0]:.4f} at most; by the general code {error[1]:.4f}")
    wrong += [columns] if error[0] > 1.5 * error[1] else []
print("wrong for rows of", wrong)
sys.exit(wrong != [96, 160])
PYTHON
"$folder/venv/bin/python" "$folder/read.py"
