"""Dynamic volumes: for each claim a folder on this machine, offered as a PersistentVolume of type `local`.

Local volumes, unlike hostPath ones, honour fsGroup: restricted pods can write. `main` runs as a process of the cluster.
"""

import http.client
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.api import Api, ApiError
from tests.cluster.layout import Layout

STORAGE_CLASS = "standard"
PROVISIONER = "cluster.finetune.dev/folder"
PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
SELECTED_NODE = "volume.kubernetes.io/selected-node"
SHARED = {"ReadWriteMany", "ReadOnlyMany"}
"""Access modes of volumes that pods on all nodes may mount: the nodes share this machine's file system."""

CLAIMS = "/api/v1/persistentvolumeclaims"
VOLUMES = "/api/v1/persistentvolumes"

Object = dict[str, Any]


def volume_for(claim: Object, folder: Path) -> Object | None:
    """The PersistentVolume that a claim wants now; None for one that is bound, not ours, or not yet given a node."""
    spec, metadata = claim["spec"], claim["metadata"]
    node = metadata.get("annotations", {}).get(SELECTED_NODE)
    if (
        spec.get("storageClassName") != STORAGE_CLASS
        or spec.get("volumeName")
        or node is None
        or "deletionTimestamp" in metadata
    ):
        return None
    if claim.get("status", {}).get("phase", "Pending") != "Pending":
        return None
    name = f"pvc-{metadata['uid']}"
    if SHARED & set(spec["accessModes"]):
        where = {"key": "kubernetes.io/os", "operator": "In", "values": ["linux"]}
    else:
        where = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "annotations": {PROVISIONED_BY: PROVISIONER}},
        "spec": {
            "accessModes": spec["accessModes"],
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "local": {"path": str(folder / name)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [where]}]}},
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": STORAGE_CLASS,
            "volumeMode": "Filesystem",
        },
    }


def is_to_delete(volume: Object) -> bool:
    """Whether a volume of ours has lost its claim."""
    return bool(
        volume["metadata"].get("annotations", {}).get(PROVISIONED_BY) == PROVISIONER
        and volume["spec"].get("persistentVolumeReclaimPolicy") == "Delete"
        and volume.get("status", {}).get("phase") == "Released"
    )


class Provisioner:
    """Follows claims and volumes, each in a thread."""

    def __init__(self, api: Api, folder: Path) -> None:
        self.api = api
        self.folder = folder

    def on_claim(self, claim: Object) -> None:
        volume = volume_for(claim, self.folder)
        if volume is None:
            return
        path = Path(volume["spec"]["local"]["path"])
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o2777)  # any user may write, and what is made there belongs to the pod's group
        try:
            self.api.request("POST", VOLUMES, volume)
            print(f"{path.name}: made for {claim['metadata']['namespace']}/{claim['metadata']['name']}", flush=True)
        except ApiError as error:
            if error.status != 409:
                raise

    def on_volume(self, volume: Object) -> None:
        if not is_to_delete(volume):
            return
        name = volume["metadata"]["name"]
        shutil.rmtree(self.folder / name, ignore_errors=True)
        try:
            self.api.request("DELETE", f"{VOLUMES}/{name}")
            print(f"{name}: deleted", flush=True)
        except ApiError as error:
            if error.status != 404:
                raise

    def follow(self, path: str, handle: Callable[[Object], None]) -> None:
        """Lists, then watches, for ever; a failure starts over from the list."""
        while True:
            try:
                listed = self.api.request("GET", path)
                for item in listed["items"]:
                    handle(item)
                version = listed["metadata"]["resourceVersion"]
                for kind, item in self.api.watch(path, version):
                    if kind in ("ADDED", "MODIFIED"):
                        handle(item)
                    elif kind == "ERROR":
                        break
            except (OSError, http.client.HTTPException, ApiError, ValueError) as error:
                print(f"{path}: {error}", flush=True)
                time.sleep(0.5)


def main(cache: str) -> None:
    """Runs until it is ended."""
    layout = Layout(Path(cache))
    provisioner = Provisioner(Api(layout, "provisioner"), layout.volumes)
    threading.Thread(target=provisioner.follow, args=(VOLUMES, provisioner.on_volume), daemon=True).start()
    provisioner.follow(CLAIMS, provisioner.on_claim)
