"""Addresses: which hosts a user's URL may name, and the addresses a connection is pinned to.

The URL of an upstream or of a webhook is user input, so every form of it that could reach Callora's own network is
refused: the URL's text (`parse_base_url`, `parse_outbound_url`), every address its host resolves to (`blocked_reason`),
and the time between the check and the connection, since a connection is only ever opened to the addresses that were
checked (`Resolver`), never to the name. The tables are written out because `ipaddress.is_global` changes between Python
releases and accepts NAT64 and 6to4.
"""

import re
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Final

import attrs
import idna
import trio

from callora.ledger.faults import CalloraFault

URL_LENGTH_MAX: Final = 2048
PATH_LENGTH_MAX: Final = 1024
HOST_LENGTH_MAX: Final = 253
ADDRESSES_KEPT_MAX: Final = 16
"""Addresses of one answer that are kept for connecting; all of them are checked."""

GetAddrInfo = Callable[..., Awaitable[Sequence[Any]]]
"""Called as `getaddrinfo(host, None, type=SOCK_STREAM)`; answers as the standard library's, or raises OSError."""


class TargetBlocked(CalloraFault):
    """The upstream's host is, or resolves to, an address Callora must not call. No socket was opened."""


class TargetUnresolved(CalloraFault):
    """The upstream's host has no address, or none was found in time. No socket was opened."""


# ---------------------------------------------------------------------------------------------------------------------
# The text of a URL

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.ASCII)
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?P<colon>:(?P<port>.*))?")
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*", re.ASCII)
_QUERY = re.compile(r"(?:\?(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*)?", re.ASCII)
_DOT_SEGMENT = re.compile(r"/(?:\.|%2e){1,2}(?:/|$)", re.ASCII | re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@attrs.frozen
class Target:
    """Where an API's upstream lives, as its developer wrote it and `parse_base_url` normalised it."""

    scheme: str
    """`http` or `https`."""
    host: str
    """An A-label host name in lower case, or an address in its canonical form, without brackets."""
    port: int
    """1 to 65535."""
    base_path: str
    """What every call's path is appended to: empty, or starting with a slash and not ending with one."""

    @property
    def authority(self) -> str:
        """Return what stands in the Host header: brackets round IPv6, the port unless it is the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS.get(self.scheme) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """Return the base URL in its normal form."""
        return f"{self.scheme}://{self.authority}{self.base_path}"


def parse_base_url(text: str) -> Target:
    """Return the target that a base URL names. Nothing is resolved: an address in it is judged by `Resolver.resolve`.

    Args:
        text: an absolute http or https URL of at most 2048 characters: `https://api.example.com/v1`.

    Raises:
        ValueError: the text is not such a URL; the message says why and may be shown to the developer.
    """
    url = _split(text)
    if url["rest"]:
        raise ValueError("must not contain a query or a fragment")
    return _target(url, _parse_path(url["path"]).rstrip("/"))


@attrs.frozen
class OutboundUrl:
    """A whole URL that a request is sent to as it is written."""

    target: Target
    """Where; without a base path."""
    path: str
    """What stands in the request line: a path that starts with a slash, and the query if there is one."""

    @property
    def text(self) -> str:
        """Return the URL in its normal form."""
        return f"{self.target.url}{self.path}"


def parse_outbound_url(text: str) -> OutboundUrl:
    """Return what a URL with any path and query names. Nothing is resolved, as in `parse_base_url`.

    Args:
        text: an absolute http or https URL of at most 2048 characters: `https://shop.example.com/hooks?of=callora`.

    Raises:
        ValueError: the text is not such a URL; the message says why and may be shown to whoever wrote it.
    """
    url = _split(text)
    if "#" in url["rest"]:
        raise ValueError("must not contain a fragment")
    if _QUERY.fullmatch(url["rest"]) is None:
        raise ValueError("must have a query of URL characters, with anything else percent-encoded")
    return OutboundUrl(_target(url, ""), (_parse_path(url["path"]) or "/") + url["rest"])


def _split(text: str) -> re.Match[str]:
    if len(text) > URL_LENGTH_MAX:
        raise ValueError(f"must be at most {URL_LENGTH_MAX} characters")
    if any(c <= " " or c == "\\" or 0x7F <= ord(c) <= 0xA0 for c in text):
        raise ValueError("must not contain spaces, control characters or backslashes")
    url = _URL.fullmatch(text)
    if url is None or url["scheme"].lower() not in _DEFAULT_PORTS:
        raise ValueError("must be an absolute URL that starts with http:// or https://")
    if "@" in url["authority"]:
        raise ValueError("must not contain a user name or password")
    return url


def _target(url: re.Match[str], base_path: str) -> Target:
    scheme = url["scheme"].lower()
    authority = _AUTHORITY.fullmatch(url["authority"])
    if authority is None:
        raise ValueError("must name a host, with an IPv6 address in brackets, and at most one port")
    port = _DEFAULT_PORTS[scheme]
    if authority["colon"] is not None:
        if _PORT.fullmatch(authority["port"]) is None or not 1 <= int(authority["port"]) <= 65535:
            raise ValueError("must have a port from 1 to 65535")
        port = int(authority["port"])
    return Target(scheme, _parse_host(authority["host"]), port, base_path)


def _parse_path(path: str) -> str:
    if len(path) > PATH_LENGTH_MAX:
        raise ValueError(f"must have a path of at most {PATH_LENGTH_MAX} characters")
    if _PATH.fullmatch(path) is None:
        raise ValueError("must have a path of URL characters, with anything else percent-encoded")
    if _DOT_SEGMENT.search(path) is not None:
        raise ValueError("must not have . or .. as a path segment")
    return path


def _parse_host(text: str) -> str:
    if not text:
        raise ValueError("must name a host")
    if "%" in text:
        raise ValueError("must not contain a zone identifier or percent-encoding in its host")
    if text.startswith("["):
        try:
            return str(IPv6Address(text[1:-1]))
        except ValueError:
            raise ValueError("must have an IPv6 address between the brackets") from None
    if text.isascii():
        host = text.lower()
    else:
        try:  # full-width digits and ideographic stops become ASCII here, so the checks below see what a resolver sees
            host = idna.encode(text, uts46=True, std3_rules=True).decode("ascii")
        except UnicodeError:  # idna.IDNAError is one
            raise ValueError("must have a valid internationalised host name") from None
    if host.endswith("."):
        raise ValueError("must not have a host that ends with a dot")
    if _is_numeric(host):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise ValueError("must write an IPv4 address as four decimal numbers without leading zeros") from None
    if len(host) > HOST_LENGTH_MAX or not all(_LABEL.fullmatch(label) for label in host.split(".")):
        raise ValueError("must have a valid host name: labels of 1 to 63 letters, digits and inner hyphens")
    try:
        for label in host.split("."):
            if label.startswith("xn--"):
                idna.ulabel(label)
    except UnicodeError:
        raise ValueError("must have a valid internationalised host name") from None
    return host


def _is_numeric(host: str) -> bool:
    """Return whether inet_aton would read the host as an IPv4 address: decimal, octal, hexadecimal or shortened."""
    return _NUMBER.fullmatch(host.lower().rsplit(".", 1)[-1]) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Addresses

_IPV4_BLOCKED: Final = tuple(
    (IPv4Network(network), reason)
    for network, reason in (
        ("0.0.0.0/32", "unspecified"),
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared, carrier-grade NAT"),
        ("127.0.0.0/8", "loopback"),
        ("168.63.129.16/32", "a cloud platform's own service"),  # Azure's, public by number, the host's agent by nature
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "protocol assignments"),
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "AS112"),
        ("192.52.193.0/24", "AMT relay"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "AS112"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        ("240.0.0.0/4", "reserved"),
    )
)
"""IANA's special-purpose registry and RFC 5735's multicast and reserved blocks; the first match names the reason."""

_IPV6_BLOCKED: Final = tuple(
    (IPv6Network(network), reason)
    for network, reason in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::/96", "IPv4-compatible"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("::ffff:0:0:0/96", "IPv4-translated"),
        ("64:ff9b::/96", "NAT64"),
        ("64:ff9b:1::/48", "local NAT64"),
        ("100::/64", "discard-only"),
        ("100:0:0:1::/64", "dummy prefix"),
        ("2001::/32", "Teredo"),
        ("2001:2::/48", "benchmarking"),
        ("2001:10::/28", "ORCHID"),
        ("2001:20::/28", "ORCHID"),
        ("2001:30::/28", "drone remote identification"),
        ("2001::/23", "protocol assignments"),
        ("2001:db8::/32", "documentation"),
        ("2002::/16", "6to4"),
        ("2620:4f:8000::/48", "AS112"),
        ("3ffe::/16", "6bone, returned"),
        ("3fff::/20", "documentation"),
        ("5f00::/16", "SRv6 segment identifiers"),
        ("fc00::/7", "private, unique local"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_ISATAP: Final = (0x0000_5EFE, 0x0200_5EFE)
"""The upper half of an ISATAP interface identifier; the lower half is the IPv4 address behind the tunnel."""


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    """Return the IPv4 address that packets to this one may come out at, None when it carries none at a known place."""
    number = int(address)
    if number >> 112 == 0x2002:
        return IPv4Address(number >> 80 & 0xFFFF_FFFF)
    if number >> 96 == 0x2001_0000:
        return IPv4Address(~number & 0xFFFF_FFFF)  # Teredo stores the client's address inverted
    low = IPv4Address(number & 0xFFFF_FFFF)
    # ::/96, ::ffff:0:0/96 and ::ffff:0:0:0/96, NAT64, then ISATAP under any prefix.
    if number >> 32 in (0, 0xFFFF, 0xFFFF_0000, 0x0064_FF9B << 64) or number >> 32 & 0xFFFF_FFFF in _ISATAP:
        return low
    return None


def blocked_reason(address: str | IPv4Address | IPv6Address) -> str | None:
    """Return why an address must not be called, None when it is ordinary global unicast.

    Every address of a translation or tunnel prefix is refused, whatever is embedded; the reason also names what is
    wrong with the embedded one. Source: IANA's IPv4 and IPv6 special-purpose address registries.

    Args:
        address: an address, or its text as ipaddress reads it; anything else is refused too, not raised.
    """
    if isinstance(address, str):
        try:
            address = ip_address(address)
        except ValueError:
            return "not an address"
    if isinstance(address, IPv4Address):
        return next((reason for network, reason in _IPV4_BLOCKED if address in network), None)
    if address.scope_id is not None:
        return "zone identifier"
    embedded = _embedded_ipv4(address)
    inner = blocked_reason(embedded) if embedded is not None else None
    suffix = f" of {inner} IPv4" if inner is not None else ""
    # `in` compares addresses by number.
    for network, reason in _IPV6_BLOCKED:
        if address in network:
            # ::1 and :: are themselves, not forms of 0.0.0.1 and 0.0.0.0.
            return reason if network.prefixlen == 128 else reason + suffix
    if address not in _GLOBAL_UNICAST:
        return "outside global unicast"
    return f"tunnel{suffix}" if inner is not None else None


@attrs.frozen
class AddressPolicy:
    """Which special addresses an operator lets upstreams have: those of named hosts, and those inside networks."""

    hosts: frozenset[str] = frozenset()
    """Host names, normalised, that are allowed whatever they resolve to."""
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    """Networks whose addresses are allowed under any name."""

    def blocked_reason(self, host: str, address: str | IPv4Address | IPv6Address) -> str | None:
        """Return why this host must not be called at this address, None when it may.

        An allowed network opens only the addresses written in it: a mapped, tunnelled or translated one also needs
        its embedded IPv4 address to be public or allowed, so `::/0` does not open 127.0.0.1 through `::ffff:7f00:1`.

        Args:
            host: the target's host, as `parse_base_url` returns it.
            address: one address that the host resolved to.
        """
        if host in self.hosts:
            return None
        reason = blocked_reason(address)
        if reason is None or not self.networks:
            return reason
        try:
            parsed = ip_address(address) if isinstance(address, str) else address
        except ValueError:
            return reason
        return None if self._allows(parsed) else reason

    def _allows(self, address: IPv4Address | IPv6Address) -> bool:
        if not any(address in network for network in self.networks):
            return False
        if isinstance(address, IPv4Address):
            return True
        if address.scope_id is not None:
            return False
        if int(address) <= 1:  # :: and ::1 carry no IPv4 address
            return True
        embedded = _embedded_ipv4(address)
        return embedded is None or blocked_reason(embedded) is None or self._allows(embedded)


# ---------------------------------------------------------------------------------------------------------------------
# Resolving


@attrs.frozen
class SocketAddress:
    """One checked address that a connection may be opened to."""

    family: socket.AddressFamily
    """AF_INET or AF_INET6."""
    address: str
    """The numeric address, never a name."""
    port: int
    """1 to 65535."""

    @property
    def sockaddr(self) -> tuple[str, int]:
        """Return what a socket of this family connects to."""
        return (self.address, self.port)


@attrs.frozen
class _Answer:
    """A lookup's result, kept until it expires: addresses to connect to, or why there are none."""

    expires_at: float
    addresses: tuple[tuple[socket.AddressFamily, str], ...] = ()
    blocked: str | None = None
    unresolved: str | None = None

    def at(self, target: Target) -> tuple[SocketAddress, ...]:
        """Return the addresses with the target's port; raise what the lookup found otherwise."""
        if self.blocked is not None:
            raise TargetBlocked(f"{target.host}: {self.blocked}")
        if self.unresolved is not None:
            raise TargetUnresolved(f"{target.host}: {self.unresolved}")
        return tuple([SocketAddress(family, address, target.port) for family, address in self.addresses])


@attrs.define(eq=False)
class _Lookup:
    """A lookup under way and everyone who waits for it."""

    started_at: float = attrs.field(factory=trio.current_time)
    done: trio.Event = attrs.field(factory=trio.Event)
    answer: _Answer | None = None
    crash: Exception | None = None


class Resolver:
    """Resolves a target once, checks every address, and keeps the checked addresses for a while.

    Connections are opened to what `resolve` returned, so a name that changes between check and connection changes
    nothing; after the time to live it is looked up and checked again.

    A lookup runs in the resolver's nursery, not in a caller: callers of one host share it, none of them ends it by
    being cancelled, and a caller whose deadline passes leaves it running, so that a name server that does not answer
    holds one thread a host and not one a call.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        nursery: trio.Nursery,
        *,
        getaddrinfo: GetAddrInfo = trio.socket.getaddrinfo,
        deadline_seconds: float = 5.0,
        lookup_seconds_max: float = 30.0,
        ttl_seconds: float = 30.0,
        failure_ttl_seconds: float = 1.0,
        hosts_max: int = 1024,
        lookups_max: int = 32,
    ) -> None:
        """Make a resolver that has looked nothing up.

        Args:
            policy: what is allowed beside public addresses.
            nursery: where lookups run; when it is cancelled, waiting callers get TargetUnresolved.
            getaddrinfo: asks the system; see GetAddrInfo.
            deadline_seconds: how long after a lookup's start its callers wait for the answer.
            lookup_seconds_max: how long one lookup may take before its thread is abandoned.
            ttl_seconds: how long a checked or blocked answer is used.
            failure_ttl_seconds: how long a failed lookup is not repeated.
            hosts_max: answers kept; past it the least recently used is dropped.
            lookups_max: lookups under way at once, below Trio's 40 threads so that others keep some; more are refused.
        """
        self._policy = policy
        self._nursery = nursery
        self._getaddrinfo = getaddrinfo
        self._deadline_seconds = deadline_seconds
        self._lookup_seconds_max = lookup_seconds_max
        self._ttl_seconds = ttl_seconds
        self._failure_ttl_seconds = failure_ttl_seconds
        self._hosts_max = hosts_max
        self._lookups_max = lookups_max
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._lookups: dict[str, _Lookup] = {}

    def known(self, target: Target) -> tuple[SocketAddress, ...] | None:
        """Return the addresses without waiting, None when only a lookup can tell.

        Raises:
            TargetBlocked: the host is known to be refused. No socket was opened.
            TargetUnresolved: its lookup failed a moment ago.
        """
        answer = self._answers.get(target.host)
        if answer is None or answer.expires_at <= trio.current_time():
            answer = self._judge_literal(target.host)
            if answer is None:
                return None
            self._keep(target.host, answer)
        else:
            self._answers.move_to_end(target.host)
        return answer.at(target)

    async def resolve(self, target: Target) -> tuple[SocketAddress, ...]:
        """Return the addresses to connect to, in the order the system prefers, every one of them allowed.

        Args:
            target: where to; its scheme and path play no part.

        Returns:
            1 to 16 addresses.

        Raises:
            TargetBlocked: the host, or any address it resolves to, is refused. No socket was opened.
            TargetUnresolved: no address, no answer in time, or too many lookups under way. No socket was opened.

        Cancellation: the caller stops waiting; the lookup goes on for the others and for the cache.
        """
        addresses = self.known(target)
        if addresses is not None:
            await trio.lowlevel.checkpoint()
            return addresses
        lookup = self._lookups.get(target.host) or self._start(target.host)
        # Counted from the lookup's start: a host known to be slow refuses its next callers at once.
        with trio.move_on_at(lookup.started_at + self._deadline_seconds):
            await lookup.done.wait()
        if lookup.crash is not None:
            raise AssertionError("the name lookup crashed") from lookup.crash
        if lookup.answer is None:
            why = "the resolver is closing" if lookup.done.is_set() else "no answer in time"
            raise TargetUnresolved(f"{target.host}: {why}")
        return lookup.answer.at(target)

    def _judge_literal(self, host: str) -> _Answer | None:
        """Return the answer for a host that needs no lookup: an address, or what only looks like a name."""
        expires_at = trio.current_time() + self._ttl_seconds
        try:
            literal = ip_address(host)
        except ValueError:
            # A target not made by parse_base_url: inet_aton's other spellings never reach the system's resolver.
            return _Answer(expires_at, blocked="an odd form of an IPv4 address") if _is_numeric(host) else None
        return self._judge(host, [literal], expires_at)

    def _judge(self, host: str, found: Sequence[IPv4Address | IPv6Address], expires_at: float) -> _Answer:
        """Return the answer that the addresses found for a host give: one refused address refuses all."""
        for address in found:
            reason = self._policy.blocked_reason(host, address)
            if reason is not None:
                return _Answer(expires_at, blocked=f"{address} is {reason}")
        kept = tuple(
            (socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6, str(address))
            for address in list(dict.fromkeys(found))[:ADDRESSES_KEPT_MAX]
        )
        return _Answer(expires_at, kept)

    def _start(self, host: str) -> _Lookup:
        if len(self._lookups) >= self._lookups_max:
            raise TargetUnresolved(f"{host}: {self._lookups_max} lookups are under way")
        lookup = _Lookup()
        self._nursery.start_soon(self._run, host, lookup)
        self._lookups[host] = lookup
        return lookup

    async def _run(self, host: str, lookup: _Lookup) -> None:
        try:
            lookup.answer = await self._look_up(host)
            self._keep(host, lookup.answer)
        except Exception as error:  # a bug belongs to the calls that met it; the nursery also serves the others
            lookup.crash = error
        finally:
            del self._lookups[host]
            lookup.done.set()

    async def _look_up(self, host: str) -> _Answer:
        why = "no answer in time"
        infos: Sequence[Any] = ()
        with trio.move_on_after(self._lookup_seconds_max):
            try:
                infos = await self._getaddrinfo(host, None, type=socket.SOCK_STREAM)
                why = "no address"
            except (OSError, UnicodeError) as error:
                why = f"{type(error).__name__}: {error}"
        now = trio.current_time()
        found: list[IPv4Address | IPv6Address] = []
        for family, _, _, _, sockaddr in infos:
            if family not in (socket.AF_INET, socket.AF_INET6):
                continue
            address = ip_address(sockaddr[0])
            if isinstance(address, IPv6Address) and len(sockaddr) > 3 and sockaddr[3] and address.scope_id is None:
                address = IPv6Address(f"{address}%{sockaddr[3]}")  # a zone given as a number: refused as if written
            found.append(address)
        if not found:
            return _Answer(now + self._failure_ttl_seconds, unresolved=why)
        return self._judge(host, found, now + self._ttl_seconds)

    def _keep(self, host: str, answer: _Answer) -> None:
        self._answers[host] = answer
        self._answers.move_to_end(host)
        while len(self._answers) > self._hosts_max:
            self._answers.popitem(last=False)
