"""Quantised checkpoints, written out as plain ones: one module for each method of quantisation says which tensors make
which weight (`mxfp4`, `fp8`, `compressed_tensors`, `bitsandbytes`), `plan` that no tensor is left, `writing` writes."""
