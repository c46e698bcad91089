"""Certificates and kubeconfigs of one run of the cluster; made anew with each start, so they never expire in use."""

import base64
import datetime
import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.cluster.layout import CONTROL_PLANE_ADDRESS, SERVICE_ADDRESS, Layout, Node

LIFETIME = datetime.timedelta(days=365)
PORT = 6443
SERVER = f"https://{CONTROL_PLANE_ADDRESS}:{PORT}"


@dataclass(frozen=True)
class Identity:
    """Paths of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority whose certificate and key lie in a folder as <name>.crt and <name>.key."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.identity = Identity(folder / f"{name}.crt", folder / f"{name}.key")
        if not self.identity.certificate.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"finetune-cluster-{name}")])
            builder = _builder(subject, subject, key.public_key())
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            builder = builder.add_extension(_key_usage(authority=True), critical=True)
            _write(self.identity, key, builder.sign(key, hashes.SHA256()))
        self.certificate = x509.load_pem_x509_certificate(self.identity.certificate.read_bytes())
        self.key = serialization.load_pem_private_key(self.identity.key.read_bytes(), None)

    def issue(self, file: str, user: str, groups: Sequence[str] = (), names: Sequence[str] = ()) -> Identity:
        """A certificate for a client `user` in `groups`, and for a server under `names` (DNS or IP addresses)."""
        identity = Identity(self.folder / f"{file}.crt", self.folder / f"{file}.key")
        if identity.certificate.exists():
            return identity
        key = ec.generate_private_key(ec.SECP256R1())
        attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        subject = x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, user)])
        builder = _builder(subject, self.certificate.subject, key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(authority=False), critical=True)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if names else [])]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_name(name) for name in names]), critical=False
            )
        assert isinstance(self.key, ec.EllipticCurvePrivateKey)
        _write(identity, key, builder.sign(self.key, hashes.SHA256()))
        return identity


def create(layout: Layout) -> None:
    """Makes all certificates and kubeconfigs of the control plane that are not there yet."""
    authority = Authority(layout.pki, "ca")
    authority.issue(
        "apiserver",
        "kube-apiserver",
        names=(
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
            SERVICE_ADDRESS,
            CONTROL_PLANE_ADDRESS,
        ),
    )
    authority.issue("kubelet-client", "apiserver-kubelet-client", ["system:masters"])
    for file, user, groups in (
        ("admin", "admin", ["system:masters"]),
        ("kube-controller-manager", "system:kube-controller-manager", []),
        ("kube-scheduler", "system:kube-scheduler", []),
        ("kube-proxy", "system:kube-proxy", []),
        ("coredns", "system:coredns", []),
        ("provisioner", "finetune-provisioner", []),
    ):
        kubeconfig(authority, authority.issue(file, user, groups), layout.pki / f"{file}.kubeconfig")
    kubeconfig(authority, Identity(layout.pki / "admin.crt", layout.pki / "admin.key"), layout.kubeconfig)
    # etcd has an authority of its own: who signs a client of Kubernetes must not thereby open its database.
    Authority(layout.pki, "etcd-ca").issue("etcd", "etcd", names=(CONTROL_PLANE_ADDRESS,))
    signing_key = layout.pki / "service-accounts.key"
    if not signing_key.exists():
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        _write_key(signing_key, key)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (layout.pki / "service-accounts.pub").write_bytes(public)


def create_for_node(node: Node) -> Identity:
    """The certificate and the kubeconfig (<name>.kubeconfig) of one node's kubelet."""
    authority = Authority(node.layout.pki, "ca")
    identity = authority.issue(node.name, f"system:node:{node.name}", ["system:nodes"], (node.name, node.address))
    kubeconfig(authority, identity, node.layout.pki / f"{node.name}.kubeconfig")
    return identity


def kubeconfig(authority: Authority, identity: Identity, path: Path) -> None:
    """Writes a kubeconfig (JSON is YAML) that holds all it needs, so that it can be copied."""

    def data(file: Path) -> str:
        return base64.b64encode(file.read_bytes()).decode()

    cluster = {"server": SERVER, "certificate-authority-data": data(authority.identity.certificate)}
    user = {"client-certificate-data": data(identity.certificate), "client-key-data": data(identity.key)}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "finetune", "cluster": cluster}],
        "users": [{"name": "finetune", "user": user}],
        "contexts": [{"name": "finetune", "context": {"cluster": "finetune", "user": "finetune"}}],
        "current-context": "finetune",
    }
    partial = path.with_name(path.name + ".partial")
    partial.touch(mode=0o600)
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + LIFETIME)
    )


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(identity: Identity, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    _write_key(identity.key, key)
    identity.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
