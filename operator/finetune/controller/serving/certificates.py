"""The certificates of the progress service: a long-lived authority in a Secret, short-lived leaves in memory.

Pods carry the authority's certificate from their start, so it must outlive them; only leaves rotate. When the authority
itself nears its end, a successor is trusted a year before it signs.
"""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_AUTHORITY_LIFE = timedelta(days=3650)
_SUCCESSOR_BEFORE = timedelta(days=365)
_SIGNS_UNTIL = timedelta(days=30)
_LEAF_LIFE = timedelta(days=7)
_SKEW = timedelta(hours=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, PEM."""

    certificate: bytes
    key: bytes

    @property
    def ends(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


@dataclass(frozen=True)
class Authority:
    """What signs now, and what will sign next."""

    current: Pair
    successor: Pair | None = None

    @property
    def bundle(self) -> str:
        """What pods shall trust."""
        successor = self.successor.certificate if self.successor else b""
        return (self.current.certificate + successor).decode()

    def secret_data(self) -> dict[str, str]:
        """The data of the Secret."""
        pairs = {"tls": self.current} | ({"next": self.successor} if self.successor else {})
        data = {f"{name}.crt": pair.certificate for name, pair in pairs.items()}
        data |= {f"{name}.key": pair.key for name, pair in pairs.items()}
        data["ca.crt"] = self.bundle.encode()
        return {name: b64encode(value).decode() for name, value in data.items()}

    @classmethod
    def from_secret_data(cls, data: Mapping[str, str]) -> Authority:
        """The reverse. Raises KeyError or ValueError for a Secret that is not one of ours."""

        def pair(name: str) -> Pair:
            found = Pair(b64decode(data[f"{name}.crt"]), b64decode(data[f"{name}.key"]))
            assert found.ends
            return found

        return cls(pair("tls"), pair("next") if "next.crt" in data else None)


def renewed(authority: Authority | None, now: datetime) -> Authority:
    """The authority as it should be at that time; the same object when nothing has to change."""
    if authority is None:
        return Authority(new_authority(now))
    left = authority.current.ends - now
    if left < _SIGNS_UNTIL:
        return Authority(authority.successor or new_authority(now))
    if left < _SUCCESSOR_BEFORE and authority.successor is None:
        return Authority(authority.current, new_authority(now))
    return authority


def new_authority(now: datetime) -> Pair:
    """A new certificate authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"finetune-operator {now:%Y-%m-%d}")])
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key, now, _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def issue(authority: Pair, hosts: tuple[str, ...], now: datetime) -> Pair:
    """A leaf for the names (or addresses) that pods reach the service by."""
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    signer = serialization.load_pem_private_key(authority.key, password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-progress")])
    certificate = (
        _builder(subject, issuer.subject, key, now, _LEAF_LIFE)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pair(certificate, key)


def load_into(context: ssl.SSLContext, leaf: Pair) -> None:
    """Make new connections of a listening server use the leaf; the ssl module reads files only."""
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = Path(folder) / "tls.crt", Path(folder) / "tls.key"
        certificate.write_bytes(leaf.certificate)
        key.touch(mode=0o600)
        key.write_bytes(leaf.key)
        context.load_cert_chain(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
