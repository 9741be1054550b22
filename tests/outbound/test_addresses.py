"""Upstream addresses: no text, no name and no answer of a resolver leads a connection into a network of ours."""

import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import Any, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from callora.config.loading import load_settings
from callora.outbound.addresses import (
    AddressPolicy,
    Resolver,
    SocketAddress,
    Target,
    TargetBlocked,
    TargetUnresolved,
    blocked_reason,
    parse_base_url,
)


def words(text: str) -> list[str]:
    """Return what stands between the spaces."""
    return text.split()


# ---------------------------------------------------------------------------------------------------------------------
# Addresses

BLOCKED_IPV4: Final = words("""
0.0.0.0 0.0.0.1 0.1.2.3 0.255.255.255 10.0.0.0 10.0.0.1 10.1.2.3 10.255.255.255 100.64.0.0 100.64.0.1 100.100.100.200
100.127.255.255 127.0.0.0 127.0.0.1 127.0.0.53 127.0.1.1 127.1.2.3 127.255.255.254 127.255.255.255 168.63.129.16
169.254.0.0 169.254.0.1 169.254.169.123 169.254.169.253 169.254.169.254 169.254.170.2 169.254.255.255 172.16.0.0
172.16.0.1 172.17.0.1 172.20.10.1 172.31.255.255 192.0.0.0 192.0.0.1 192.0.0.8 192.0.0.9 192.0.0.10 192.0.0.170
192.0.0.171 192.0.0.192 192.0.0.255 192.0.2.0 192.0.2.1 192.0.2.255 192.31.196.1 192.52.193.1 192.88.99.0 192.88.99.1
192.88.99.255 192.168.0.0 192.168.0.1 192.168.1.1 192.168.99.100 192.168.255.255 192.175.48.1 198.18.0.0 198.18.0.1
198.19.255.255 198.51.100.0 198.51.100.7 198.51.100.255 203.0.113.0 203.0.113.9 203.0.113.255 224.0.0.0 224.0.0.1
224.0.0.251 232.1.1.1 233.252.0.1 239.255.255.250 239.255.255.255 240.0.0.0 240.0.0.1 250.1.2.3 255.0.0.0
255.255.255.254 255.255.255.255
""")

PUBLIC_IPV4: Final = words("""
1.0.0.1 1.1.1.1 8.8.8.8 9.9.9.9 9.255.255.255 11.0.0.0 52.94.236.248 93.184.216.34 100.63.255.255 100.128.0.0
104.16.0.1 126.255.255.255 128.0.0.0 140.82.112.3 168.63.129.15 168.63.129.17 169.253.255.255 169.255.0.0
172.15.255.255 172.32.0.0 185.199.108.153 191.255.255.255 192.0.1.0 192.0.3.0 192.88.98.255 192.88.100.0
192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0
223.255.255.255
""")

BLOCKED_IPV6: Final = words("""
:: ::1 ::2 ::7f00:1 ::127.0.0.1 ::8.8.8.8 ::a00:1 ::ffff ::1:0 ::ffff:0.0.0.0 ::ffff:127.0.0.1 ::ffff:7f00:1
::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:a9fe:a9fe ::ffff:192.168.1.1 ::ffff:8.8.8.8 ::ffff:1.1.1.1
0:0:0:0:0:ffff:7f00:1 0000:0000:0000:0000:0000:ffff:127.0.0.1 ::FFFF:127.0.0.1 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8
::fffe:7f00:1 0:0:0:0:1::1 0:0:0:1::1 0:0:1::1 0:1::1
64:ff9b::127.0.0.1 64:ff9b::7f00:1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b::8.8.8.8 64:ff9b:1::1
64:ff9b:1::7f00:1 64:ff9b:1:ffff::1 64:ff9b:1:a00:0:100:: 64:ff9b:2::1 64:ff9b::1:0:0
100::1 100::ffff:ffff:ffff:ffff 100:0:0:1::1 100:1::1 200::1 400::1 1000::1 1fff:ffff::1
2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:0:7f00:1::1 2001:0:808:808:0:0:f7f7:f7f7 2001:1::1 2001:1::2
2001:2::1 2001:2:0:ffff::1 2001:3::1 2001:4:112::1 2001:5::1 2001:10::1 2001:1f:ffff::1 2001:20::1 2001:2f::1
2001:30::1 2001:3f::1 2001:100::1 2001:1ff:ffff::1 2001:db8::1 2001:db8:1234::1 2001:db8:ffff:ffff::1
2002:7f00:1:: 2002:7f00:1::1 2002:a00:1::1 2002:a9fe:a9fe::1 2002:c0a8:101::1 2002:808:808::1 2002::1 2002:ffff:ffff::
2620:4f:8000::1 3ffe::1 3ffe:831f::1 3fff::1 3fff:fff:ffff::1
2001:470::5efe:127.0.0.1 2a00:1450:4001::5efe:a00:1 2600:1f18::200:5efe:192.168.0.1 2600::5efe:169.254.169.254
4000::1 5000::1 5eff:ffff::1 5f00::1 5f00:ffff::1 6000::1 8000::1 a000::1 c000::1 e000::1 f000::1 fb00::1
fc00:: fc00::1 fcff::1 fd00::1 fd00:ec2::254 fd20:ce::254 fd12:3456:789a:1::1 fdff:ffff::1 fe00::1 fe7f::1
fe80:: fe80::1 fe80::a00:27ff:fe4e:66a1 fe80:1::1 febf::1 fe80::1%eth0 fe80::1%1 fec0::1 fec0:0:0:ffff::1 feff::1
ff00:: ff01::1 ff02::1 ff02::1:2 ff02::fb ff05::2 ff0e::1 ff3e::8000:1 ffff::1
ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 2606:4700:4700::1111%eth0 2606:4700:4700::1111%1
""")

PUBLIC_IPV6: Final = words("""
2000::1 2001:200::1 2001:470::1 2001:4860:4860::8888 2001:4860:4860::8844 2001:500:88:200::8 2001:db7:ffff::1
2001:db9::1 2001:67c:2e8:22::c100:68b 2003::1 2400:cb00:2048::1 2600:1f18::1 2606:4700:4700::1111 2607:f8b0:4005::200e
2620:4f:7fff::1 2620:4f:8001::1 2620:fe::fe 2800:3f0::1 2a00:1450:4001::200e 2a03:2880:f10c::1 2c0f:f248::1
3ffd::1 3fff:1000::1 2600::5efe:8.8.8.8 2606:4700:0:0:7f00:1:1:1
""")

NOT_ADDRESSES: Final = [
    "",
    " ",
    "localhost",
    "127.1",
    "2130706433",
    "0177.0.0.1",
    "0x7f.1",
    "1.2.3.4.5",
    "1.2.3",
    "::1]",
    "[::1]",
]


@pytest.mark.parametrize("address", [*BLOCKED_IPV4, *BLOCKED_IPV6, *NOT_ADDRESSES])
def test_a_special_address_is_blocked_with_a_reason(address: str) -> None:
    """Every special form is refused, as text and as a value, whatever public address it embeds."""
    assert blocked_reason(address)
    if address not in NOT_ADDRESSES:
        assert blocked_reason(ip_address(address)) == blocked_reason(address)


@pytest.mark.parametrize("address", [*PUBLIC_IPV4, *PUBLIC_IPV6])
def test_a_public_address_is_not_blocked(address: str) -> None:
    """The neighbours of the special blocks, and well-known public services, are allowed."""
    assert blocked_reason(address) is None


@pytest.mark.parametrize("inner", BLOCKED_IPV4)
@pytest.mark.parametrize(
    "form",
    [
        "::{0}",
        "::ffff:{0}",
        "::ffff:0:{0}",
        "64:ff9b::{0}",
        "2600::5efe:{0}",
        "2600::200:5efe:{0}",
        "2002:{1}::1",
        "2001:0:1:1:0:0:{2}",
    ],
)
def test_a_special_ipv4_address_is_blocked_in_every_embedding(form: str, inner: str) -> None:
    """Mapped, compatible, translated, tunnelled: the embedded address does not get through."""
    number = int(IPv4Address(inner))
    groups = [f"{value >> 16:x}:{value & 0xFFFF:x}" for value in (number, ~number & 0xFFFF_FFFF)]
    assert blocked_reason(form.format(inner, *groups)) is not None


@given(st.integers(0, 2**128 - 1).map(IPv6Address))
def test_no_ipv6_address_outside_global_unicast_is_allowed(address: IPv6Address) -> None:
    """An allowed address starts with the bits 001, whatever else it is."""
    if blocked_reason(address) is None:
        assert int(address) >> 125 == 1


@given(st.integers(0, 2**32 - 1).map(IPv4Address))
def test_every_ipv4_address_the_standard_library_calls_special_is_blocked(address: IPv4Address) -> None:
    """The table is never laxer than the release's own."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert blocked_reason(address) is not None


def test_reasons_say_what_is_embedded() -> None:
    """A log line tells a mapped loopback from a mapped public address."""
    assert blocked_reason("::ffff:127.0.0.1") == "IPv4-mapped of loopback IPv4"
    assert blocked_reason("::ffff:8.8.8.8") == "IPv4-mapped"
    assert blocked_reason("2002:a9fe:a9fe::1") == "6to4 of link-local IPv4"
    assert blocked_reason("2001:0:1:1::80ff:fffe") == "Teredo of loopback IPv4"
    assert blocked_reason("64:ff9b::10.0.0.1") == "NAT64 of private IPv4"
    assert blocked_reason("2600::5efe:10.0.0.1") == "tunnel of private IPv4"
    assert blocked_reason("::1") == "loopback"
    assert blocked_reason("::") == "unspecified"


# ---------------------------------------------------------------------------------------------------------------------
# URLs


@pytest.mark.parametrize(
    ("text", "target", "url"),
    [
        ("http://example.com", Target("http", "example.com", 80, ""), "http://example.com"),
        ("https://example.com/", Target("https", "example.com", 443, ""), "https://example.com"),
        ("HTTPS://API.Example.COM/v1/", Target("https", "api.example.com", 443, "/v1"), "https://api.example.com/v1"),
        ("http://example.com:80/a", Target("http", "example.com", 80, "/a"), "http://example.com/a"),
        ("https://example.com:80", Target("https", "example.com", 80, ""), "https://example.com:80"),
        ("http://example.com:1", Target("http", "example.com", 1, ""), "http://example.com:1"),
        ("http://example.com:65535", Target("http", "example.com", 65535, ""), "http://example.com:65535"),
        ("http://example.com:0080", Target("http", "example.com", 80, ""), "http://example.com"),
        ("http://h/a//b", Target("http", "h", 80, "/a//b"), "http://h/a//b"),
        ("http://h/a%20b/~c;d=e,f@g:h", Target("http", "h", 80, "/a%20b/~c;d=e,f@g:h"), "http://h/a%20b/~c;d=e,f@g:h"),
        ("http://h/a.b/..c", Target("http", "h", 80, "/a.b/..c"), "http://h/a.b/..c"),
        ("http://my_service:9000", Target("http", "my_service", 9000, ""), "http://my_service:9000"),
        ("http://8.8.8.8", Target("http", "8.8.8.8", 80, ""), "http://8.8.8.8"),
        ("http://127.0.0.1:81/x", Target("http", "127.0.0.1", 81, "/x"), "http://127.0.0.1:81/x"),
        ("http://[::1]:81", Target("http", "::1", 81, ""), "http://[::1]:81"),
        ("http://[2606:4700:0:0::1111]", Target("http", "2606:4700::1111", 80, ""), "http://[2606:4700::1111]"),
        ("http://bücher.example", Target("http", "xn--bcher-kva.example", 80, ""), "http://xn--bcher-kva.example"),
        ("http://BÜCHER.example", Target("http", "xn--bcher-kva.example", 80, ""), "http://xn--bcher-kva.example"),
        ("http://faß.de", Target("http", "xn--fa-hia.de", 80, ""), "http://xn--fa-hia.de"),
        (
            "http://xn--bcher-kva.example",
            Target("http", "xn--bcher-kva.example", 80, ""),
            "http://xn--bcher-kva.example",
        ),
        ("http://example。com", Target("http", "example.com", 80, ""), "http://example.com"),
        ("http://127。0。0。1", Target("http", "127.0.0.1", 80, ""), "http://127.0.0.1"),
        ("http://１２７.0.0.1", Target("http", "127.0.0.1", 80, ""), "http://127.0.0.1"),
        ("http://ⓛocalhost", Target("http", "localhost", 80, ""), "http://localhost"),
    ],
)
def test_a_base_url_is_read_and_normalised(text: str, target: Target, url: str) -> None:
    """What differs only in spelling becomes the same target, and the target's URL reads back as itself."""
    assert parse_base_url(text) == target
    assert target.url == url
    assert parse_base_url(url) == target


REFUSED_URLS: Final = [
    ("", "absolute URL"),
    ("example.com", "absolute URL"),
    ("//example.com", "absolute URL"),
    ("/v1", "absolute URL"),
    ("http:example.com", "absolute URL"),
    ("http:/example.com", "absolute URL"),
    ("ftp://example.com", "absolute URL"),
    ("file:///etc/passwd", "absolute URL"),
    ("gopher://127.0.0.1:70/_x", "absolute URL"),
    ("unix:///run/docker.sock", "absolute URL"),
    ("ws://example.com", "absolute URL"),
    ("javascript://example.com", "absolute URL"),
    ("http://", "name a host"),
    ("http:///path", "name a host"),
    ("http://:80", "name a host"),
    ("http://user@example.com", "user name"),
    ("http://user:secret@example.com", "user name"),
    ("http://:@example.com", "user name"),
    ("http://example.com@127.0.0.1", "user name"),
    ("http://example.com?a=1", "query"),
    ("http://example.com/?", "query"),
    ("http://example.com/#", "query"),
    ("http://example.com#@127.0.0.1", "query"),
    ("http://example.com:0", "port"),
    ("http://example.com:00", "port"),
    ("http://example.com:65536", "port"),
    ("http://example.com:99999", "port"),
    ("http://example.com:100000", "port"),
    ("http://example.com:", "port"),
    ("http://example.com:-1", "port"),
    ("http://example.com:+80", "port"),
    ("http://example.com:8a", "port"),
    ("http://example.com:８０", "port"),
    ("http://example.com:80:80", "port"),
    ("http://::1", "port"),
    ("http://fe80::1:80", "port"),
    ("http://example.com.", "ends with a dot"),
    ("http://example。", "ends with a dot"),
    ("http://127.0.0.1.", "ends with a dot"),
    ("http://.", "ends with a dot"),
    ("http://.example.com", "valid host name"),
    ("http://example..com", "valid host name"),
    ("http://-example.com", "valid host name"),
    ("http://example-.com", "valid host name"),
    ("http://exa*mple.com", "valid host name"),
    ("http://*.example.com", "valid host name"),
    ("http://exa$mple.com", "valid host name"),
    ("http://example.com,127.0.0.1", "decimal"),
    ("http://" + "a" * 64 + ".com", "valid host name"),
    ("http://" + ".".join(["a" * 60] * 5), "valid host name"),
    ("http://xn--.com", "valid host name"),
    ("http://xn--a.com", "internationalised"),
    ("http://xn--\u00e9.com", "internationalised"),
    ("http://\u2488example.com", "internationalised"),
    ("http://exa\u200bmple\ufffd.com", "internationalised"),
    ("http://\u0301a.com", "internationalised"),
    ("http://[fe80::1%eth0]", "zone"),
    ("http://[fe80::1%25eth0]:80", "zone"),
    ("http://fe80%eth0", "zone"),
    ("http://127%2e0.0.1", "zone"),
    ("http://%31%32%37.0.0.1", "zone"),
    ("http://[::1", "brackets"),
    ("http://::1]", "port"),
    ("http://[[::1]]", "brackets"),
    ("http://[]", "brackets"),
    ("http://[127.0.0.1]", "brackets"),
    ("http://[v1.fe80::a]", "brackets"),
    ("http://[::1]x", "brackets"),
    ("http://[::g]", "brackets"),
    ("http://2130706433", "four decimal"),
    ("http://017700000001", "four decimal"),
    ("http://0x7f000001", "four decimal"),
    ("http://0X7F000001", "four decimal"),
    ("http://0177.0.0.1", "four decimal"),
    ("http://0x7f.0.0.1", "four decimal"),
    ("http://0x7f.1", "four decimal"),
    ("http://127.1", "four decimal"),
    ("http://127.0.1", "four decimal"),
    ("http://127.0x1", "four decimal"),
    ("http://127.0.0.0x1", "four decimal"),
    ("http://127.0.0.01", "four decimal"),
    ("http://00127.0.0.1", "four decimal"),
    ("http://256.0.0.1", "four decimal"),
    ("http://1.2.3.4.5", "four decimal"),
    ("http://example.123", "four decimal"),
    ("http://example.0x", "four decimal"),
    ("http://0", "four decimal"),
    ("http://0x", "four decimal"),
    ("http://4294967296", "four decimal"),
    ("http://①②⑦.1", "four decimal"),
    ("http://٢١٣", "internationalised"),
    ("http://example.com/a b", "spaces"),
    (" http://example.com", "spaces"),
    ("http://example.com\n", "spaces"),
    ("http://exa\tmple.com", "spaces"),
    ("http://example.com\r\nX: y", "spaces"),
    ("http://example.com\x00", "spaces"),
    ("http://example.com\x7f", "spaces"),
    ("http://example.com\u00a0", "spaces"),
    ("http://example.com\u0085/", "spaces"),
    ("http://example.com\\@127.0.0.1", "backslashes"),
    ("http:\\\\example.com", "backslashes"),
    ("http://example.com/é", "URL characters"),
    ("http://example.com/%zz", "URL characters"),
    ("http://example.com/%2", "URL characters"),
    ("http://example.com/a|b", "URL characters"),
    ("http://example.com/{city}", "URL characters"),
    ("http://example.com/\u2028", "URL characters"),
    ("http://example.com/..", "path segment"),
    ("http://example.com/a/../b", "path segment"),
    ("http://example.com/./b", "path segment"),
    ("http://example.com/%2e%2E/b", "path segment"),
    ("http://example.com/.%2e", "path segment"),
    ("http://example.com/" + "a" * 1024, "at most 1024"),
    ("http://example.com/" + "a" * 3000, "at most 2048"),
]


@pytest.mark.parametrize(("text", "why"), REFUSED_URLS)
def test_any_other_url_is_refused_with_its_reason(text: str, why: str) -> None:
    """Each wrong part has a message of its own, and none of them is a crash."""
    with pytest.raises(ValueError, match=why):
        parse_base_url(text)


@given(st.text(max_size=60).map(lambda tail: f"http://{tail}") | st.text(max_size=60))
def test_no_text_crashes_the_parser(text: str) -> None:
    """Any text is a target, whose URL reads back as itself, or a ValueError."""
    try:
        target = parse_base_url(text)
    except ValueError:
        return
    assert target.host.isascii()
    assert parse_base_url(target.url) == target


# ---------------------------------------------------------------------------------------------------------------------
# The allow-list


def allowing(*entries: str) -> AddressPolicy:
    """Return the policy of a service with this allow-list."""
    settings = load_settings({"UPSTREAM_HOST_ALLOWLIST": ",".join(entries)})
    return AddressPolicy(settings.upstream_allowed_hosts, settings.upstream_allowed_networks)


def test_without_an_allow_list_only_public_addresses_pass() -> None:
    """The default policy adds nothing."""
    policy = AddressPolicy()
    assert policy.blocked_reason("example.com", "8.8.8.8") is None
    assert policy.blocked_reason("localhost", "127.0.0.1") == "loopback"


def test_an_allowed_host_passes_whatever_it_resolves_to() -> None:
    """A host entry is about the name: the same address under another name stays blocked."""
    policy = allowing("LocalHost", " my_service ", "", "xn--bcher-kva.example")
    assert policy.blocked_reason("localhost", "127.0.0.1") is None
    assert policy.blocked_reason("localhost", "::1") is None
    assert policy.blocked_reason("my_service", "10.1.1.1") is None
    assert policy.blocked_reason("xn--bcher-kva.example", "10.1.1.1") is None
    assert policy.blocked_reason("a.localhost", "127.0.0.1") == "loopback"
    assert policy.blocked_reason("other", "10.1.1.1") == "private"


def test_an_allowed_network_passes_its_addresses_under_any_name() -> None:
    """A network entry is about the address, and a bare address is a network of one."""
    policy = allowing("10.1.0.0/16", "127.0.0.7", "fd00::/8", "[::1]")
    for address in ("10.1.0.0", "10.1.255.255", "127.0.0.7", "fd00::1", "::1", "8.8.8.8"):
        assert policy.blocked_reason("any", address) is None
    for address in ("10.2.0.0", "127.0.0.1", "fc00::1", "::", "::ffff:10.1.0.1", "64:ff9b::10.1.0.1", "nonsense"):
        assert policy.blocked_reason("any", address)


def test_an_allowed_translation_prefix_still_checks_what_it_embeds() -> None:
    """An operator behind NAT64 opens the prefix and not, through it, the private networks."""
    policy = allowing("64:ff9b::/96", "::ffff:0:0/96", "2002::/16", "10.0.0.0/8")
    for address in ("64:ff9b::8.8.8.8", "::ffff:8.8.8.8", "2002:808:808::1", "::ffff:10.0.0.1", "64:ff9b::10.0.0.1"):
        assert policy.blocked_reason("any", address) is None
    for address in ("64:ff9b::127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::1", "::ffff:8.8.8.8%1"):
        assert policy.blocked_reason("any", address)


def test_the_whole_of_ipv6_does_not_open_ipv4() -> None:
    """`::/0` leaves the embedded forms of private IPv4 closed; `*` opens everything but zones."""
    ipv6 = allowing("::/0")
    assert ipv6.blocked_reason("any", "::1") is None
    assert ipv6.blocked_reason("any", "fe80::1") is None
    assert ipv6.blocked_reason("any", "::ffff:127.0.0.1")
    assert ipv6.blocked_reason("any", "127.0.0.1")
    everything = allowing("*")
    assert all(everything.blocked_reason("any", a) is None for a in [*BLOCKED_IPV4, *BLOCKED_IPV6] if "%" not in a)
    assert everything.blocked_reason("any", "fe80::1%1")


# ---------------------------------------------------------------------------------------------------------------------
# Resolving

PUBLIC: Final = "93.184.216.34"
PUBLIC_V6: Final = "2606:4700:4700::1111"


class FakeNames:
    """A resolver's system side: scripted answers, counted lookups, and a gate that holds them back."""

    def __init__(self, answers: dict[str, Any] | None = None) -> None:
        """Take by host a list of addresses, an exception, or a list of such answers in turn (as tuples)."""
        self.answers = answers or {}
        self.asked: list[str] = []
        self.under_way = 0
        self.gate: trio.Event | None = None

    async def __call__(self, host: str, port: object, *, type: int) -> list[Any]:  # noqa: A002
        """Answer as getaddrinfo does."""
        assert port is None and type == socket.SOCK_STREAM
        self.asked.append(host)
        self.under_way += 1
        try:
            await trio.lowlevel.checkpoint()
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.under_way -= 1
        answer = self.answers.get(host, [PUBLIC])
        if isinstance(answer, tuple):
            answer = answer[min(self.asked.count(host), len(answer)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return infos(answer)


def infos(addresses: Iterable[str]) -> list[Any]:
    """Return what getaddrinfo answers for these addresses."""
    return [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, 0, 0, 0))
        if ":" in address
        else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
        for address in addresses
    ]


def target(host: str, port: int = 80) -> Target:
    """Return a target made without the parser's help."""
    return Target("http", host, port, "")


@pytest.fixture
def names() -> FakeNames:
    """Return a fake that answers every name with a public address."""
    return FakeNames()


@pytest.fixture
def resolver(names: FakeNames, nursery: trio.Nursery) -> Resolver:
    """Return a resolver over the fake; a test that moves time asks for the clock itself."""
    return Resolver(AddressPolicy(), nursery, getaddrinfo=names)


def addresses(found: tuple[SocketAddress, ...]) -> list[str]:
    """Return the bare addresses."""
    return [one.address for one in found]


async def test_the_checked_addresses_come_back_in_order_with_the_targets_port(
    names: FakeNames, resolver: Resolver
) -> None:
    """Order is the system's; repetitions fall away; the sockaddr is numeric."""
    names.answers["a.example"] = [PUBLIC_V6, PUBLIC, PUBLIC_V6]
    found = await resolver.resolve(target("a.example", 8443))
    assert found == (
        SocketAddress(socket.AF_INET6, PUBLIC_V6, 8443),
        SocketAddress(socket.AF_INET, PUBLIC, 8443),
    )
    assert found[1].sockaddr == (PUBLIC, 8443)


async def test_an_answer_is_used_until_its_time_to_live_ends(
    names: FakeNames, resolver: Resolver, mock_clock: MockClock
) -> None:
    """One lookup serves every port of the host for 30 s, with and without waiting."""
    assert resolver.known(target("a.example")) is None
    await resolver.resolve(target("a.example"))
    mock_clock.jump(29.9)
    assert (await resolver.resolve(target("a.example", 81)))[0].port == 81
    assert resolver.known(target("a.example")) is not None
    assert names.asked == ["a.example"]
    mock_clock.jump(0.2)
    assert resolver.known(target("a.example")) is None
    await resolver.resolve(target("a.example"))
    assert names.asked == ["a.example"] * 2


async def test_a_rebinding_name_yields_the_checked_address_and_is_checked_again(
    names: FakeNames, resolver: Resolver, mock_clock: MockClock
) -> None:
    """While the public answer lives it is the one connected to; the private answer after it is refused, then cached."""
    names.answers["rebind.example"] = ([PUBLIC], ["127.0.0.1"], [PUBLIC])
    for _ in range(5):
        assert addresses(await resolver.resolve(target("rebind.example"))) == [PUBLIC]
    assert len(names.asked) == 1
    mock_clock.jump(30)
    for _ in range(5):
        with pytest.raises(TargetBlocked, match="loopback"):
            await resolver.resolve(target("rebind.example"))
    assert len(names.asked) == 2
    with pytest.raises(TargetBlocked):
        resolver.known(target("rebind.example"))
    mock_clock.jump(30)
    assert addresses(await resolver.resolve(target("rebind.example"))) == [PUBLIC]


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        [PUBLIC, "10.0.0.1"],
        ["10.0.0.1", PUBLIC],
        [PUBLIC, PUBLIC_V6, "::1"],
        [PUBLIC, "::ffff:93.184.216.34"],
        [PUBLIC, "64:ff9b::7f00:1"],
        [PUBLIC, "fe80::1%eth0"],
        [f"8.8.8.{last}" for last in range(100)] + ["169.254.169.254"],
    ],
)
async def test_one_blocked_address_refuses_the_whole_answer(
    names: FakeNames, resolver: Resolver, answer: list[str]
) -> None:
    """A mixed answer is not filtered: whoever answers so is not to be connected to at all."""
    names.answers["mixed.example"] = answer
    with pytest.raises(TargetBlocked, match=r"mixed\.example"):
        await resolver.resolve(target("mixed.example"))


async def test_a_numeric_zone_in_the_answer_is_refused(nursery: trio.Nursery) -> None:
    """The fourth part of an IPv6 sockaddr is a zone as much as a percent sign is."""

    async def zoned(host: str, port: object, *, type: int) -> list[Any]:  # noqa: A002
        await trio.lowlevel.checkpoint()
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", (PUBLIC_V6, 0, 0, 2))]

    with pytest.raises(TargetBlocked, match="zone"):
        await Resolver(AddressPolicy(), nursery, getaddrinfo=zoned).resolve(target("zoned.example"))


async def test_a_long_answer_is_cut_after_it_was_checked(names: FakeNames, resolver: Resolver) -> None:
    """At most 16 addresses are kept for connecting."""
    names.answers["many.example"] = [f"8.8.8.{last}" for last in range(100)]
    assert len(await resolver.resolve(target("many.example"))) == 16


@pytest.mark.parametrize(
    "host",
    [
        *words("127.0.0.1 ::1 fe80::1%eth0 ::ffff:8.8.8.8 2130706433 017700000001 0x7f000001 0X7F.1 0177.0.0.1 127.1"),
        *words("0 a.0x 256.256.256.256 127.0.0.1.0"),
    ],
)
async def test_numbers_are_judged_without_the_systems_resolver(names: FakeNames, resolver: Resolver, host: str) -> None:
    """Even a target that skipped the parser does not get an odd form of an address past the check."""
    for _ in range(2):
        with pytest.raises(TargetBlocked):
            await resolver.resolve(target(host))
    assert names.asked == []


async def test_a_public_literal_needs_no_lookup(names: FakeNames, resolver: Resolver) -> None:
    """It is known at once."""
    assert resolver.known(target("8.8.8.8", 53)) == (SocketAddress(socket.AF_INET, "8.8.8.8", 53),)
    assert addresses(await resolver.resolve(target(PUBLIC_V6))) == [PUBLIC_V6]
    assert names.asked == []


@pytest.mark.parametrize("spelling", ["2130706433", "0x7f.1", "127.1", "0177.0.0.1", "localhost", "127.0.0.1"])
async def test_the_real_resolver_leads_to_no_loopback_either(nursery: trio.Nursery, spelling: str) -> None:
    """With the system's getaddrinfo, which understands all of these."""
    with pytest.raises(TargetBlocked):
        await Resolver(AddressPolicy(), nursery).resolve(target(spelling))


async def test_the_allow_list_reaches_the_resolver(names: FakeNames, nursery: trio.Nursery) -> None:
    """By name, whatever it resolves to; by network, under any name; nothing else."""
    names.answers |= {"localhost": ["127.0.0.1", "::1"], "inner": ["10.0.0.1"], "half": ["10.0.0.1", "192.168.0.1"]}
    policy = allowing("localhost", "10.0.0.0/8")
    resolver = Resolver(policy, nursery, getaddrinfo=names)
    assert addresses(await resolver.resolve(target("localhost"))) == ["127.0.0.1", "::1"]
    assert addresses(await resolver.resolve(target("inner"))) == ["10.0.0.1"]
    assert addresses(await resolver.resolve(target("10.9.9.9"))) == ["10.9.9.9"]
    for host in ("half", "127.0.0.1"):
        with pytest.raises(TargetBlocked):
            await resolver.resolve(target(host))


@pytest.mark.parametrize(
    "error", [socket.gaierror(-2, "Name or service not known"), OSError(24, "x"), UnicodeError("x")]
)
async def test_a_failed_lookup_is_unresolved_and_not_repeated_at_once(
    names: FakeNames, resolver: Resolver, mock_clock: MockClock, error: Exception
) -> None:
    """For a second the failure is remembered; then the name is asked for again."""
    names.answers["gone.example"] = (error, [PUBLIC])
    for _ in range(3):
        with pytest.raises(TargetUnresolved, match=type(error).__name__):
            await resolver.resolve(target("gone.example"))
    assert len(names.asked) == 1
    mock_clock.jump(1)
    assert addresses(await resolver.resolve(target("gone.example"))) == [PUBLIC]


async def test_an_empty_answer_is_unresolved(names: FakeNames, resolver: Resolver) -> None:
    """No address is no permission."""
    names.answers["empty.example"] = []
    with pytest.raises(TargetUnresolved, match="no address"):
        await resolver.resolve(target("empty.example"))


async def test_a_crash_of_the_lookup_reaches_its_callers_and_nobody_else(names: FakeNames, resolver: Resolver) -> None:
    """The callers see a bug; the nursery lives; the host can be asked for again."""
    names.answers["odd.example"] = (RuntimeError("bug"), ["not an address"], [PUBLIC])
    for _ in range(2):
        with pytest.raises(AssertionError, match="crashed"):
            await resolver.resolve(target("odd.example"))
    assert addresses(await resolver.resolve(target("odd.example"))) == [PUBLIC]


async def test_callers_of_one_host_share_one_lookup(names: FakeNames, resolver: Resolver) -> None:
    """A hundred callers, two ports, one question."""
    names.gate = trio.Event()
    found: list[list[str]] = []

    async def caller(port: int) -> None:
        found.append(addresses(await resolver.resolve(target("herd.example", port))))

    async with trio.open_nursery() as callers:
        for number in range(100):
            callers.start_soon(caller, 80 + number % 2)
        await wait_all_tasks_blocked()
        names.gate.set()
    assert names.asked == ["herd.example"]
    assert found == [[PUBLIC]] * 100


@pytest.mark.parametrize("cancelled", [range(1), range(9), range(5, 10), range(10)])
async def test_a_cancelled_caller_does_not_fail_the_others(
    names: FakeNames, resolver: Resolver, cancelled: range
) -> None:
    """Neither the first nor any other caller owns the lookup; when all have gone, the answer is still kept."""
    names.gate = trio.Event()
    scopes = [trio.CancelScope() for _ in range(10)]
    done: list[int] = []

    async def caller(number: int) -> None:
        with scopes[number]:
            await resolver.resolve(target("shared.example"))
            done.append(number)

    async with trio.open_nursery() as callers:
        for number in range(10):
            callers.start_soon(caller, number)
            await wait_all_tasks_blocked()
        for number in cancelled:
            scopes[number].cancel()
        await wait_all_tasks_blocked()
        names.gate.set()
    assert sorted(done) == [number for number in range(10) if number not in cancelled]
    await wait_all_tasks_blocked()
    assert resolver.known(target("shared.example")) is not None
    assert names.asked == ["shared.example"]


async def test_callers_stop_waiting_at_the_deadline_and_the_late_answer_is_kept(
    names: FakeNames, resolver: Resolver, autojump_clock: MockClock
) -> None:
    """A slow name server costs a caller five seconds, the next callers none, and one thread in all."""
    names.gate = trio.Event()
    start = trio.current_time()
    with pytest.raises(TargetUnresolved, match="in time"):
        await resolver.resolve(target("slow.example"))
    assert trio.current_time() - start == pytest.approx(5)
    for _ in range(3):
        with pytest.raises(TargetUnresolved, match="in time"):
            await resolver.resolve(target("slow.example"))
    assert trio.current_time() - start == pytest.approx(5)
    assert (len(names.asked), names.under_way) == (1, 1)
    names.gate.set()
    await wait_all_tasks_blocked()
    assert resolver.known(target("slow.example")) is not None


async def test_a_lookup_that_never_ends_is_abandoned(
    names: FakeNames, resolver: Resolver, autojump_clock: MockClock
) -> None:
    """After 30 s its place is free, and after the failure's second the name is asked for anew."""
    names.gate = trio.Event()
    with pytest.raises(TargetUnresolved):
        await resolver.resolve(target("dead.example"))
    await trio.sleep(25.5)
    assert names.under_way == 0
    with pytest.raises(TargetUnresolved, match="in time"):
        resolver.known(target("dead.example"))
    await trio.sleep(1)
    names.gate = None
    assert addresses(await resolver.resolve(target("dead.example"))) == [PUBLIC]


async def test_lookups_under_way_are_bounded(names: FakeNames, nursery: trio.Nursery) -> None:
    """Past the bound a new host is refused at once, and a known one is not."""
    resolver = Resolver(AddressPolicy(), nursery, getaddrinfo=names, lookups_max=2)
    await resolver.resolve(target("known.example"))
    names.gate = trio.Event()
    async with trio.open_nursery() as callers:
        callers.start_soon(resolver.resolve, target("a.example"))
        callers.start_soon(resolver.resolve, target("b.example"))
        callers.start_soon(resolver.resolve, target("b.example", 81))
        await wait_all_tasks_blocked()
        with pytest.raises(TargetUnresolved, match="2 lookups"):
            await resolver.resolve(target("c.example"))
        await resolver.resolve(target("known.example"))
        names.gate.set()
    await resolver.resolve(target("c.example"))


async def test_answers_kept_are_bounded_and_the_least_recently_used_goes(
    names: FakeNames, nursery: trio.Nursery
) -> None:
    """Literals and refusals count too."""
    resolver = Resolver(AddressPolicy(), nursery, getaddrinfo=names, hosts_max=3)
    for host in ("a.example", "b.example", "8.8.8.8"):
        await resolver.resolve(target(host))
    assert resolver.known(target("a.example")) is not None
    await resolver.resolve(target("c.example"))
    assert resolver.known(target("b.example")) is None
    assert resolver.known(target("a.example")) is not None


async def test_callers_are_told_when_the_resolver_closes(names: FakeNames) -> None:
    """A cancelled nursery leaves nobody waiting."""
    names.gate = trio.Event()
    told: list[str] = []

    async def caller(resolver: Resolver) -> None:
        with pytest.raises(TargetUnresolved, match="closing"):
            await resolver.resolve(target("a.example"))
        told.append("closing")

    async with trio.open_nursery() as callers:
        async with trio.open_nursery() as lookups:
            resolver = Resolver(AddressPolicy(), lookups, getaddrinfo=names)
            callers.start_soon(caller, resolver)
            await wait_all_tasks_blocked()
            lookups.cancel_scope.cancel()
    assert told == ["closing"]


async def test_no_socket_is_opened_for_a_refused_target(
    names: FakeNames, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a blocked nor an unresolved target is probed: its ports cannot be told open from closed."""
    names.answers |= {"private.example": ["10.0.0.1"], "mixed.example": [PUBLIC, "::1"], "gone.example": []}
    opened: list[Any] = []
    real: Callable[..., Any] = socket.socket

    def record(*arguments: Any, **keywords: Any) -> Any:
        opened.append(arguments)
        return real(*arguments, **keywords)

    monkeypatch.setattr(socket, "socket", record)
    monkeypatch.setattr(trio.socket, "socket", record)
    for host in ("private.example", "mixed.example", "gone.example", "127.0.0.1", "2130706433"):
        with pytest.raises((TargetBlocked, TargetUnresolved)):
            await resolver.resolve(target(host))
    assert opened == []


def test_the_tables_cover_whole_blocks() -> None:
    """First and last addresses of every private IPv4 block are refused and their neighbours are not."""
    for block in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16", "198.18.0.0/15"):
        network = IPv4Network(block)
        assert blocked_reason(network[0]) and blocked_reason(network[-1])
        assert blocked_reason(network[0] - 1) is None and blocked_reason(network[-1] + 1) is None
