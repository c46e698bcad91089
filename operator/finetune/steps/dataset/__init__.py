"""The step `load-dataset`: rows become token ids and labels, mixed, packed and written in the order of training."""
