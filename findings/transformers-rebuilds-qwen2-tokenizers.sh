#!/usr/bin/env bash
# A tokenizer that transformers saves beside the configuration of a Qwen2 model does not come back: AutoTokenizer takes its
# vocabulary and merges, but cuts text by Qwen2's own rule, whatever class tokenizer_config.json names (save_pretrained
# itself wrote TokenizersBackend there, the class that takes tokenizer.json as it is). Ids become others, without a word.
# transformers keeps a list of model types whose published class it does not believe; that their files may say the truth is
# not foreseen. Beside the configuration of a Llama or Qwen3 model the same files load as they were saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'transformers==5.23.0' 'tokenizers==0.23.3'
cat > "$folder/load.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

folder = Path(sys.argv[1])
print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
TEXT = "In 2024 it was 1234."
made = Tokenizer(models.BPE())
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's rule: numbers are not cut into digits
made.decoder = decoders.ByteLevel()
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
trainer = trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
)
made.train_from_iterator([TEXT] * 3, trainer)
saved = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def show(name, tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    print(f"{name:28} {type(tokenizer).__name__:18} {tokenizer.convert_ids_to_tokens(ids)}")
    return ids


expected = show("as it was saved", saved)
found = {}
for configuration in (LlamaConfig, Qwen3Config, Qwen2Config):
    place = folder / configuration.model_type
    saved.save_pretrained(place)
    configuration().save_pretrained(place)
    named = json.loads((place / "tokenizer_config.json").read_text())["tokenizer_class"]
    found[configuration.model_type] = show(
        f"{configuration.model_type}, {named}", AutoTokenizer.from_pretrained(place)
    )
direct = show("qwen2, by the class itself", PreTrainedTokenizerFast.from_pretrained(folder / "qwen2"))
as_seen = found["llama"] == found["qwen3"] == direct == expected != found["qwen2"]
sys.exit(0 if as_seen else "the behaviour has changed")
PYTHON
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/load.py" "$folder"
