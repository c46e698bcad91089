"""What runs in the pods: `finetune-step STEP`.

One folder for each step of the flow, in its order; `step.py` in it has `run(job, layout)`. No step knows another:

    download ─► tokens ─► reload        dataset ─► train ─► save

What passes between them lies in the workspace. What several of them need has rooms of its own, each of which knows only
those below it:

    cache           models that jobs share
    inference       what a loaded model says
    rows            rows of data, read from their sources
    token_matrices  which tensors of a checkpoint have one row for each token
    model_files     the files of a checkpoint as Hugging Face lays them out, without torch
    workspace       the folders and files that steps leave for each other
    runtime         what every step has around it: failures, progress, the request to stop, disk and memory
"""
