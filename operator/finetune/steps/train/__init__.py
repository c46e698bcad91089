"""The step `train`.

`step` is the process that the pod starts: it has a `worker` started for each device and says how they ended. In the
worker, `loop` takes the run from loading to saving, `phase` after phase, as `plan` worked it out; `stop` is the request
to end it early.

    trainer      transformers' Trainer, made resumable, for each kind of objective
    reporting    what people get to see: progress, attempts, the loss curve, samples, training.json
    data         encoded examples as batches, proof that packed ones are isolated, which rows a bad loss comes from
    distributed  several devices and pods: how they share the model, wait for each other and end together
    methods      which weights are trained: all, an adapter's, new rows; and their moving average
    checkpoints  checkpoints, and what going on from one bit for bit depends on
"""
