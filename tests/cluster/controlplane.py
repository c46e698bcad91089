"""etcd, the API server, the controllers, the scheduler, kube-proxy and DNS: what runs once per cluster.

Limits on rates are lifted: benchmarks with a thousand Jobs measure the operator, not a client-side throttle.
"""

import json

from tests.cluster import network
from tests.cluster.api import Api
from tests.cluster.layout import CONTROL_PLANE_ADDRESS, POD_NETWORK, SERVICE_NETWORK, Layout
from tests.cluster.pki import PORT
from tests.cluster.processes import Processes, wait_until

NAMES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns")
DNS_DOMAIN = "cluster.local"

QUICK = ("--kube-api-qps=1000", "--kube-api-burst=2000")


def start_api_server(layout: Layout, processes: Processes) -> None:
    """Starts etcd and the API server, and waits until it is ready."""
    pki, address = layout.pki, CONTROL_PLANE_ADDRESS
    processes.start(
        "etcd",
        [
            "etcd",
            "--name=finetune",
            f"--data-dir={layout.etcd}",
            f"--listen-client-urls=https://{address}:2379",
            f"--advertise-client-urls=https://{address}:2379",
            f"--listen-peer-urls=https://{address}:2380",
            f"--initial-advertise-peer-urls=https://{address}:2380",
            f"--initial-cluster=finetune=https://{address}:2380",
            *(
                f"--{prefix}{option}"
                for prefix in ("", "peer-")
                for option in (
                    "client-cert-auth",
                    f"trusted-ca-file={pki}/etcd-ca.crt",
                    f"cert-file={pki}/etcd.crt",
                    f"key-file={pki}/etcd.key",
                )
            ),
            "--unsafe-no-fsync",  # its data lives as long as its process
            "--quota-backend-bytes=4294967296",
            "--log-level=warn",
        ],
    )
    processes.start(
        "kube-apiserver",
        [
            "kube-apiserver",
            f"--etcd-servers=https://{address}:2379",
            f"--etcd-cafile={pki}/etcd-ca.crt",
            f"--etcd-certfile={pki}/etcd.crt",
            f"--etcd-keyfile={pki}/etcd.key",
            f"--bind-address={address}",
            f"--advertise-address={address}",
            f"--secure-port={PORT}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            f"--client-ca-file={pki}/ca.crt",
            f"--tls-cert-file={pki}/apiserver.crt",
            f"--tls-private-key-file={pki}/apiserver.key",
            f"--kubelet-certificate-authority={pki}/ca.crt",
            f"--kubelet-client-certificate={pki}/kubelet-client.crt",
            f"--kubelet-client-key={pki}/kubelet-client.key",
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer=https://kubernetes.default.svc.{DNS_DOMAIN}",
            f"--service-account-key-file={pki}/service-accounts.pub",
            f"--service-account-signing-key-file={pki}/service-accounts.key",
            "--allow-privileged=true",
            "--max-requests-inflight=2000",
            "--max-mutating-requests-inflight=1000",
        ],
        environment={"GOGC": "300"},  # collecting garbage is a third of its CPU time under load; memory is at hand
    )
    api = Api(layout)

    def ready() -> bool:
        processes.require_alive("etcd")
        processes.require_alive("kube-apiserver")
        return api.ready()

    wait_until("the API server's readiness", ready, 90)


def start_controllers(layout: Layout, processes: Processes) -> None:
    """Starts what works against the API server."""
    pki, address = layout.pki, CONTROL_PLANE_ADDRESS
    processes.start(
        "kube-controller-manager",
        [
            "kube-controller-manager",
            f"--kubeconfig={pki}/kube-controller-manager.kubeconfig",
            f"--bind-address={address}",
            "--leader-elect=false",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={pki}/service-accounts.key",
            f"--root-ca-file={pki}/ca.crt",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
            f"--cluster-cidr={POD_NETWORK}",
            "--allocate-node-cidrs=false",
            "--concurrent-gc-syncs=60",
            "--concurrent-job-syncs=20",
            "--concurrent-namespace-syncs=40",
            "--pvclaimbinder-sync-period=5s",
            "--node-monitor-period=2s",
            "--node-monitor-grace-period=30s",
            *QUICK,
        ],
    )
    processes.start(
        "kube-scheduler",
        [
            "kube-scheduler",
            f"--kubeconfig={pki}/kube-scheduler.kubeconfig",
            f"--bind-address={address}",
            "--leader-elect=false",
            "--pod-max-in-unschedulable-pods-duration=30s",
            *QUICK,
        ],
    )
    proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "nftables": {"minSyncPeriod": "100ms"},
        "clientConnection": {"kubeconfig": f"{pki}/kube-proxy.kubeconfig"},
        "clusterCIDR": POD_NETWORK,
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},  # the machine's own
        "bindAddress": address,
        "healthzBindAddress": f"{address}:10256",
        "metricsBindAddress": f"{address}:10249",
        "hostnameOverride": "node-1",  # all nodes share this machine's network, one proxy serves them
    }
    if not processes.alive("kube-proxy"):  # it ends when its file changes
        (layout.state / "kube-proxy.json").write_text(json.dumps(proxy, indent=1))
    processes.start("kube-proxy", ["kube-proxy", f"--config={layout.state}/kube-proxy.json"])
    forward = f"forward . {' '.join(network.nameservers())}" if network.nameservers() else ""
    corefile = layout.state / "Corefile"
    corefile.write_text(
        f""".:53 {{
    bind {address}
    errors
    kubernetes {DNS_DOMAIN} in-addr.arpa ip6.arpa {{
        kubeconfig {pki}/coredns.kubeconfig
        pods insecure
        ttl 1
    }}
    {forward}
    cache 30 {{
        disable success {DNS_DOMAIN}
        disable denial {DNS_DOMAIN}
    }}
    loadbalance
}}
"""
    )
    processes.start("coredns", ["coredns", f"-conf={corefile}"])
