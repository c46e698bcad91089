"""The progress service's certificates."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from finetune.controller.serving.certificates import Authority, issue, load_into, new_authority, renewed

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


def test_an_authority_survives_its_secret():
    authority = Authority(new_authority(NOW), new_authority(NOW))
    assert Authority.from_secret_data(authority.secret_data()) == authority


def test_a_fresh_authority_is_left_alone():
    authority = renewed(None, NOW)
    assert renewed(authority, NOW + 8 * 365 * DAY) is authority


def test_a_successor_is_trusted_long_before_it_signs():
    first = renewed(None, NOW)
    second = renewed(first, NOW + 3300 * DAY)
    assert second.current == first.current
    assert second.bundle.count("BEGIN CERTIFICATE") == 2
    third = renewed(second, NOW + 3630 * DAY)
    assert third.current == second.successor


@pytest.mark.parametrize("trusted", [0, 1])
def test_pods_that_carry_the_old_or_the_new_bundle_accept_the_leaf(trusted):
    authority = Authority(new_authority(NOW), new_authority(NOW))
    bundles = [authority.current.certificate.decode(), authority.bundle]
    leaf = issue(authority.current, ("progress.system.svc", "10.0.0.1"), NOW)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cadata=bundles[trusted])
    load_into(server, leaf)
    pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(pipes[0], pipes[1], server_side=True)
    theirs = client.wrap_bio(pipes[1], pipes[0], server_hostname="progress.system.svc")
    for _ in range(4):
        for side in (theirs, ours):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert theirs.getpeercert()


def test_a_leaf_is_short_lived_and_names_its_hosts():
    leaf = issue(new_authority(NOW), ("progress.system.svc", "10.0.0.1"), NOW)
    certificate = x509.load_pem_x509_certificate(leaf.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["progress.system.svc"]
    assert certificate.not_valid_after_utc - NOW <= 7 * DAY
