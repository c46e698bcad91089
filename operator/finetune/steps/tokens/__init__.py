"""The step `add-tokens`: the job's tokens, listed or learned (`learn`), enter tokenizer and embedding matrices."""
