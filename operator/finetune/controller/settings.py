"""What an operator's administrator sets, read once from the environment that the chart writes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field


class MissingSettingError(ValueError):
    """A variable that has no sensible default is not set."""


@dataclass(frozen=True)
class Settings:
    """One field for each variable; the variable's name stands beside it."""

    steps_image: str = ""  # FINETUNE_STEPS_IMAGE (required)
    train_image: str = ""  # FINETUNE_TRAIN_IMAGE (required)
    image_pull_policy: str = "IfNotPresent"  # FINETUNE_IMAGE_PULL_POLICY
    image_pull_secrets: tuple[str, ...] = ()  # FINETUNE_IMAGE_PULL_SECRETS, comma-separated, in the jobs' namespaces
    hf_endpoint: str = ""  # FINETUNE_HF_ENDPOINT: a mirror of the Hugging Face hub; empty means the hub itself

    namespaces: tuple[str, ...] = ()  # FINETUNE_NAMESPACES, comma-separated; empty means the whole cluster
    namespace: str = "finetune-system"  # FINETUNE_OPERATOR_NAMESPACE (downward API): of Lease and CA Secret
    identity: str = field(default_factory=socket.gethostname)  # FINETUNE_IDENTITY (downward API: the pod's name)

    operator: str = ""  # FINETUNE_OPERATOR: serve only jobs with the label finetune.dev/operator of this value

    force_delete: bool = (
        False  # FINETUNE_FORCE_DELETE, true or false: remove pods of lost machines where jobs ask for it
    )

    progress_url: str = ""  # FINETUNE_PROGRESS_URL, as pods reach it: https://SERVICE.NAMESPACE.svc:8443/; empty: off
    progress_port: int = 8443  # FINETUNE_PROGRESS_PORT
    http_port: int = 8080  # FINETUNE_HTTP_PORT: /healthz /readyz /metrics
    ca_secret: str = "finetune-operator-ca"  # noqa: S105 - FINETUNE_CA_SECRET, a Secret's name

    lease: str = "finetune-operator"  # FINETUNE_LEASE
    lease_seconds: float = 15.0  # FINETUNE_LEASE_SECONDS: a leader that is silent for so long is replaced
    workers: int = 16  # FINETUNE_WORKERS: jobs that are decided on at the same time
    resync_seconds: float = 45.0  # FINETUNE_RESYNC_SECONDS: how often the store is compared with the server
    log_level: str = "INFO"  # FINETUNE_LOG_LEVEL

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings that the environment describes; raises MissingSettingError for what has no default."""

        def text(name: str, default: str) -> str:
            return environment.get(f"FINETUNE_{name}") or default

        def names(name: str) -> tuple[str, ...]:
            return tuple(part.strip() for part in text(name, "").split(",") if part.strip())

        missing = [name for name in ("STEPS_IMAGE", "TRAIN_IMAGE") if not environment.get(f"FINETUNE_{name}")]
        if missing:
            raise MissingSettingError(
                "set " + " and ".join(f"FINETUNE_{name}" for name in missing) + ": the images that jobs' pods run"
            )
        return cls(
            steps_image=text("STEPS_IMAGE", ""),
            train_image=text("TRAIN_IMAGE", ""),
            image_pull_policy=text("IMAGE_PULL_POLICY", cls.image_pull_policy),
            image_pull_secrets=names("IMAGE_PULL_SECRETS"),
            hf_endpoint=text("HF_ENDPOINT", ""),
            namespaces=names("NAMESPACES"),
            namespace=text("OPERATOR_NAMESPACE", cls.namespace),
            identity=text("IDENTITY", socket.gethostname()),
            operator=text("OPERATOR", ""),
            force_delete=text("FORCE_DELETE", "false") == "true",
            progress_url=text("PROGRESS_URL", ""),
            progress_port=int(text("PROGRESS_PORT", str(cls.progress_port))),
            http_port=int(text("HTTP_PORT", str(cls.http_port))),
            ca_secret=text("CA_SECRET", cls.ca_secret),
            lease=text("LEASE", cls.lease),
            lease_seconds=float(text("LEASE_SECONDS", str(cls.lease_seconds))),
            workers=int(text("WORKERS", str(cls.workers))),
            resync_seconds=float(text("RESYNC_SECONDS", str(cls.resync_seconds))),
            log_level=text("LOG_LEVEL", cls.log_level),
        )
