"""Which tensors of a checkpoint's files transformers makes each weight in memory of, and which it does not load at all:
asked of transformers' own rules of conversion (`correspondence`, which needs torch)."""
