"""FineTuneJob: a Kubernetes operator that adds tokens to language models and fine-tunes them."""

__version__ = "0.1.0"
