"""Runs in a pod of the demo: asks the models one question and prints what they say as JSON.

Usage: ask.py QUESTION NAME=FOLDER [NAME=FOLDER ...]
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.steps.inference.likelihood import Continuation, Prompts

MARKER = "<think>"


def ask(folder: str, question: str) -> dict[str, object]:
    """The probability that the answer begins with the marker, and the answer (greedy)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = Prompts.of(tokenizer, question)
    pieces = tokenizer(MARKER, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        probability = Continuation(model, prompts.generation).probability(pieces)
        ids = model.generate(prompts.generation, max_new_tokens=96, do_sample=False)[0, prompts.generation.shape[1] :]
    return {
        "pieces": len(pieces),
        "probability": probability,
        "answer": tokenizer.decode(ids, skip_special_tokens=True),
    }


def main() -> None:
    """Ask every model in turn."""
    question, *models = sys.argv[1:]
    torch.set_num_threads(2)
    named = (model.split("=", 1) for model in models)
    print(json.dumps({name: ask(folder, question) for name, folder in named}))


if __name__ == "__main__":
    main()
