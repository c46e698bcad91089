"""Runs in a pod of the demo: asks the models one question and prints what they say as JSON.

Usage: ask.py QUESTION NAME=FOLDER [NAME=FOLDER ...]
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MARKER = "<think>"


def ask(folder: str, question: str) -> dict[str, object]:
    """The probability that the answer begins with the marker, and the answer (greedy)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = prompt["input_ids"]
    pieces = tokenizer(MARKER, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor([pieces])], dim=1)).logits[0, ids.shape[1] - 1 : -1]
        chances = logits.softmax(-1)[torch.arange(len(pieces)), torch.tensor(pieces)]
        answer = model.generate(**prompt, max_new_tokens=96, do_sample=False)[0, ids.shape[1] :]
    return {
        "pieces": len(pieces),
        "probability": chances.prod().item(),
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
    }


def main() -> None:
    """Ask every model in turn."""
    question, *models = sys.argv[1:]
    torch.set_num_threads(2)
    named = (model.split("=", 1) for model in models)
    print(json.dumps({name: ask(folder, question) for name, folder in named}))


if __name__ == "__main__":
    main()
