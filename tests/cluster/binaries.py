"""The cluster's programs, built from their Go modules once per version into the cache folder."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.console import ClusterError, step
from tests.cluster.layout import Layout


@dataclass(frozen=True)
class Component:
    """One Go module and the commands to build from it."""

    name: str
    module: str
    version: str
    packages: tuple[str, ...]
    ldflags: str = ""

    @property
    def commands(self) -> tuple[str, ...]:
        """Names of the binaries, as Go names them: last path element without a major version; `server` is etcd."""
        names = (re.sub(r"/v\d+$", "", package).rsplit("/", 1)[1] for package in self.packages)
        return tuple("etcd" if name == "server" else name for name in names)

    def folder(self, layout: Layout) -> Path:
        return layout.binaries / f"{self.name}-{self.version}"

    def missing(self, layout: Layout) -> list[str]:
        return [command for command in self.commands if not (self.folder(layout) / command).exists()]


KUBERNETES = "v1.35.4"
"""1.35 is the last Kubernetes that takes Debian 12's containerd 1.6."""

COMPONENTS = (
    Component(
        "kubernetes",
        "k8s.io/kubernetes",
        KUBERNETES,
        tuple(
            f"k8s.io/kubernetes/cmd/{command}"
            for command in (
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubelet",
                "kube-proxy",
                "kubectl",
            )
        ),
        " ".join(
            f"-X k8s.io/component-base/version.{key}={value}"
            for key, value in (("gitVersion", KUBERNETES), ("gitMajor", "1"), ("gitMinor", "35"))
        ),
    ),
    Component("etcd", "go.etcd.io/etcd/server/v3", "v3.6.16", ("go.etcd.io/etcd/server/v3",)),
    Component("coredns", "github.com/coredns/coredns", "v1.14.7", ("github.com/coredns/coredns",)),
    Component("helm", "helm.sh/helm/v4", "v4.3.1", ("helm.sh/helm/v4/cmd/helm",)),
    Component(
        "buildkit",
        "github.com/moby/buildkit",
        "v0.34.2",
        ("github.com/moby/buildkit/cmd/buildkitd", "github.com/moby/buildkit/cmd/buildctl"),
    ),
)


def complete(layout: Layout) -> bool:
    """Whether every binary is built."""
    return not any(component.missing(layout) for component in COMPONENTS)


def ensure(layout: Layout) -> None:
    """Builds what is missing (about ten minutes on two cores the first time) and links everything into one folder."""
    total = sum(len(component.commands) for component in COMPONENTS)
    for component in COMPONENTS:
        if component.missing(layout):
            _build(component, layout, total)
    shutil.rmtree(layout.binaries / "go-build", ignore_errors=True)  # several GB, of no use once all is built
    layout.bin.mkdir(parents=True, exist_ok=True)
    for component in COMPONENTS:
        for command in component.commands:
            link, target = layout.bin / command, component.folder(layout) / command
            if not link.is_symlink() or link.readlink() != target:
                link.unlink(missing_ok=True)
                link.symlink_to(target)


def _build(component: Component, layout: Layout, total: int) -> None:
    work = layout.binaries / f"{component.name}-{component.version}.building"
    shutil.rmtree(work, ignore_errors=True)
    output = work / "bin"
    output.mkdir(parents=True)
    environment = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=mod",
        "GOCACHE": str(layout.binaries / "go-build"),
    }
    with step(f"building {component.name} {component.version}") as progress:
        (work / "go.mod").write_text(_go_mod(component, work, environment))
        if component.name == "etcd":
            # The package is called `server`: build it by name, so that the binary is called etcd.
            targets = ["-o", str(output / "etcd"), *component.packages]
        else:
            targets = ["-o", f"{output}/", *component.packages]
        command = ["go", "build", "-trimpath", "-ldflags", f"-s -w {component.ldflags}", *targets]
        title = progress.title

        def show() -> None:
            while not finished.wait(1):
                ready = sorted(path.name for path in output.iterdir())
                count = total - sum(len(other.missing(layout)) for other in COMPONENTS) + len(ready)
                progress.title = f"{title}: {count} of {total} binaries ready"

        finished = threading.Event()
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            _go(command, work, environment)
        finally:
            finished.set()
            thread.join()
        component.folder(layout).mkdir(parents=True, exist_ok=True)
        for name in component.commands:
            (output / name).replace(component.folder(layout) / name)
        left = sum(len(other.missing(layout)) for other in COMPONENTS)
        progress.title = f"{title} ({total - left} of {total} binaries ready)"
    shutil.rmtree(work, ignore_errors=True)


def _go_mod(component: Component, work: Path, environment: dict[str, str]) -> str:
    """A module that requires the component, with the replacements that its own go.mod makes for its parts.

    `go install module@version` refuses modules with replacements. Kubernetes replaces its staging modules; each
    of those is published under the version v0.x that belongs to Kubernetes v1.x.
    """
    (work / "go.mod").write_text("module build\n\ngo 1.26\n")
    answer = json.loads(
        _go(["go", "mod", "download", "-json", f"{component.module}@{component.version}"], work, environment)
    )
    lines = ["module build", "", "go 1.26", "", f"require {component.module} {component.version}", ""]
    staging = component.version.replace("v1.", "v0.", 1)
    replaced = re.findall(r"^\s*(?:replace\s+)?(\S+) => \./staging/", Path(answer["GoMod"]).read_text(), re.MULTILINE)
    lines += [f"replace {module} => {module} {staging}" for module in replaced]
    return "\n".join(lines) + "\n"


def _go(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Runs Go, once more after a network failure; returns stdout."""
    for attempt in (1, 2):
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if result.returncode == 0:
            return result.stdout
        if attempt == 1:
            time.sleep(2)
    raise ClusterError(
        f"{' '.join(command[:3])} failed; it needs a Go module proxy in reach:\n{result.stderr.strip()[-3000:]}"
    )
