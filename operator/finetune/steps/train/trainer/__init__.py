"""transformers' Trainer: what a run needs of it beyond the arithmetic of a step, for each kind of objective."""
