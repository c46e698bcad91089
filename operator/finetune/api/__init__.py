"""What a user writes (spec), what a user reads (status), and what operator and steps agree on (contract).

Pure data: no I/O, no kopf, no torch. Everything else may import this; this imports nothing of ours.
"""

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
