"""Which tensors of a checkpoint have one row for each token: proven by a table of `architectures`, or by `resizing` the
model as transformers does, which needs torch."""
