"""The step `download`: the base model enters the workspace, from a hub or from a claim."""
