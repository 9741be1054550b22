"""The attack corpus: raw requests that have split one reader of HTTP/1.x from another, and what must become of each.

Data only. The parser's tests read it in memory; the gateway's send the same bytes through a socket. A template holds
`{path}`, `{key}` and `{host}`; the priced API behind the path must take any method. Nearly every refused attack is
followed by a second, complete gateway request: where the boundary is misread, that one reaches the upstream.
"""

from collections.abc import Iterator
from itertools import product
from typing import Final, Literal

import attrs

Verdict = Literal["refused", "one"]

DEFAULT_PATH: Final = b"/v1/call/weather/today"
DEFAULT_KEY: Final = b"ck_test_0123456789abcdef0123456789abcdef0123456789abcdef"
DEFAULT_HOST: Final = b"api.callora.example"


@attrs.frozen
class Attack:
    """One raw request, or several in one segment."""

    name: str
    """Unique, and readable in a test's report."""
    raw: bytes
    """What is sent, with the placeholders `{path}`, `{key}` and `{host}`."""
    verdict: Verdict
    """`refused`: the first answer is 4xx and the connection closes; at most the first message ever reaches an
    upstream, and not whole. `one`: exactly one request reaches the upstream, whatever becomes of the bytes after it."""

    def render(self, path: bytes = DEFAULT_PATH, key: bytes = DEFAULT_KEY, host: bytes = DEFAULT_HOST) -> bytes:
        """Return the bytes to send."""
        return self.raw.replace(b"{path}", path).replace(b"{key}", key).replace(b"{host}", host)


_KEY: Final = b"X-Api-Key: {key}"
_HOST: Final = b"Host: {host}"
_SMUGGLED: Final = b"GET {path}?smuggled=1 HTTP/1.1\r\nHost: {host}\r\nX-Api-Key: {key}\r\n\r\n"
_HEALTH: Final = b"GET /api/health HTTP/1.1\r\nHost: {host}\r\n\r\n"
_EMPTY_CHUNKED: Final = b"0\r\n\r\n"
# One length for every rendering would need the lengths of the placeholders, so inner requests are written out.
_INNER: Final = b"GET /v1/call/inner HTTP/1.1\r\nHost: inner.example\r\nContent-Length: 0\r\n\r\n"


def _request(*fields: bytes, line: bytes = b"POST {path} HTTP/1.1", host: bool = True, body: bytes = b"") -> bytes:
    """Return a request with Host and key before the fields given."""
    lines = [line, *([_HOST] if host else []), _KEY, *fields]
    return b"".join(each + b"\r\n" for each in lines) + b"\r\n" + body


def _refused(name: str, *fields: bytes, line: bytes = b"POST {path} HTTP/1.1", host: bool = True) -> Attack:
    """Return an attack in the head, followed by a request that must not be read."""
    return Attack(name, _request(*fields, line=line, host=host, body=_SMUGGLED), "refused")


def _show(value: bytes) -> str:
    return repr(value[:40])[2:-1] + ("…" if len(value) > 40 else "")


def _both_lengths() -> Iterator[Attack]:
    lengths = (b"Content-Length", b"content-length", b"CONTENT-LENGTH")
    codings = (b"Transfer-Encoding", b"transfer-encoding", b"tRANSFER-eNCODING")
    bodies = {
        "chunked wins": (b"4", _EMPTY_CHUNKED + _SMUGGLED),
        "length wins": (b"0", _EMPTY_CHUNKED + _SMUGGLED),
        "length covers": (b"5", _EMPTY_CHUNKED),
    }
    for length, coding, (why, (value, body)) in product(lengths, codings, bodies.items()):
        one, other = length + b": " + value, coding + b": chunked"
        name = f"both lengths, {_show(length)}, {_show(coding)}, {why}"
        yield Attack(f"{name}, length first", _request(one, other, body=body), "refused")
        yield Attack(f"{name}, coding first", _request(other, b"X: y", one, body=body), "refused")
    for value in (b"identity", b"", b"xchunked"):
        yield _refused(f"length and coding {_show(value)}", b"Content-Length: 0", b"Transfer-Encoding: " + value)


def _lengths() -> Iterator[Attack]:
    for one, other in ((b"5", b"5"), (b"5", b"0"), (b"0", b"5"), (b"0", b"0"), (b"5", b"5, 5"), (b"5", b"")):
        for name in (b"Content-Length", b"content-length"):
            title = f"length {_show(one)} then {_show(name)} {_show(other)}"
            first, second = b"Content-Length: " + one, name + b": " + other
            yield _refused(f"{title}, adjacent", first, second)
            yield _refused(f"{title}, apart", first, b"X: y", second)
    for value in (
        *(
            b"+5",
            b"-5",
            b"-0",
            b"+0",
            b"0x5",
            b"0X5",
            b"0b1",
            b"0o5",
            b"x5",
            b"5x",
            b"5L",
            b"5.0",
            b"5.",
            b".5",
            b"5e0",
        ),
        *(
            b"1_0",
            b"5 5",
            b"5\t5",
            b"5,5",
            b"5, 5",
            b"5,",
            b",5",
            b"5;5",
            b"5;",
            b"'5'",
            b'"5"',
            b"(5)",
            b"five",
            b"NaN",
        ),
        *(b"05", b"00", b"010", b"0000000000000005", b"", b" ", b"\xd9\xa5", b"\xef\xbc\x95", b"\xb2", b"\xc2\xb2"),
        *(b"\xa05", b"5\xa0", b"5\x85", b"9007199254740993", b"18446744073709551616", b"18446744073709551621"),
        b"99999999999999999999",
        *(b"-1", b"-9223372036854775808", b"9" * 1000, b"%35", b"5\\", b"$5", b"5/5", b"5:5", b"=5"),
    ):
        yield _refused(f"length {_show(value)}", b"Content-Length: " + value)


def _codings() -> Iterator[Attack]:
    for value in (
        *(b"xchunked", b"chunkedx", b"x-chunked", b"chunked, identity", b"identity, chunked", b"identity", b"gzip"),
        *(b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"chunked,chunked", b"chunked,", b",chunked"),
        *(b", chunked", b"chunked ,", b"chunked;", b"chunked;q=1", b"chunked; a=b", b"", b"'chunked'", b'"chunked"'),
        *(b"chun ked", b"chunked x", b"chunked\tx", b"cow", b"compress", b"deflate", b"trailers", b"0", b"chunke"),
        *(
            b"\xa0chunked",
            b"chunked\xa0",
            b"\x85chunked",
            b"chun\xe2\x84\xaaed",
            b"\xef\xbb\xbfchunked",
            b"chunked\xad",
        ),
        *(
            b"=chunked",
            b"chunked:",
            b"(chunked)",
            b"chunked()",
            b"[chunked]",
            b"\\chunked",
            b"%63hunked",
            b"chunked\xff",
        ),
        *(
            b"\x0bchunked",
            b"\x0cchunked",
            b"\x00chunked",
            b"chunked\x00",
            b"chunked\x0b",
            b"\x1fchunked",
            b"chunked\x7f",
        ),
    ):
        body = _EMPTY_CHUNKED + _SMUGGLED
        yield Attack(f"coding {_show(value)}", _request(b"Transfer-Encoding: " + value, body=body), "refused")
    for one, other in product((b"chunked", b"identity", b""), repeat=2):
        first, second = b"Transfer-Encoding: " + one, b"transfer-encoding: " + other
        yield _refused(f"coding {_show(one)} then {_show(other)}", first, second)
    for keep in (b"X: y", b"Connection: keep-alive", b"Connection: close"):
        yield _refused(
            f"coding in 1.0, {_show(keep)}", b"Transfer-Encoding: chunked", keep, line=b"POST {path} HTTP/1.0"
        )
    for value in (b"Chunked", b"CHUNKED", b"chunked ", b"chunked\t", b"\tchunked", b"   chunked  "):
        raw = _request(b"Transfer-Encoding: " + value, body=b"5\r\nhello\r\n0\r\n\r\n")
        yield Attack(f"harmless coding {_show(value)}", raw, "one")


def _names() -> Iterator[Attack]:
    for name, value in (
        (b"Transfer-Encoding", b"chunked"),
        (b"Content-Length", b"0"),
        (b"Host", b"evil.example"),
        (b"X-Api-Key", b"{key}"),
    ):
        for title, lines in {
            "space before colon": [name + b" : " + value],
            "tab before colon": [name + b"\t: " + value],
            "VT before colon": [name + b"\x0b: " + value],
            "NUL before colon": [name + b"\x00: " + value],
            "NUL before name": [b"\x00" + name + b": " + value],
            "no-break space before colon": [name + b"\xa0: " + value],
            "space before name": [b" " + name + b": " + value],
            "tab before name": [b"\t" + name + b": " + value],
            "soft hyphen": [name.replace(b"-", b"\xad") + b"\xad: " + value],
            "no colon": [name + b" " + value],
            "equals sign": [name + b"=" + value],
            "quoted name": [b'"' + name + b'": ' + value],
            "bracketed name": [b"[" + name + b"]: " + value],
            "value on the next line": [name + b":", b"\t " + value],
            "name on two lines": [name[:4], b" " + name[4:] + b": " + value],
            "after a bare CR": [b"X: y\r" + name + b": " + value],
            "after a bare LF": [b"X: y\n" + name + b": " + value],
            "after LF CR": [b"X: y\n\r" + name + b": " + value],
            "after CR CR LF": [b"X: y\r\r\n" + name + b": " + value],
        }.items():
            yield _refused(f"{_show(name)}: {title}", *lines)
    for line in (b"Content_Length: 5", b"content_length: 0", b"Transfer_Encoding: chunked", b"TRANSFER_ENCODING: x"):
        yield _refused(f"underscore: {_show(line)}", line)
    for line in (
        b": value",
        b":",
        b"::",
        b" ",
        b"\t",
        b"name",
        b"na me: x",
        b"(name): x",
        b"n\xc3\xa4me: x",
        b"name\xff: x",
    ):
        yield _refused(f"field line {_show(line)}", line)


def _octets() -> Iterator[Attack]:
    """Each octet that no line may hold, at every kind of place."""
    places = {
        "before the method": b"@POST {path} HTTP/1.1\r\n",
        "in the method": b"PO@ST {path} HTTP/1.1\r\n",
        "after the method": b"POST@ {path} HTTP/1.1\r\n",
        "for the first space": b"POST@{path} HTTP/1.1\r\n",
        "before the target": b"POST @{path} HTTP/1.1\r\n",
        "in the target": b"POST {path}@x HTTP/1.1\r\n",
        "in the query": b"POST {path}?a=@b HTTP/1.1\r\n",
        "for the second space": b"POST {path}@HTTP/1.1\r\n",
        "in the version": b"POST {path} HTTP/@1.1\r\n",
        "after the version": b"POST {path} HTTP/1.1@\r\n",
        "before a name": b"POST {path} HTTP/1.1\r\n@X: y\r\n",
        "in a name": b"POST {path} HTTP/1.1\r\nX@X: y\r\n",
        "after the colon": b"POST {path} HTTP/1.1\r\nX:@y\r\n",
        "in a value": b"POST {path} HTTP/1.1\r\nX: y@z\r\n",
        "after a value": b"POST {path} HTTP/1.1\r\nX: y@\r\n",
    }
    octets = {"LF": b"\n", "CR": b"\r", "NUL": b"\0", "VT": b"\v", "FF": b"\f", "ESC": b"\x1b", "DEL": b"\x7f"}
    for (place, template), (octet_name, octet) in product(places.items(), octets.items()):
        head = template.replace(b"@", octet) + _HOST + b"\r\n" + _KEY + b"\r\n\r\n"
        yield Attack(f"{octet_name} {place}", head + _SMUGGLED, "refused")
    ends = {"LF": b"\n", "CR": b"\r", "LF CR": b"\n\r", "CR CR LF": b"\r\r\n", "CR LF LF": b"\r\n\n", "none": b""}
    lines = (b"POST {path} HTTP/1.1", _HOST, _KEY, b"")
    for number in range(len(lines)):
        for title, end in ends.items():
            if (number, title) in ((0, "CR CR LF"), (3, "none")):
                continue  # the same bytes as another attack
            pieces = [line + (end if index == number else b"\r\n") for index, line in enumerate(lines)]
            # With CR LF LF after its empty line the first request is whole, and what follows it is refused.
            verdict: Verdict = "one" if (number, title) == (3, "CR LF LF") else "refused"
            yield Attack(f"line {number + 1} ends with {title}", b"".join(pieces) + _SMUGGLED, verdict)
    for title, end in {"LF": b"\n", "CR": b"\r", "CR CR LF": b"\r\r\n", "LF CR": b"\n\r"}.items():
        yield Attack(f"every line ends with {title}", end.join((*lines, b"")) + _SMUGGLED, "refused")


def _folds() -> Iterator[Attack]:
    for blank in (b" ", b"\t", b"  ", b" \t"):
        for title, lines in {
            "plain": [b"X: y", blank + b"z"],
            "empty": [b"X: y", blank],
            "first value": [b"X:", blank + b"y"],
            "length": [b"Content-Length:", blank + b"0"],
            "coding": [b"Transfer-Encoding:", blank + b"chunked"],
            "coding in the fold": [b"X: y", blank + b"Transfer-Encoding: chunked"],
        }.items():
            yield _refused(f"fold {title}, {_show(blank)}", *lines)
        raw = b"POST {path} HTTP/1.1\r\n" + blank + b"X: y\r\n" + _HOST + b"\r\n" + _KEY + b"\r\n\r\n" + _SMUGGLED
        yield Attack(f"fold after the request line, {_show(blank)}", raw, "refused")


def _hosts() -> Iterator[Attack]:
    yield from (
        _refused("no host", host=False),
        _refused("host twice, equal", _HOST),
        _refused("host twice, other case", b"HOST: {host}"),
        _refused("host twice, differing", b"Host: evil.example"),
        _refused("host twice in 1.0", _HOST, line=b"GET {path} HTTP/1.0"),
    )
    for value in (
        *(b"", b" ", b"a b", b"a,b", b"a, b", b"a/b", b"/", b"user@host", b"@host", b"user:pw@host", b"http://host"),
        *(b"//host", b"host:", b"host:b", b"host:80:80", b"host:99999", b"host:65536", b"host:+80", b"host:-1", b":80"),
        *(
            b"[::1",
            b"::1",
            b"[::1]x",
            b"[g::1]",
            b"[]",
            b"[::1%25eth0]",
            b"[::1]:x",
            b"[1.2.3.4]",
            b"[:::]",
            b"a#b",
            b"a?b",
        ),
        *(
            b"a\\b",
            b"<a>",
            b"a%00b",
            b"a%2fb",
            b"a\tb",
            b"a;b",
            b"a\xff",
            b"\xc3\xa4.example",
            b"*",
            b"'a'",
            b'"a"',
            b"a&b",
        ),
        *(b"{host}, evil.example", b"{host}:80@evil.example", b"{host} evil.example", b"a" * 256, b"a|b", b"{host}!"),
    ):
        yield _refused(f"host {_show(value)}", b"Host: " + value, host=False)
    yield Attack("no host in 1.0", _request(line=b"GET {path} HTTP/1.0", host=False), "one")
    for value in (b"127.0.0.1", b"127.0.0.1:8080", b"[::1]:8080", b"LOCALHOST", b"a_b.example"):
        raw = _request(b"Host: " + value, line=b"GET {path} HTTP/1.1", host=False)
        yield Attack(f"harmless host {_show(value)}", raw, "one")


def _request_lines() -> Iterator[Attack]:
    for line in (
        *(
            b"GET http://{host}{path} HTTP/1.1",
            b"GET https://{host}{path} HTTP/1.1",
            b"GET HTTP://{host}{path} HTTP/1.1",
        ),
        *(b"GET http://evil.example{path} HTTP/1.1", b"GET ftp://{host}{path} HTTP/1.1", b"GET file:///etc HTTP/1.1"),
        *(
            b"GET {host} HTTP/1.1",
            b"GET {host}:443 HTTP/1.1",
            b"GET {host}{path} HTTP/1.1",
            b"GET @{host}{path} HTTP/1.1",
        ),
        *(b"CONNECT {host}:443 HTTP/1.1", b"CONNECT {path} HTTP/1.1", b"CONNECT / HTTP/1.1", b"CONNECT * HTTP/1.1"),
        *(b"CONNECT http://{host}/ HTTP/1.1", b"CONNECT {host}:443 HTTP/1.0", b"connect {host}:443 HTTP/1.1"),
        *(
            b"GET * HTTP/1.1",
            b"POST * HTTP/1.1",
            b"HEAD * HTTP/1.1",
            b"OPTIONS ** HTTP/1.1",
            b"OPTIONS *{path} HTTP/1.1",
        ),
        *(b"GET  HTTP/1.1", b"GET HTTP/1.1", b"GET ?a HTTP/1.1", b"GET v1/call HTTP/1.1", b"GET #{path} HTTP/1.1"),
        *(
            b"GET {path}#fragment HTTP/1.1",
            b"GET {path}?a#b HTTP/1.1",
            b"GET {path}# HTTP/1.1",
            b"GET \\{path} HTTP/1.1",
        ),
        *(b"GET {path} x HTTP/1.1", b"GET {path}?a b HTTP/1.1", b"GET  {path} HTTP/1.1", b"GET {path}  HTTP/1.1"),
        *(b"GET\t{path} HTTP/1.1", b"GET {path}\tHTTP/1.1", b"GET {path}\xa0HTTP/1.1", b"GET\xa0{path} HTTP/1.1"),
        *(
            b"GET {path}\xff HTTP/1.1",
            b"GET {path}?\xc3\xa4 HTTP/1.1",
            b"GET /\xe2\x81\x84v1 HTTP/1.1",
            b"GET .{path} HTTP/1.1",
        ),
        *(b"GET {path} HTTP/1.1 HTTP/1.1", b"GET {path} HTTP/1.1 ", b"GET {path} HTTP/1.1\t", b" GET {path} HTTP/1.1"),
        *(
            b"GET {path} HTTP/0.9",
            b"GET {path} HTTP/1.2",
            b"GET {path} HTTP/2.0",
            b"GET {path} HTTP/2",
            b"GET {path} HTTP/3",
        ),
        *(
            b"GET {path} HTTP/1",
            b"GET {path} HTTP/1.",
            b"GET {path} HTTP/.1",
            b"GET {path} HTTP/1.10",
            b"GET {path} HTTP/1.1.1",
        ),
        *(b"GET {path} HTTP/01.1", b"GET {path} HTTP/1.01", b"GET {path} http/1.1", b"GET {path} Http/1.1"),
        *(b"GET {path} HTTP/1,1", b"GET {path} HTTP /1.1", b"GET {path} HTTP/ 1.1", b"GET {path} HTTPS/1.1"),
        *(b"GET {path} HTTP/+1.1", b"GET {path} HTTP/-1.1", b"GET {path} HTTP/1.\xd9\xa1", b"GET {path} HTTP/1.1;x"),
        *(
            b"GET {path} HTTP",
            b"GET {path} HTTP/",
            b"GET {path} ICY/1.1",
            b"GET {path} XHTTP/1.1",
            b"GET {path} HTTP\\1.1",
        ),
        *(
            b"GET {path}",
            b"GET",
            b"GET ",
            b"{path}",
            b"{path} HTTP/1.1",
            b"HTTP/1.1",
            b"GET,{path},HTTP/1.1",
            b"GET{path}",
        ),
        *(b"get {path} HTTP/1.1", b"Get {path} HTTP/1.1", b"post {path} HTTP/1.1", b"gET {path} HTTP/1.1"),
        *(b"A" * 33 + b" {path} HTTP/1.1", b"A" * 4000 + b" {path} HTTP/1.1", b"PO(ST {path} HTTP/1.1"),
        *(b"P\xc3\x96ST {path} HTTP/1.1", b'"GET" {path} HTTP/1.1', b"GET: {path} HTTP/1.1", b"[GET] {path} HTTP/1.1"),
        *(
            b"G=T {path} HTTP/1.1",
            b"GET, {path} HTTP/1.1",
            b"GET/ {path} HTTP/1.1",
            b"{GET} {path} HTTP/1.1",
            b"@ / HTTP/1.1",
        ),
        *(
            b"GET /" + b"a" * 8192 + b" HTTP/1.1",
            b"GET {path}?" + b"a" * 20000 + b" HTTP/1.1",
            b"GET /" + b"%61" * 3000,
        ),
    ):
        yield _refused(f"request line {_show(line)} ({len(line)} bytes)", line=line)
    for query in (
        b"?",
        b"??",
        b"?a=%00",
        b"?%zz",
        b"?%",
        b"?a?b",
        b"?//evil.example/",
        b"?/../../",
        b"?a=%0d%0aHost:%20x",
    ):
        raw = _request(line=b"GET {path}" + query + b" HTTP/1.1")
        yield Attack(f"harmless query {_show(query)}", raw, "one")
    for query in (
        b"?http://evil.example/",
        b"?a=%0aTransfer-Encoding:chunked",
        b"?a[]=<x>|{y}^`\\",
        b"?%C0%AE%C0%AE",
        b"?@:;",
    ):
        raw = _request(line=b"GET {path}" + query + b" HTTP/1.1")
        yield Attack(f"harmless query {_show(query)}", raw, "one")


def _preludes() -> Iterator[Attack]:
    for title, prelude in {
        "empty line": b"\r\n",
        "two empty lines": b"\r\n\r\n",
        "bare LF": b"\n",
        "bare CR": b"\r",
        "space": b" ",
        "tab": b"\t",
        "NUL": b"\0",
        "byte order mark": b"\xef\xbb\xbf",
        "TLS ClientHello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)),
        "SSLv2 ClientHello": b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10",
        "h2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        "h2 preface without its end": b"PRI * HTTP/2.0\r\n",
        "PROXY v1": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY v2": b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + bytes(12),
        "SOCKS5": b"\x05\x01\x00",
        "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
        "SMTP": b"EHLO client.example\r\n",
        "RESP": b"*1\r\n$4\r\nPING\r\n",
        "memcached": b"version\r\n",
        "a response": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/0.9": b"GET {path}\r\n",
        "HTTP/0.9 with LF": b"GET {path}\n",
        "HTTP/0.9, path only": b"{path}\r\n",
        "last chunk": b"0\r\n\r\n",
        "chunk": b"5\r\nhello\r\n0\r\n\r\n",
        "JSON": b'{"a":1}\r\n',
        "websocket frame": b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58",
    }.items():
        yield Attack(f"prelude {title}", prelude + _SMUGGLED, "refused")


def _sizes() -> Iterator[Attack]:
    yield from (
        _refused("101 headers", *(b"X-%d: y" % number for number in range(99))),
        _refused("101 equal headers", *(b"X: y",) * 99),
        _refused("5000 headers", *(b"X-%d: y" % number for number in range(5000))),
        _refused("5000 empty headers", *(b"X:",) * 5000),
        _refused("value of 33 KiB", b"X: " + b"y" * 33792),
        _refused("value of 1 MiB", b"X: " + b"y" * 1048576),
        _refused("blanks of 33 KiB", b"X: y" + b" " * 33792),
        _refused("name of 33 KiB", b"X" * 33792 + b": y"),
        _refused("line of 33 KiB without colon", b"X" * 33792),
        _refused("head of 33 KiB in large headers", *(b"X-%d: %b" % (number, b"y" * 1024) for number in range(33))),
        Attack("endless request line", b"GET {path}?" + b"a" * 40000, "refused"),
        Attack("endless method", b"G" * 40000, "refused"),
        Attack("endless header", b"GET {path} HTTP/1.1\r\nX: " + b"a" * 40000, "refused"),
    )
    raw = _request(*(b"X-%d: y" % number for number in range(90)), line=b"GET {path} HTTP/1.1")
    yield Attack("harmless 92 headers", raw, "one")
    raw = _request(b"X: " + b"y" * 30000, line=b"GET {path} HTTP/1.1")
    yield Attack("harmless value of 30 000 bytes", raw, "one")


def _chunked(title: str, body: bytes, verdict: Verdict = "refused") -> Attack:
    follow = _SMUGGLED if verdict == "refused" else b""
    return Attack(f"chunk: {title}", _request(b"Transfer-Encoding: chunked", body=body + follow), verdict)


def _chunks() -> Iterator[Attack]:
    rest = b"\r\nhello\r\n0\r\n\r\n"
    for size in (
        *(
            b"",
            b"g",
            b"5g",
            b"0x5",
            b"0X5",
            b"x5",
            b"+5",
            b"-5",
            b" 5",
            b"\t5",
            b"5 ",
            b"5\t",
            b"5 ;a",
            b"5,5",
            b"5.",
            b"5.0",
        ),
        *(
            b"5\x00",
            b"\x005",
            b"5\x0b",
            b"\x0b5",
            b"5\xa0",
            b"\xa05",
            b"5:5",
            b"5=5",
            b"5'",
            b'"5"',
            b"(5)",
            b"5_0",
            b"5h",
        ),
        *(b"10000000000000000", b"FFFFFFFFFFFFFFFF", b"7fffffffffffffff", b"FFFFFFFFFFFFFFFFF", b"fffffffffffffffff5"),
        *(b"00000000000000005", b"0" * 300 + b"5", b"8000000000000000", b"20000000000001", b"100000000000000005"),
        *(
            b"\xd9\xa5",
            b"\xef\xbc\x95",
            b"\xb2",
            b"5\n",
            b"5\r",
            b"\n5",
            b"\r5",
            b"\r\n5",
            b"5\n\r",
            b"5\r\r",
            b"-0",
            b"+0",
        ),
        *(b"5;" + b"a" * 256, b"5;" + b"a" * 40000, b"5;a\x00b", b"5;a\nb", b"5;a\rb", b"5;\n", b"5;\x7f", b"5;a\x1bb"),
        *(b"5;a=\xff", b"5;a\tb", b"5;\nX", b'5;a="\n"', b"5\\", b"%35", b"#5", b"5#", b"5//", b"hello"),
    ):
        yield _chunked(f"size {_show(size)} ({len(size)} bytes)", size + rest)
    for title, body in {
        "size ends with LF": b"5\nhello\r\n0\r\n\r\n",
        "size ends with CR": b"5\rhello\r\n0\r\n\r\n",
        "data ends with LF": b"5\r\nhello\n0\r\n\r\n",
        "data ends with CR": b"5\r\nhello\r0\r\n\r\n",
        "data ends with LF CR": b"5\r\nhello\n\r0\r\n\r\n",
        "data without end": b"5\r\nhello0\r\n\r\n",
        "data too long": b"5\r\nhello!\r\n0\r\n\r\n",
        "data too long by CR": b"5\r\nhello\r\r\n0\r\n\r\n",
        "data too short": b"7\r\nhello\r\n0\r\n\r\n",
        "data too short by one": b"6\r\nhello\r\n0\r\n\r\n",
        "extra CRLF after data": b"5\r\nhello\r\n\r\n0\r\n\r\n",
        "last chunk ends with LF": b"0\n\r\n",
        "last chunk ends with CR": b"0\r\r\n",
        "empty line is LF": b"0\r\n\n",
        "empty line is CR": b"0\r\n\rX\r\n",
        "everything with LF": b"5\nhello\n0\n\n",
        "no empty line": b"0\r\n",
        "minus zero": b"-0\r\n\r\n",
        "last chunk 0x0": b"0x0\r\n\r\n",
        "last chunk with blank": b"0 \r\n\r\n",
        "last chunk with LF extension": b"0;\n\r\n\r\n",
        "extension flood": (b"1;" + b"a" * 250 + b"\r\nx\r\n") * 600 + b"0\r\n\r\n",
    }.items():
        yield _chunked(title, body)
    for name in (
        *(b"Content-Length", b"transfer-encoding", b"Host", b"Authorization", b"X-Api-Key", b"Cookie", b"Connection"),
        *(b"Expect", b"TE", b"Trailer", b"Upgrade", b"Content-Type", b"Content-Encoding", b"Idempotency-Key", b"Range"),
        *(b"X-Forwarded-For", b"Forwarded", b"Content_Length", b"If-Match", b"Cache-Control", b"Keep-Alive"),
    ):
        yield _chunked(f"trailer {_show(name)}", b"5\r\nhello\r\n0\r\n" + name + b": 1\r\n\r\n")
    for line in (
        *(b"X : y", b" X: y", b"X: y\r\n z", b": y", b"X", b"X: y\x00", b"X\x00: y", b"X: a\rb", b"X: a\nb", b"X: y\n"),
        *(
            b"X: y\r",
            b"X: " + b"y" * 9000,
            b"X" * 9000,
            b"(X): y",
            b"X: \x7f",
            b"\r",
            b"\n",
            b"\tX: y",
            b"GET / HTTP/1.1",
        ),
        b"\r\n".join(b"X-%d: y" % number for number in range(101)),
    ):
        yield _chunked(f"trailer line {_show(line)} ({len(line)})", b"0\r\n" + line + b"\r\n\r\n")
    for title, body in {
        "plain": b"5\r\nhello\r\n0\r\n\r\n",
        "empty": b"0\r\n\r\n",
        "upper-case hex": b"A\r\n0123456789\r\n0\r\n\r\n",
        "leading zeros": b"0000000000000005\r\nhello\r\n0\r\n\r\n",
        "last chunk 000": b"5\r\nhello\r\n000\r\n\r\n",
        "extension": b"5;a=b\r\nhello\r\n0;last\r\n\r\n",
        "quoted extension": b'5;a="b c";d\r\nhello\r\n0\r\n\r\n',
        "extension with a request": b"5;GET / HTTP/1.1\r\nhello\r\n0\r\n\r\n",
        "trailer": b"5\r\nhello\r\n0\r\nX-Checksum: 1\r\n\r\n",
        "1-byte chunks": b"1\r\nx\r\n" * 200 + b"0\r\n\r\n",
        "CRLF as data": b"2\r\n\r\n\r\n4\r\n\r\n\r\n\r\n0\r\n\r\n",
        "a last chunk as data": b"5\r\n0\r\n\r\n\r\n0\r\n\r\n",
        "a request as data": b"%x\r\n%b\r\n0\r\n\r\n" % (len(_INNER), _INNER),
    }.items():
        yield _chunked(f"harmless {title}", body, "one")


def _options() -> Iterator[Attack]:
    for value in (
        *(b"content-length", b"Transfer-Encoding", b"host", b"close, content-length", b"keep-alive, Host", b"a b"),
        *(b"a;b", b"(x)", b"close\xff", b'"close"', b"close, a=b", b"close;", b"a/b", b"X-Api-Key\xa0", b"{close}@"),
    ):
        yield _refused(f"connection {_show(value)}", b"Connection: " + value, b"Content-Length: 0")
    for value in (b"200-ok", b"100-continue, x", b"", b"100", b"100-continue;q=1", b"x100-continue"):
        yield _refused(f"expect {_show(value)}", b"Expect: " + value, b"Content-Length: 0")
    yield _refused("expect twice", *(b"Expect: 100-continue",) * 2, b"Content-Length: 0")


def _harmless() -> Iterator[Attack]:
    for method in (b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"):
        line = method + b" {path} HTTP/1.1"
        raw = _request(b"Content-Length: %d" % len(_INNER), line=line, body=_INNER)
        yield Attack(f"harmless {_show(method)} with a request as body", raw, "one")
    for field in (
        *(
            b"X-Content-Length: 5",
            b"Content-Lengths: 5",
            b"Content-Length-: 5",
            b"Transfer-Encodings: chunked",
            b"TE: chunked",
        ),
        *(
            b"X-Transfer-Encoding: chunked",
            b"Trailer: Content-Length",
            b"X: GET / HTTP/1.1",
            b"X: \xff\xfe",
            b"X:",
            b"X: \t ",
        ),
        *(
            b"X:y",
            b"X:\ty\t",
            b"X: Transfer-Encoding: chunked",
            b"Connection: keep-alive, , X",
            b"Connection: ,",
            b"Keep-Alive: x",
        ),
        *(
            b"X-Http-Method-Override: PUT",
            b"X-Original-Url: /admin",
            b"X-Forwarded-Host: evil.example",
            b"!#$%&'*+.^_`|~: y",
        ),
        *(b"Content-Length:0", b"Content-Length: 0 ", b"Content-Length:\t0", b"content-length:   0\t"),
    ):
        yield Attack(f"harmless field {_show(field)}", _request(field, line=b"GET {path} HTTP/1.1"), "one")


def _pipelines() -> Iterator[Attack]:
    get = _request(line=b"GET {path} HTTP/1.1")
    length = _request(b"Content-Length: 5", body=b"hello")
    chunked = _request(b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n")
    inner = _request(b"Content-Length: %d" % len(_INNER), body=_INNER)
    for title, call in {"get": get, "length": length, "chunked": chunked, "inner": inner}.items():
        yield Attack(f"lanes: {title}, then health", call + _HEALTH, "one")
        yield Attack(f"lanes: health, then {title}", _HEALTH + call, "one")
        yield Attack(f"lanes: health, {title}, health", _HEALTH + call + _HEALTH, "one")
        for rest_title, rest in {
            "garbage": b"\x00\x01\x02\x03",
            "an empty line": b"\r\n" + _SMUGGLED,
            "h2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "a request with bare LF": _SMUGGLED.replace(b"\r\n", b"\n"),
            "HTTP/0.9": b"GET {path}\r\n" + _SMUGGLED,
            "both lengths": _request(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=_EMPTY_CHUNKED),
            "CONNECT": b"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}\r\n\r\n",
        }.items():
            yield Attack(f"pipeline: {title}, then {rest_title}", call + rest, "one")
    last = _request(b"Connection: close", line=b"GET {path} HTTP/1.1")
    yield Attack("pipeline: after close", last + _SMUGGLED, "one")
    last = _request(b"Connection: keep-alive, CLOSE", line=b"GET {path} HTTP/1.1")
    yield Attack("pipeline: after keep-alive, close", last + _SMUGGLED, "one")
    last = _request(line=b"GET {path} HTTP/1.0")
    yield Attack("pipeline: after 1.0", last + _SMUGGLED, "one")


ATTACKS: Final[list[Attack]] = [
    *_both_lengths(),
    *_lengths(),
    *_codings(),
    *_names(),
    *_octets(),
    *_folds(),
    *_hosts(),
    *_request_lines(),
    *_preludes(),
    *_sizes(),
    *_chunks(),
    *_options(),
    *_harmless(),
    *_pipelines(),
]
