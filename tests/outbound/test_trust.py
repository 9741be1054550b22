"""What connections of ours trust: one context, which checks."""

import ssl

from callora.trust import system_trust


def test_there_is_one_context_and_it_checks_certificate_and_name() -> None:
    context = system_trust()
    assert context is system_trust(), "reading the system's certificates is dear"
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
