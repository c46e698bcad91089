"""Which weights are trained (spec.training.method, embeddingWarmup), and their moving average (spec.training.ema)."""
