"""The step `reload`: the extended model proves itself, with transformers and against the files of its base."""
