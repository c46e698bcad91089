"""The training data as batches."""
