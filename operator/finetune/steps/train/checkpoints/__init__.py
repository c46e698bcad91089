"""Checkpoints: complete or absent, written beside the training; and what has to be equal for a run that goes on from
one to repeat the undisturbed one."""
