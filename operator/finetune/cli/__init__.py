"""The `finetune` command, also `kubectl finetune`: jobs on this machine, and jobs of a cluster."""
