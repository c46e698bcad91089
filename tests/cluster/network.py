"""The machine's side of the pods' network: a link with the nodes' addresses, forwarding, and masquerading."""

import shutil
import subprocess
from pathlib import Path

from tests.cluster.console import ClusterError
from tests.cluster.layout import LINK, POD_NETWORK, SERVICE_NETWORK, Layout, Node

TABLE = "finetune-operator"
KUBE_PROXY_TABLES = (("ip", "kube-proxy"), ("ip6", "kube-proxy"))
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def up(layout: Layout) -> None:
    """Makes the link, lets packets through, and gives pods the machine's address towards the world."""
    if not (Path("/sys/class/net") / LINK).exists():
        _run("ip", "link", "add", LINK, "type", "bridge")  # a bridge without ports: just a holder of addresses
        _run("ip", "link", "set", LINK, "up")
    before = layout.state / "ip_forward.before"
    if FORWARD.read_text().strip() != "1":
        before.write_text(FORWARD.read_text())
        FORWARD.write_text("1")
    ruleset = f"""
        table ip {TABLE}
        delete table ip {TABLE}
        table ip {TABLE} {{
            chain postrouting {{
                type nat hook postrouting priority srcnat; policy accept;
                ip saddr {POD_NETWORK} ip daddr != {{ {POD_NETWORK}, {SERVICE_NETWORK} }} masquerade
            }}
        }}
    """
    _run("nft", "-f", "-", text=ruleset)


def add_node(node: Node) -> None:
    """Gives a node its address, the gateway of its pods."""
    _run("ip", "address", "replace", f"{node.address}/32", "dev", LINK)


def down(layout: Layout) -> None:
    """Removes link and tables, kube-proxy's too, and puts forwarding back."""
    if (Path("/sys/class/net") / LINK).exists():
        _run("ip", "link", "delete", LINK)
    if shutil.which("nft"):
        for family, table in (("ip", TABLE), *KUBE_PROXY_TABLES):
            subprocess.run(["nft", "delete", "table", family, table], capture_output=True)
    before = layout.state / "ip_forward.before"
    if before.exists():
        FORWARD.write_text(before.read_text())
        before.unlink()


def leftovers() -> list[str]:
    """Links and tables of ours that exist."""
    found = [LINK] if (Path("/sys/class/net") / LINK).exists() else []
    if shutil.which("nft"):
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout
        found += [line for line in tables.splitlines() if line.endswith((TABLE, "kube-proxy"))]
    return found


def nameservers() -> list[str]:
    """The machine's name servers that can be reached from a pod."""
    lines = Path("/etc/resolv.conf").read_text().splitlines() if Path("/etc/resolv.conf").exists() else []
    servers = [line.split()[1] for line in lines if line.startswith("nameserver") and len(line.split()) > 1]
    return [server for server in servers if not server.startswith("127.") and server != "::1"]


def _run(*command: str, text: str | None = None) -> None:
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed: {result.stderr.strip()}")
