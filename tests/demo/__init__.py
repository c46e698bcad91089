"""`make demo`: everything from a bare machine to a model that answers with its new tokens."""
