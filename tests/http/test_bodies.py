"""The body readers, and the attack corpus through heads and bodies together, with h11 as an independent model."""

import itertools

import attrs
import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callora.http.gateway.bodies import (
    BadBody,
    BodyCutShort,
    BodyReader,
    BodyTooLarge,
    ChunkedReader,
    EofReader,
    LengthReader,
    encode_chunk,
    encode_last_chunk,
)
from callora.http.gateway.heads import BadHead, RequestHead, find_head_end, parse_request
from tests.http.attacks import ATTACKS, DEFAULT_PATH, Attack

quick = settings(max_examples=300, database=None)
BODY_LIMIT = 10 * 1024 * 1024


@attrs.frozen
class Message:
    """One request as read: what would go upstream."""

    method: str
    target: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    body: bytes
    trailers: tuple[tuple[bytes, bytes], ...]


@attrs.define
class Conversation:
    """What one connection's bytes come to."""

    messages: list[Message] = attrs.field(factory=list)
    refused: BadHead | BadBody | None = None
    closed: bool = False
    """A message said that it is the last; what follows it is not looked at."""
    pending: bool = False
    """A message has begun and is neither complete nor refused."""
    unread: bytes = b""


def read_all(raw: bytes, segment: int | None = None) -> Conversation:
    """Read a connection's bytes as the gateway does, all at once or in segments of a size."""
    conversation = Conversation()
    step = segment or len(raw) or 1
    segments = iter([raw[start : start + step] for start in range(0, len(raw), step)])
    buffer = bytearray()
    try:
        while True:
            searched = 0
            while (end := find_head_end(buffer, searched)) < 0:
                searched = max(0, len(buffer) - 3)
                arrived = next(segments, None)
                if arrived is None:
                    conversation.pending = bool(buffer)
                    return conversation
                buffer += arrived
            head = parse_request(bytes(buffer[:end]))
            reader = reader_of(head)
            arrived = bytes(buffer[end:])
            body = b"".join(reader.feed(arrived))
            while not reader.done:
                arrived = next(segments, None)
                if arrived is None:
                    conversation.pending = True
                    return conversation
                body += b"".join(reader.feed(arrived))
            conversation.messages.append(
                Message(head.method, head.target, tuple(head.fields), body, tuple(reader.trailers))
            )
            buffer = bytearray(reader.leftover)
            if not head.keep_alive:
                conversation.closed = True
                conversation.unread = bytes(buffer) + b"".join(segments)
                return conversation
    except (BadHead, BadBody) as refused:
        conversation.refused = refused
        return conversation


def reader_of(head: RequestHead) -> BodyReader:
    if head.chunked:
        return ChunkedReader(BODY_LIMIT)
    return LengthReader(head.content_length or 0, BODY_LIMIT)


def fed(reader: BodyReader, raw: bytes, *cuts: int) -> bytes:
    """Return the payload of `raw`, fed in the parts between the cuts."""
    bounds = [0, *cuts, len(raw)]
    return b"".join(b"".join(reader.feed(raw[start:stop])) for start, stop in itertools.pairwise(bounds))


def refusal(raw: bytes, reader: BodyReader | None = None) -> BadBody:
    with pytest.raises(BadBody) as caught:
        (reader or ChunkedReader()).feed(raw)
    return caught.value


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(ATTACKS) >= 300
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    assert len({attack.raw for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_refused_or_is_one_request(attack: Attack) -> None:
    conversation = read_all(attack.render())
    through = [message for message in conversation.messages if message.target.startswith(DEFAULT_PATH)]
    if attack.verdict == "refused":
        assert conversation.refused is not None
        assert conversation.refused.status in (400, 413, 414, 431)
        assert conversation.messages == []
    else:
        assert len(through) == 1
        assert b"smuggled" not in through[0].target
        assert not conversation.pending


def test_an_attack_comes_to_the_same_in_whatever_segments_it_arrives() -> None:
    for attack in ATTACKS:
        raw = attack.render()
        whole = read_all(raw)
        for segment in (1, 2, 3, 7, 64) if len(raw) < 2000 else (1000, 4096):
            parts = read_all(raw, segment)
            assert parts.messages == whole.messages, (attack.name, segment)
            assert (parts.refused is None) == (whole.refused is None), (attack.name, segment)
            assert (parts.closed, parts.unread) == (whole.closed, whole.unread), (attack.name, segment)


def test_h11_reads_every_harmless_message_of_the_corpus_in_the_same_way() -> None:
    for attack in ATTACKS:
        if attack.verdict == "one" and not attack.name.startswith("pipeline: after"):
            raw = attack.render()
            ours = read_all(raw)
            assert read_with_h11(raw, len(ours.messages)) == as_h11_shows(ours.messages), attack.name


def read_with_h11(raw: bytes, count: int) -> list[Message]:
    """Return the first messages of a connection as h11 reads them."""
    messages = []
    for _ in range(count):
        model = h11.Connection(h11.SERVER, max_incomplete_event_size=65536)
        model.receive_data(raw)
        request = model.next_event()
        assert isinstance(request, h11.Request)
        body = b""
        while isinstance(event := model.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        fields, trailers = tuple(request.headers.raw_items()), tuple(event.headers.raw_items())
        messages.append(Message(request.method.decode(), request.target, fields, body, trailers))
        raw = model.trailing_data[0]
    return messages


def as_h11_shows(messages: list[Message]) -> list[Message]:
    """The one allowed difference: h11 shows the value of Transfer-Encoding in lower case."""
    return [
        attrs.evolve(
            message,
            fields=tuple(
                (name, value.lower() if name.lower() == b"transfer-encoding" else value)
                for name, value in message.fields
            ),
        )
        for message in messages
    ]


@pytest.mark.parametrize("length", [1, 2, 5, 65536])
def test_a_length_is_read_exactly_at_every_split(length: int) -> None:
    payload = bytes(index % 251 for index in range(length))
    raw = payload + b"GET /next"
    for cut in {0, 1, length // 2, length - 1, length, length + 3}:
        reader = LengthReader(length)
        assert fed(reader, raw, cut) == payload
        assert reader.done
        assert reader.leftover == b"GET /next"
        reader.end()


def test_a_body_of_no_bytes_is_done_at_once() -> None:
    reader = LengthReader(0)
    assert reader.done
    assert reader.feed(b"GET") == []
    assert reader.feed(memoryview(b" /")) == []
    assert reader.leftover == b"GET /"


def test_a_body_cut_short_is_told_from_a_complete_one() -> None:
    length, chunked = LengthReader(5), ChunkedReader()
    length.feed(b"hell")
    chunked.feed(b"5\r\nhello\r\n0\r\n")
    for reader in (length, chunked):
        with pytest.raises(BodyCutShort):
            reader.end()
    until_close = EofReader()
    assert until_close.feed(b"all") == [b"all"]
    assert not until_close.done
    until_close.end()
    assert until_close.done


def test_a_limit_refuses_before_a_byte_past_it_is_handed_out() -> None:
    with pytest.raises(BodyTooLarge) as caught:
        LengthReader(11, limit=10)
    assert (caught.value.status, caught.value.code) == (413, "REQUEST_BODY_TOO_LARGE")
    assert LengthReader(10, limit=10).feed(b"x" * 10) == [b"x" * 10]

    reader = ChunkedReader(limit=10)
    assert reader.feed(b"a\r\n0123456789\r\n") == [b"0123456789"]
    assert isinstance(refusal(b"1\r\n", reader), BodyTooLarge)
    assert isinstance(refusal(b"b\r\n", ChunkedReader(limit=10)), BodyTooLarge)

    until_close = EofReader(limit=10)
    assert until_close.feed(b"x" * 10) == [b"x" * 10]
    assert isinstance(refusal(b"x", until_close), BodyTooLarge)


CHUNKED = (
    b'5\r\nhello\r\n0000a;name="value"\r\n, chunked \r\n5\r\n\r\nend\r\n0;last\r\nX-Sum: 1 \r\nx-sum:2\r\n\r\nGET /next'
)
DECODED = b"hello, chunked \r\nend"


def test_a_chunked_body_is_the_same_at_every_split() -> None:
    for cut in range(len(CHUNKED) + 1):
        for second in (cut, min(cut + 1, len(CHUNKED)), len(CHUNKED)):
            reader = ChunkedReader()
            assert fed(reader, CHUNKED, cut, second) == DECODED
            assert reader.done
            assert reader.trailers == [(b"X-Sum", b"1"), (b"x-sum", b"2")]
            assert reader.leftover == b"GET /next"
    reader = ChunkedReader()
    assert fed(reader, CHUNKED, *range(1, len(CHUNKED))) == DECODED
    assert reader.leftover == b"GET /next"


def test_views_are_taken_and_pieces_outlive_them() -> None:
    buffer = bytearray(CHUNKED)
    reader = ChunkedReader()
    pieces = reader.feed(memoryview(buffer))
    length = LengthReader(5)
    piece = length.feed(memoryview(buffer)[:7])
    until_close = EofReader().feed(memoryview(buffer)[:4])
    buffer[:] = bytes(len(buffer))
    assert b"".join(pieces) == DECODED
    assert reader.leftover == b"GET /next"
    assert (piece, length.leftover) == ([b"5\r\nhe"], b"ll")
    assert until_close == [b"5\r\nh"]
    assert all(type(each) is bytes for each in (*pieces, *piece, *until_close, reader.leftover, length.leftover))


def test_data_inside_one_large_chunk_is_passed_on_without_a_copy() -> None:
    reader = ChunkedReader()
    reader.feed(b"fffff\r\n")
    data = b"x" * 1000
    assert reader.feed(data)[0] is data


def test_a_chunk_that_can_never_be_good_is_refused_before_its_line_ends() -> None:
    for begun in (b"x", b"-", b"5 ", b"5\n", b"5\rx", b"0" * 17, b"5;" + b"a" * 256, b"5;\0"):
        reader = ChunkedReader()
        first = refusal(begun, reader)
        assert refusal(b"\r\n", reader) is first, "a refused reader stays refused"


def test_a_chunk_is_at_most_two_to_the_53_even_without_a_limit() -> None:
    assert ChunkedReader().feed(b"20000000000000\r\nx") == [b"x"]
    assert "2^53" in str(refusal(b"20000000000001\r\nx"))


def test_overhead_is_bound_by_64_kib_and_16_bytes_a_payload_byte() -> None:
    flood = b"1;" + b"a" * 250 + b"\r\nx\r\n"
    reader = ChunkedReader()
    assert "chunk headers" in str(refusal(flood * 1000))
    assert reader.feed(flood * 200) == [b"x"] * 200
    reader = ChunkedReader()
    plain = b"1\r\nx\r\n" * 1000
    assert sum(len(reader.feed(plain)) for _ in range(100)) == 100_000
    # A great size announced and not sent does not help: the next line comes after its data.
    assert isinstance(refusal(b"fffff\r\nx\r\n" + b"1\r\nx\r\n" * 200_000), BadBody)


def test_trailers_are_bound_and_checked() -> None:
    line = b"X: " + b"y" * 1019 + b"\r\n"
    assert len(line) * 8 == 8192
    reader = ChunkedReader()
    reader.feed(b"0\r\n" + line * 8 + b"\r\n")
    assert (reader.done, len(reader.trailers)) == (True, 8)
    for over in (line * 8 + b"X:\r\n", line * 8 + b"X", b"X: " + b"y" * 8190, b"X:\r\n" * 101):
        assert "trailers" in str(refusal(b"0\r\n" + over + b"\r\n"))
    assert "malformed" in str(refusal(b"0\r\nX : y\r\n\r\n"))


def test_a_trailer_that_decides_something_refuses_a_request_and_is_dropped_from_a_response() -> None:
    for name in (b"Content-Length", b"TRANSFER_ENCODING", b"Authorization", b"X-Forwarded-For", b"X-Callora-Charge"):
        raw = b"0\r\n" + name + b": 1\r\nX: y\r\n\r\n"
        assert "trailer" in str(refusal(raw))
        reader = ChunkedReader(response=True)
        reader.feed(raw)
        assert (reader.done, reader.trailers) == (True, [(b"X", b"y")])


def test_encoding_writes_one_chunk_for_all_pieces_and_none_for_no_payload() -> None:
    assert encode_chunk([b"hello, ", b"chunk"]) == b"c\r\nhello, chunk\r\n"
    assert encode_chunk([]) == encode_chunk([b"", b""]) == b""
    assert encode_last_chunk([]) == b"0\r\n\r\n"
    assert encode_last_chunk([(b"X", b"y"), (b"Z", b"")]) == b"0\r\nX: y\r\nZ: \r\n\r\n"


@quick
@given(
    st.lists(st.lists(st.binary(max_size=40), max_size=3), max_size=6),
    st.lists(st.tuples(st.sampled_from([b"X", b"y-Z"]), st.sampled_from([b"", b"1", b"a b"])), max_size=3),
    st.binary(max_size=10),
    st.lists(st.integers(0, 400), max_size=5),
)
def test_what_is_encoded_is_decoded_at_any_splits(
    chunks: list[list[bytes]], trailers: list[tuple[bytes, bytes]], after: bytes, cuts: list[int]
) -> None:
    raw = b"".join(encode_chunk(pieces) for pieces in chunks) + encode_last_chunk(trailers) + after
    reader = ChunkedReader()
    assert fed(reader, raw, *sorted(min(cut, len(raw)) for cut in cuts)) == b"".join(itertools.chain(*chunks))
    assert reader.done
    assert reader.trailers == trailers
    assert reader.leftover == after


good_chunks = st.sampled_from([b"5\r\nhello\r\n", b"1;x\r\ny\r\n", b"002\r\n\r\n\r\n", b'3;a="b"\r\n0\r\n\r\n'])
odd_pieces = st.sampled_from([b"0\r\n", b"\r\n", b"X: y\r\n", b"A\r\n", b"0123456789", b"5 \r\nhello\r\n"])
endings = st.sampled_from([b"0\r\n\r\n", b"00;x\r\n\r\n", b"0\r\nX: y\r\nx:z \r\n\r\n", b"0\r\nHost: a\r\n\r\n"])
near_chunks = st.tuples(
    st.lists(good_chunks, max_size=4).map(b"".join),
    st.just(b"") | st.just(b"") | odd_pieces | st.binary(max_size=3),
    st.lists(good_chunks, max_size=2).map(b"".join),
    endings,
).map(b"".join)


@quick
@given(near_chunks, st.binary(max_size=4))
def test_h11_takes_every_chunked_body_that_is_taken_and_ends_it_at_the_same_byte(raw: bytes, after: bytes) -> None:
    raw += after
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    reader = ChunkedReader()
    try:
        body = b"".join(reader.feed(raw))
    except BadBody:
        return
    if not reader.done:
        return
    assert read_with_h11(head + raw, 1)[0].body == body
    model = h11.Connection(h11.SERVER)
    model.receive_data(head + raw)
    while not isinstance(event := model.next_event(), h11.EndOfMessage):
        pass
    assert list(event.headers.raw_items()) == reader.trailers
    assert model.trailing_data[0] == reader.leftover


@quick
@given(
    near_chunks | near_chunks.map(lambda raw: raw[: len(raw) // 2]) | st.binary(max_size=60),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_any_bytes_are_payload_or_are_refused_and_splits_change_nothing(raw: bytes, cuts: list[int]) -> None:
    outcomes = []
    for splits in ([], sorted(min(cut, len(raw)) for cut in cuts), list(range(1, len(raw)))):
        reader = ChunkedReader(limit=1000)
        try:
            body: bytes | None = fed(reader, raw, *splits)
        except BadBody:
            body = None
        outcomes.append((body, None if body is None else (reader.done, reader.trailers, reader.leftover)))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@quick
@given(
    st.sampled_from(ATTACKS).filter(lambda attack: len(attack.raw) < 1000), st.integers(0, 1000), st.binary(max_size=2)
)
def test_a_damaged_attack_is_read_as_h11_reads_it_or_refused(attack: Attack, place: int, damage: bytes) -> None:
    raw = attack.render()
    place %= len(raw) + 1
    raw = raw[:place] + damage + raw[place + 1 :]
    ours = read_all(raw)
    assert read_with_h11(raw, len(ours.messages)) == as_h11_shows(ours.messages)
