"""The head parser: what it takes, what it refuses, and that h11 reads everything it takes in the same way."""

import time
from collections.abc import Callable

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.http.gateway.heads import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_TARGET_BYTES,
    BadHead,
    RequestHead,
    ResponseHead,
    find_head_end,
    find_response_head_end,
    parse_request,
    parse_response,
)

quick = settings(max_examples=400, database=None)


def request(*fields: bytes, line: bytes = b"POST /v1/call/a HTTP/1.1", host: bool = True) -> RequestHead:
    lines = (line, *([b"Host: a.example"] if host else []), *fields)
    return parse_request(b"".join(each + b"\r\n" for each in lines) + b"\r\n")


def response(*fields: bytes, line: bytes = b"HTTP/1.1 200 OK") -> ResponseHead:
    return parse_response(b"".join(each + b"\r\n" for each in (line, *fields)) + b"\r\n")


def refusal(*fields: bytes, line: bytes = b"POST /v1/call/a HTTP/1.1", host: bool = True) -> BadHead:
    with pytest.raises(BadHead) as caught:
        request(*fields, line=line, host=host)
    return caught.value


def taken_or_refused(read: Callable[[bytes], object], raw: bytes) -> object:
    """Return what was read, or the refusal, which is the only exception there may be."""
    try:
        return read(raw)
    except BadHead as refused:
        return refused


def read_request(raw: bytes) -> RequestHead | BadHead | None:
    try:
        end = find_head_end(raw)
        return parse_request(raw[:end]) if end >= 0 else None
    except BadHead as refused:
        return refused


def test_every_part_of_a_request_arrives_byte_for_byte() -> None:
    head = request(
        b"X-Api-Key:  secret \t",
        b"ACCEPT: text/html",
        b"accept:application/json",
        b"X-Empty:",
        b"X-Blank:   ",
        b"X-Latin: \xe4\xff",
        line=b"PATCH /v1/call/a/../%2e%zz//b?x=1?y=%00 HTTP/1.1",
    )
    assert (head.method, head.minor) == ("PATCH", 1)
    assert head.target == b"/v1/call/a/../%2e%zz//b?x=1?y=%00"
    assert (head.path, head.query) == (b"/v1/call/a/../%2e%zz//b", b"x=1?y=%00")
    assert head.fields == [
        (b"Host", b"a.example"),
        (b"X-Api-Key", b"secret"),
        (b"ACCEPT", b"text/html"),
        (b"accept", b"application/json"),
        (b"X-Empty", b""),
        (b"X-Blank", b""),
        (b"X-Latin", b"\xe4\xff"),
    ]
    assert head.repeated
    assert head.first(b"accept") == b"text/html"
    assert head.values(b"accept") == [b"text/html", b"application/json"]
    assert head.values(b"x-api-key") == [b"secret"]
    assert head.first(b"x-empty") == b""
    assert head.first(b"absent") is None
    assert head.values(b"absent") == []
    assert (head.content_length, head.chunked, head.expect_continue, head.upgrade) == (None, False, False, False)


def test_without_repeated_names_the_index_runs_parallel_to_the_fields() -> None:
    head = request(b"B: 1", b"A: 2", b"Content-Length: 0")
    assert not head.repeated
    assert [name for name, _ in head.fields] == [b"Host", b"B", b"A", b"Content-Length"]
    assert list(head.index) == [b"host", b"b", b"a", b"content-length"]


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [(b"/", b"/", None), (b"/?", b"/", b""), (b"//x", b"//x", None), (b"/a??b", b"/a", b"?b")],
)
def test_path_and_query_part_at_the_first_question_mark(target: bytes, path: bytes, query: bytes | None) -> None:
    head = request(line=b"GET " + target + b" HTTP/1.1")
    assert (head.target, head.path, head.query) == (target, path, query)


def test_the_asterisk_is_for_options_alone() -> None:
    assert request(line=b"OPTIONS * HTTP/1.1").path == b"*"
    assert refusal(line=b"GET * HTTP/1.1").status == 400


@pytest.mark.parametrize(
    ("minor", "connection", "keep_alive"),
    [
        (b"1", [], True),
        (b"1", [b"keep-alive"], True),
        (b"1", [b"Close"], False),
        (b"1", [b"keep-alive, close"], False),
        (b"1", [b"keep-alive", b"close"], False),
        (b"1", [b",x, ,CLOSE,"], False),
        (b"1", [b""], True),
        (b"0", [], False),
        (b"0", [b"Keep-Alive"], True),
        (b"0", [b"x ,\tKEEP-ALIVE"], True),
        (b"0", [b"keep-alive, close"], False),
    ],
)
def test_version_and_connection_decide_whether_the_connection_lives(
    minor: bytes, connection: list[bytes], keep_alive: bool
) -> None:
    fields = [b"Connection: " + value for value in connection]
    assert request(*fields, line=b"GET / HTTP/1." + minor).keep_alive is keep_alive
    assert response(*fields, line=b"HTTP/1." + minor + b" 200 OK").keep_alive is keep_alive


def test_connection_names_are_gathered_from_every_line_in_lower_case() -> None:
    head = request(b"Connection: X-One, close", b"connection: TE")
    assert head.connection_tokens == {b"x-one", b"close", b"te"}


def test_framing_is_what_the_fields_say() -> None:
    assert request(b"Content-Length: 9007199254740992").content_length == 2**53
    assert request(b"Content-Length:0").content_length == 0
    head = request(b"Transfer-Encoding: Chunked ")
    assert (head.chunked, head.content_length) == (True, None)


def test_the_client_waits_for_100_only_where_it_announced_a_body() -> None:
    assert request(b"Expect: 100-Continue", b"Content-Length: 5").expect_continue
    assert request(b"Expect: 100-continue", b"Transfer-Encoding: chunked").expect_continue
    assert not request(b"Expect: 100-continue", b"Content-Length: 0").expect_continue
    assert not request(b"Expect: 100-continue").expect_continue
    assert not request(b"Expect: 100-continue", b"Content-Length: 5", line=b"POST / HTTP/1.0").expect_continue


def test_an_upgrade_needs_both_fields() -> None:
    assert request(b"Upgrade: websocket", b"Connection: Upgrade").upgrade
    assert request(b"Upgrade: websocket", b"Connection: keep-alive, upgrade").upgrade
    assert not request(b"Upgrade: websocket").upgrade
    assert not request(b"Connection: Upgrade").upgrade


@pytest.mark.parametrize(
    "host",
    [
        b"a",
        b"a.example:80",
        b"A-b_c~d.example",
        b"1.2.3.4",
        b"1.2.3.4:65535",
        b"[::1]",
        b"[::ffff:1.2.3.4]:0",
        b"a" * 255,
    ],
)
def test_a_host_is_a_name_or_an_address_with_an_optional_port(host: bytes) -> None:
    assert request(b"Host: " + host, host=False).host == host


def test_http_1_0_needs_no_host() -> None:
    assert request(line=b"GET / HTTP/1.0", host=False).host is None
    assert "missing" in str(refusal(host=False))


def test_limits_are_exact_and_have_their_own_status() -> None:
    filler = [b"X-%d: y" % number for number in range(MAX_HEADERS)]
    assert len(request(*filler[:-1]).fields) == MAX_HEADERS
    assert (refusal(*filler).status, refusal(*filler).code) == (431, "REQUEST_HEADER_TOO_LARGE")

    target = b"/" + b"a" * (MAX_TARGET_BYTES - 1)
    assert request(line=b"GET " + target + b" HTTP/1.1").target == target
    too_long = refusal(line=b"GET " + target + b"a HTTP/1.1")
    assert (too_long.status, too_long.code) == (414, "URI_TOO_LONG")

    assert request(line=b"M" * 32 + b" / HTTP/1.1").method == "M" * 32
    assert refusal(line=b"M" * 33 + b" / HTTP/1.1").status == 400

    frame = b"GET / HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n"
    head = frame.replace(b"X: ", b"X: " + b"y" * (MAX_HEAD_BYTES - len(frame)))
    assert find_head_end(head) == MAX_HEAD_BYTES
    longer = head.replace(b"X: ", b"X: y")
    for bytes_so_far in (longer, longer[: MAX_HEAD_BYTES + 1]):
        with pytest.raises(BadHead) as caught:
            find_head_end(bytes_so_far)
        assert (caught.value.status, caught.value.code) == (431, "REQUEST_HEADER_TOO_LARGE")
        with pytest.raises(BadHead):
            find_response_head_end(b"HTTP/1.1 200 OK" + bytes_so_far[15:])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ([b"Content-Length: 5", b"Transfer-Encoding: chunked"], "both"),
        ([b"Content-Length: 5", b"Content-Length: 5"], "more than once"),
        ([b"Content-Length: 05"], "one decimal number"),
        ([b"Transfer-Encoding: gzip, chunked"], "exactly `chunked`"),
        ([b"Host: a.example"], "more than once"),
        ([b"X: y", b" z"], "folded"),
        ([b"X : y"], "before the colon"),
        ([b"X: a\nb"], "CRLF"),
        ([b"X: a\rb"], "CRLF"),
        ([b"X: a\0b"], "control character"),
        ([b"Connection: content-length"], "must not name"),
        ([b"Expect: x"], "100-continue"),
        ([b"Content_Length: 5"], "hyphen"),
    ],
)
def test_a_refusal_says_what_was_wrong(fields: list[bytes], words: str) -> None:
    refused = refusal(*fields)
    assert (refused.status, refused.code) == (400, "BAD_REQUEST")
    assert words in str(refused)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"GET http://a.example/ HTTP/1.1", "begins with `/`"),
        (b"CONNECT a:443 HTTP/1.1", "CONNECT"),
        (b"CONNECT /a HTTP/1.1", "CONNECT"),
        (b"GET / HTTP/2.0", "HTTP/1.1 and HTTP/1.0"),
        (b"GET /", "HTTP/0.9"),
        (b"get / HTTP/1.1", "upper-case"),
        (b"GET /a#b HTTP/1.1", "`#`"),
        (b"GET /\xff HTTP/1.1", "visible ASCII"),
        (b"GET /\0 HTTP/1.1", "control character"),
    ],
)
def test_a_refused_request_line_says_why(line: bytes, words: str) -> None:
    assert words in str(refusal(line=line))


def test_what_is_after_the_head_is_no_part_of_it() -> None:
    with pytest.raises(BadHead):
        parse_request(b"GET / HTTP/1.1\r\nHost: a\r\n\r\nX")
    with pytest.raises(BadHead):
        parse_request(b"GET / HTTP/1.1\r\nHost: a\r\n\r\nX: y\r\n\r\n")
    with pytest.raises(BadHead):
        parse_request(b"GET / HTTP/1.1\r\nHost: a\r\n")
    with pytest.raises(BadHead):
        parse_request(b"")


def test_the_end_of_a_head_is_found_whatever_the_segments() -> None:
    raw = b"GET /a HTTP/1.1\r\nHost: a\r\nX: \t y\r\n\r\n"
    for tail in (b"", b"G", raw):
        for cut in range(1, len(raw)):
            buffer = bytearray(raw[:cut])
            assert find_head_end(buffer, 0) == -1
            resumed = max(0, cut - 3)
            buffer += raw[cut:] + tail
            assert find_head_end(buffer, resumed) == len(raw)
    assert find_head_end(b"") == -1


@pytest.mark.parametrize(
    "begun",
    [
        b"\x16\x03\x01\x02",
        b"\x80",
        b"\r",
        b"\n",
        b" ",
        b"\0",
        b"g",
        b"(",
        b"GE\t",
        b"PRI * HTTP/2.0\r\n",
        b"GET /\r\n",
        b"GET /\n",
        b"GET / HTTP/1.1\n",
        b"GET / HTTP/1.1\r\nX: y\n",
        b"GET / HTTP/1.1\r\nX: y\rz",
        b"GET / HTTP/1.1\r\nX: \x7f",
        b"M" * 33,
    ],
)
def test_bytes_that_can_never_become_a_request_are_refused_before_the_head_ends(begun: bytes) -> None:
    with pytest.raises(BadHead) as whole:
        find_head_end(begun)
    assert whole.value.status == 400
    trickled = [
        taken_or_refused(lambda so_far: find_head_end(so_far, max(0, len(so_far) - 4)), begun[:size])
        for size in range(1, len(begun) + 1)
    ]
    assert any(isinstance(each, BadHead) for each in trickled)


def test_an_endless_target_is_refused_before_its_line_ends() -> None:
    with pytest.raises(BadHead) as caught:
        find_head_end(b"GET /" + b"a" * (MAX_TARGET_BYTES + 60))
    assert caught.value.status == 414


def test_a_response_that_is_not_http_is_refused_at_its_first_bytes() -> None:
    assert find_response_head_end(b"HTTP") == -1
    assert find_response_head_end(b"HTTP/1.1 200 OK\r\nA: b\r") == -1
    assert find_response_head_end(b"HTTP/1.1 204 x\r\n\r\nrest") == 18
    for begun in (b"SSH-2.0", b"HTTP/2", b"\x15\x03", b"HTTP/1.1 200 OK\nA", b"HTTP/1.1 200 OK\r\nA: \0"):
        with pytest.raises(BadHead):
            find_response_head_end(begun)


@pytest.mark.parametrize(
    ("line", "status", "reason"),
    [
        (b"HTTP/1.1 200 OK", 200, b"OK"),
        (b"HTTP/1.0 599 ", 599, b""),
        (b"HTTP/1.1 404", 404, b""),
        (b"HTTP/1.1 100 Go on, \xe4", 100, b"Go on, \xe4"),
    ],
)
def test_a_status_line_is_read(line: bytes, status: int, reason: bytes) -> None:
    head = response(line=line)
    assert (head.status, head.reason) == (status, reason)


@pytest.mark.parametrize(
    "line",
    [
        *(
            b"HTTP/1.1 099 x",
            b"HTTP/1.1 600 x",
            b"HTTP/1.1 20 x",
            b"HTTP/1.1 2000 x",
            b"HTTP/1.1  200 OK",
            b"HTTP/2 200 OK",
        ),
        *(
            b"HTTP/1.1 +20 x",
            b"HTTP/1.2 200 OK",
            b"http/1.1 200 OK",
            b"HTTP/1.1 200\tOK",
            b"HTTP/1.1 200 a\x7f",
            b"200 OK",
            b"",
        ),
    ],
)
def test_a_bad_status_line_is_refused(line: bytes) -> None:
    with pytest.raises(BadHead):
        response(line=line)


@pytest.mark.parametrize(
    "fields",
    [
        [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
        [b"Content-Length: 5", b"Content-Length: 6"],
        [b"Content-Length: 5", b"Content-Length: 5"],
        [b"Content-Length: 5, 5"],
        [b"Content-Length: +5"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
        [b"X: y", b" folded"],
        [b"X : y"],
        [b"X: a\nb"],
        [b"nothing"],
        [b"Connection: a b"],
        [b"X-%d: y" % number for number in range(101)],
    ],
)
def test_a_response_that_can_be_read_two_ways_is_refused(fields: list[bytes]) -> None:
    with pytest.raises(BadHead):
        response(*fields)


def test_chunked_does_not_exist_in_http_1_0() -> None:
    with pytest.raises(BadHead):
        response(b"Transfer-Encoding: chunked", line=b"HTTP/1.0 200 OK")
    with pytest.raises(BadHead):
        request(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.0")


def test_responses_that_never_have_a_body_are_known_as_such() -> None:
    for code in (b"100", b"101", b"204", b"304"):
        assert response(line=b"HTTP/1.1 " + code + b" x").bodiless("GET")
    assert response(b"Content-Length: 5").bodiless("HEAD")
    assert not response(b"Content-Length: 5").bodiless("GET")


def test_a_204_that_announces_a_body_is_the_last_on_its_connection() -> None:
    assert not response(b"Content-Length: 5", line=b"HTTP/1.1 204 x").keep_alive
    assert not response(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 204 x").keep_alive
    assert response(b"Content-Length: 0", line=b"HTTP/1.1 204 x").keep_alive


def test_repeated_response_fields_are_kept() -> None:
    head = response(b"Set-Cookie: a", b"set-cookie: b", b"X: y")
    assert head.values(b"set-cookie") == [b"a", b"b"]
    assert head.first(b"set-cookie") == b"a"


def test_a_head_shows_no_secret() -> None:
    assert "secret" not in repr(request(b"X-Api-Key: secret", line=b"GET /?secret HTTP/1.1"))
    assert "secret" not in str(refusal(b"X-Api-Key: secret\0"))


@pytest.mark.parametrize(
    "field",
    [
        b"A:" + b" " * 30000 + b"\r\n",
        b"A: x" + b" " * 30000 + b"\r\n",
        b"A: " + b"a " * 15000 + b"\r\n",
        b"A" * 30000 + b"\r\n",
        b":" * 30000 + b"\r\n",
        (b" " * 300 + b"\r\n") * 95,
        b"A: " + b"\t " * 15000 + b"\n",
        b"Connection: " + b"," * 30000 + b"\r\n",
        b"Host: " + b"." * 30000 + b"\r\n",
        b"Content-Length: " + b"1" * 30000 + b"\r\n",
    ],
)
def test_no_head_costs_more_than_one_pass(field: bytes) -> None:
    head = b"GET / HTTP/1.0\r\n" + field + b"\r\n"
    # The machine's clock: quadratic work on 30 000 bytes takes seconds, one pass takes a millisecond.
    began = time.process_time()
    taken_or_refused(parse_request, head)
    taken_or_refused(find_head_end, head[:-2])
    assert time.process_time() - began < 0.25


# What h11 and this parser are asked to agree on: heads near the grammar, about half of each part inside it.
blanks = st.sampled_from([b" "] * 12 + [b"", b"\t", b"  "])
good_names = st.sampled_from([b"X", b"x-a_b", b"Te", b"Accept", b"Connection", b"!#$%&'*+.^_`|~"])
names = st.sampled_from(
    [b"Content-Length", b"content-length", b"Transfer-Encoding", b"Host", b"Expect", b"Upgrade", b"Content_Length"]
) | st.text('aZ-_!#9(:" \x00\xe9', max_size=4).map(lambda text: text.encode("latin-1"))
good_values = st.sampled_from(
    [b"", b"0", b"5", b"chunked", b"keep-alive", b"close", b"a,b", b"\xe4\xff", b"100-continue"]
)
values = st.sampled_from([b"05", b"5, 5", b"Chunked", b"gzip", b"[::1]:80", b"a b", b"Upgrade"]) | st.binary(max_size=6)
ends = st.sampled_from([b"\r\n"] * 30 + [b"\n", b"\r", b"\r\n "])
good_request_lines = st.builds(
    b"%b %b HTTP/1.%d".__mod__,
    st.tuples(
        st.sampled_from([b"GET", b"POST", b"OPTIONS", b"M-SEARCH"]),
        st.sampled_from([b"/", b"/a?b", b"//%00", b"/a/../b??", b'/"<>\\^`{|}']),
        st.integers(0, 1),
    ),
)
near_request_lines = st.tuples(
    st.sampled_from([b"GET", b"OPTIONS", b"get", b"CONNECT", b"G\0"]),
    blanks,
    st.sampled_from([b"/", b"*", b"http://a/", b"/\x80", b"/a#b", b"a"]) | st.binary(max_size=4),
    blanks,
    st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0", b""]),
).map(b"".join)
request_lines = good_request_lines | good_request_lines | near_request_lines
status_lines = st.tuples(
    st.sampled_from([b"HTTP/1.1 ", b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/2.0 "]),
    st.integers(100, 700).filter(lambda code: code != 101).map(lambda code: b"%d" % code),
    st.sampled_from([b" OK", b" ", b"", b" \xff", b"\tOK", b" a\0"]),
).map(b"".join)
good_field_lines = st.tuples(good_names, st.just(b":"), blanks, good_values, blanks).map(b"".join)
framing_lines = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length:0 ",
        b"Transfer-Encoding: Chunked",
        b"Host: a",
        b"Upgrade: x",
        b"Expect: 100-continue",
    ]
)
near_field_lines = st.tuples(names, st.sampled_from([b":"] * 9 + [b" :", b""]), blanks, values, blanks).map(b"".join)
field_lines = good_field_lines | good_field_lines | framing_lines | near_field_lines


def heads_of(lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    fields = st.lists(st.tuples(field_lines, ends).map(b"".join), max_size=5)
    host = st.sampled_from([b"Host: a.example\r\n"] * 9 + [b""])
    return st.tuples(lines, ends, host, fields.map(b"".join), ends).map(b"".join)


def as_h11_sees(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """h11 lower-cases names, and the value of Transfer-Encoding, before it shows them."""
    shown = [(name.lower(), value) for name, value in fields]
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in shown]


@quick
@given(heads_of(request_lines))
def test_h11_takes_every_request_head_that_is_taken_and_reads_the_same(raw: bytes) -> None:
    head = read_request(raw)
    if not isinstance(head, RequestHead):
        assert head is None or head.status in (400, 414, 431)
        return
    model = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * MAX_HEAD_BYTES)
    model.receive_data(raw)
    event = model.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method.decode(), event.target) == (head.method, head.target)
    assert event.http_version == b"1.%d" % head.minor
    assert list(event.headers) == as_h11_sees(head.fields)


@quick
@given(heads_of(status_lines))
def test_h11_takes_every_response_head_that_is_taken_and_reads_the_same(raw: bytes) -> None:
    try:
        end = find_response_head_end(raw)
        if end < 0:
            return
        head = parse_response(raw[:end])
    except BadHead:
        return
    model = h11.Connection(h11.CLIENT, max_incomplete_event_size=2 * MAX_HEAD_BYTES)
    model.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    model.send(h11.EndOfMessage())
    model.receive_data(raw[:end])
    event = model.next_event()
    assert isinstance(event, h11.Response | h11.InformationalResponse)
    assert (event.status_code, event.reason) == (head.status, head.reason)
    assert list(event.headers) == as_h11_sees(head.fields)


@quick
@given(st.binary(max_size=200), st.integers(0, 200))
def test_random_bytes_are_refused_and_nothing_else_is_raised(raw: bytes, start: int) -> None:
    searches = (lambda data: find_head_end(bytearray(data), start), lambda data: find_response_head_end(data, start))
    for read in (parse_request, parse_response, find_head_end, find_response_head_end, *searches):
        outcome = taken_or_refused(read, raw)
        assert not isinstance(outcome, BadHead) or outcome.status in (400, 414, 431)


@quick
@given(heads_of(request_lines), st.integers(0, 400), st.binary(min_size=1, max_size=2))
def test_a_damaged_head_is_never_read_otherwise_than_h11_reads_it(raw: bytes, place: int, damage: bytes) -> None:
    place %= len(raw) + 1
    damaged = raw[:place] + damage + raw[place + 1 :]
    head = read_request(damaged)
    if not isinstance(head, RequestHead):
        return
    model = h11.Connection(h11.SERVER)
    model.receive_data(damaged)
    event = model.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method.decode(), event.target, list(event.headers)) == (
        head.method,
        head.target,
        as_h11_sees(head.fields),
    )
