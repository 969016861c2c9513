"""From the bytes of a request to a struct, or to all of its errors; no database."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import anyio
import msgspec
import pytest

from clarion.api.cursor import decode_cursor, encode_cursor
from clarion.api.decoding import ERRORS_MAX, INLINE_MAX_BYTES, Nothing, decode, decode_body, decode_query
from clarion.api.schemas import BatchIn, JobIn, JobListQuery
from clarion.errors import ClarionError, FieldError, Invalid, Malformed
from clarion.job import JobState


def refusal(call: Callable[[], object]) -> ClarionError:
    with pytest.raises(ClarionError) as caught:
        call()
    return caught.value


def errors_of(body: bytes) -> dict[str | None, str]:
    """What is wrong with a job: pointer to detail."""
    return {error.pointer: error.detail for error in refusal(lambda: decode(body, JobIn)).errors}


def job_with(field: str, value: object) -> bytes:
    return msgspec.json.encode({"task": "work", field: value})


def test_a_job_needs_only_a_task() -> None:
    job = decode(b'{"task":"work"}', JobIn).to_new_job()
    assert (job.task, job.queue, job.args, job.priority, job.delay_seconds) == ("work", "default", "{}", 0, None)


def test_every_field_arrives() -> None:
    body = (
        b'{"task":"a.b:c/d-e_F9","queue":"q","args":{ "n":1.10 },"priority":-100,"delay":"1.5m","max_attempts":1000,'
        b'"timeout":"250ms","backoff":0,"backoff_cap":"7d","start_within":"1m","total_timeout":"1d",'
        b'"idempotency_key":"k"}'
    )
    job = decode(body, JobIn).to_new_job()
    assert (job.task, job.queue, job.args, job.priority) == ("a.b:c/d-e_F9", "q", '{ "n":1.10 }', -100)
    assert (job.delay_seconds, job.max_attempts, job.timeout_seconds) == (90, 1000, 0.25)
    assert (job.backoff_seconds, job.backoff_cap_seconds) == (0, 604_800)
    assert (job.start_within_seconds, job.total_timeout_seconds) == (60, 86_400)


def test_everything_that_is_wrong_is_listed_at_once() -> None:
    body = (
        b'{"queue":"","quue":1,"args":[],"priority":"high","run_at":"2026-01-01T00:00:00","delay":"-1s",'
        b'"max_attempts":0,"timeout":0,"backoff":1e400,"backoff_cap":true,"a/b~":0}'
    )
    error = refusal(lambda: decode(body, JobIn))
    assert isinstance(error, Invalid)
    assert {found.pointer for found in error.errors} == {
        "/task", "/queue", "/quue", "/args", "/priority", "/run_at", "/delay", "/max_attempts", "/timeout", "/backoff",
        "/backoff_cap", "/a~1b~0",
    }  # fmt: skip
    assert str(error).startswith("/task: is required (and 11 more)")


@pytest.mark.parametrize("field", ["task", "queue"])
@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "a b",
        ".a",
        "a\n",
        "a\x00",
        "é",
        "e\u0301",
        "a'; drop table jobs--",
        "x" * 129,
        "x" * 300,
        None,
        5,
        ["a"],
    ],
)
def test_what_is_no_name_is_refused(field: str, name: object) -> None:
    assert set(errors_of(msgspec.json.encode({"task": "work"} | {field: name}))) == {f"/{field}"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", 101), ("priority", -101), ("priority", 1.0), ("priority", None), ("priority", True),
        ("max_attempts", 0), ("max_attempts", 1001), ("max_attempts", "3"),
        ("delay", "-1s"), ("delay", -1), ("delay", "1e3"), ("delay", "infinity"), ("delay", "NaN"), ("delay", ""),
        ("delay", "3651d"), ("delay", True), ("delay", "٣s"), ("delay", "999999999999s"),
        ("timeout", 0), ("timeout", "0s"), ("timeout", 1e-300), ("timeout", "31d"), ("timeout", {}),
        ("backoff", "2d"), ("backoff_cap", "8d"), ("backoff", -0.1),
        ("run_at", "infinity"), ("run_at", "-infinity"), ("run_at", "294276-12-31T00:00:00Z"), ("run_at", "now"),
        ("run_at", "2026-01-01"), ("run_at", "2026-01-01T00:00:00"), ("run_at", "2026-02-30T00:00:00Z"),
        ("run_at", 1_700_000_000), ("run_at", "9999-12-31T23:59:59-14:00"), ("run_at", "0001-01-01T00:00:00+14:00"),
        ("run_at", "1969-12-31T23:59:59Z"), ("run_at", ""),
        ("start_by", "2200-01-01T00:00:01Z"), ("start_by", "1969-12-31T23:59:59Z"), ("start_by", "2026-01-01T00:00:00"),
        ("start_by", 7), ("start_within", 0), ("start_within", "3651d"), ("start_within", -1), ("start_within", True),
        ("total_timeout", "0s"), ("total_timeout", "3651d"), ("total_timeout", []),
        ("idempotency_key", ""), ("idempotency_key", "x" * 256), ("idempotency_key", "a\nb"), ("idempotency_key", 7),
        ("idempotency_key", "a\x00"), ("idempotency_key", "\u202e"),
        ("args", None), ("args", []), ("args", "{}"), ("args", 1), ("args", False),
        ("id", "x"), ("state", "dead"),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_with_its_place(field: str, value: object) -> None:
    assert set(errors_of(job_with(field, value))) == {f"/{field}"}


@pytest.mark.parametrize("field", ["priority", "delay", "timeout", "max_attempts", "run_at"])
@pytest.mark.parametrize("number", ["1e400", "9" * 5_000, "-1e400"])
def test_a_number_beyond_all_bounds_is_refused_with_its_place(field: str, number: str) -> None:
    assert set(errors_of(f'{{"task":"work","{field}":{number}}}'.encode())) == {f"/{field}"}


def test_a_start_has_to_be_within_ten_years() -> None:
    now = datetime.now(UTC)
    assert decode(job_with("run_at", now + timedelta(days=3649)), JobIn).run_at
    assert set(errors_of(job_with("run_at", now + timedelta(days=3651)))) == {"/run_at"}


def test_run_at_and_delay_exclude_each_other() -> None:
    body = msgspec.json.encode({"task": "work", "run_at": datetime.now(UTC), "delay": "1s"})
    assert set(errors_of(body)) == {"/delay"}


def test_start_by_and_start_within_exclude_each_other() -> None:
    body = msgspec.json.encode({"task": "work", "start_by": datetime(2100, 1, 1, tzinfo=UTC), "start_within": "1s"})
    assert set(errors_of(body)) == {"/start_within"}


def test_a_deadline_before_the_start_is_refused() -> None:
    start = datetime.now(UTC) + timedelta(days=1)
    late = {"task": "work", "run_at": start, "start_by": start - timedelta(microseconds=1)}
    assert set(errors_of(msgspec.json.encode(late))) == {"/start_by"}
    assert decode(msgspec.json.encode(late | {"start_by": start}), JobIn).start_by == start


def test_a_key_may_be_any_printable_text() -> None:
    for key in ("x", "ключ-é 7", "x" * 255, '"', "\\"):
        assert decode(job_with("idempotency_key", key), JobIn).idempotency_key == key


def test_an_unknown_field_is_named_with_the_one_that_was_meant() -> None:
    assert errors_of(job_with("prioritty", 1)) == {"/prioritty": "is not known here; did you mean `priority`?"}
    assert errors_of(job_with("zzz", 1)) == {"/zzz": "is not known here"}


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    assert decode(b'{"task":"one","task":"two"}', JobIn).task == "two"


def test_a_key_that_is_there_twice_and_wrong_once_is_refused_with_its_place() -> None:
    assert errors_of(b'{"task":"work","priority":"x","priority":1}') == {"/priority": "Expected `int`, got `str`"}
    error = refusal(lambda: decode(b'{"jobs":[{"task":"a","priority":"x","priority":1}]}', BatchIn))
    assert [found.pointer for found in error.errors] == ["/jobs/0/priority"]


@pytest.mark.parametrize("body", [b"", b"  \n"])
def test_an_empty_body_says_so(body: bytes) -> None:
    assert str(refusal(lambda: decode(body, JobIn))) == "the body is empty"


@pytest.mark.parametrize("body", [b"[]", b"null", b"3", b'"{}"', b"true"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    error = refusal(lambda: decode(body, JobIn))
    assert isinstance(error, Invalid)
    assert [found.pointer for found in error.errors] == [""]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b"{", ""),
        (b"nul", ""),
        (b'{"task":"work"} {}', ""),
        (b'{"task":"work",}', "/task"),
        (b'{"task":"work","args":{"a":NaN}}', "/args/a"),
        (b'{"task":"work","args":{"a":[0,Infinity]}}', "/args/a/1"),
        (b'{"task":"work","priority":NaN}', "/priority"),
        (b'{"task":"wo\nrk"}', "/task"),
        (b'{"task":"w\\x"}', "/task"),
        (b'\xef\xbb\xbf{"task":"work"}', ""),
        (b'{"task":"\xff"}', "/task"),
        (b'{"task":"work","args":{"a":["\xc3\x28"]}}', "/args/a/0"),
        (b'{"task":"work","args":{"a":"\xed\xa0\x80"}}', "/args/a"),
        (b'{"task":"work","args":{"\xc0\x80":1}}', "/args"),
        (b'{"ta\xf8sk":"work"}', ""),
        ('{"task":"work"}'.encode("utf-16"), ""),
    ],
)
def test_what_is_not_json_in_utf8_is_malformed_with_its_place(body: bytes, pointer: str) -> None:
    error = refusal(lambda: decode(body, JobIn))
    assert isinstance(error, Malformed)
    assert [found.pointer for found in error.errors] == [pointer]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        (b'{"task":"work","args":{"a":"\\u0000"}}', "/args/a"),
        (b'{"task":"work","args":{"a":[{"\\u0000":1}]}}', "/args/a/0"),
        (b'{"task":"work","args":{"a":"\\ud800"}}', "/args/a"),
        (b'{"task":"work","args":{"\\udc00":1}}', "/args"),
        (b'{"task":"\\ud800"}', "/task"),
        (b'{"task":"w\\u0000rk"}', "/task"),
        (b'{"task":"work","delay":"\\u0000"}', "/delay"),
        (b'{"task":"work","args":' + b'{"a":' * 65 + b"1" + b"}" * 65 + b"}", "/args" + "/a" * 64),
        (b'{"task":"work","args":' + b'{"a":' * 10**6 + b"1" + b"}" * 10**6 + b"}", "/args" + "/a" * 66),
        (b'{"task":"work","args":{"a":' + b"[" * 10**6 + b"}", "/args/a" + "/0" * 65),
        (b'{"task":' + b"[" * 10**6, "/task" + "/0" * 66),
        (b"[" * 10**6, "/0" * 67),
    ],
)
def test_what_json_allows_and_clarion_does_not_is_invalid_with_its_place(body: bytes, pointer: str) -> None:
    error = refusal(lambda: decode(body, JobIn))
    assert isinstance(error, Invalid)
    assert [found.pointer for found in error.errors] == [pointer]


def test_every_job_of_a_batch_is_told_all_its_errors() -> None:
    body = b'{"jobs":[{"task":"a"},{"task":"b","priority":101,"delay":-1},{},7,{"task":"c","args":{"x":["\\u0000"]}}]}'
    error = refusal(lambda: decode(body, BatchIn))
    assert [found.pointer for found in error.errors] == [
        "/jobs/1/priority", "/jobs/1/delay", "/jobs/2/task", "/jobs/3", "/jobs/4/args/x/0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "pointer"), [(b"{}", "/jobs"), (b'{"jobs":{}}', "/jobs"), (b"[]", ""), (b'{"jobs":[],"x":1}', "/x")]
)
def test_a_batch_is_an_object_with_an_array_of_jobs(body: bytes, pointer: str) -> None:
    assert [found.pointer for found in refusal(lambda: decode(body, BatchIn)).errors] == [pointer]


def test_the_list_of_errors_is_bounded() -> None:
    body = msgspec.json.encode({"task": "work"} | {f"x{number}": 1 for number in range(5 * ERRORS_MAX)})
    assert len(refusal(lambda: decode(body, JobIn)).errors) == ERRORS_MAX


def test_a_large_document_does_not_stop_the_event_loop() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await anyio.lowlevel.checkpoint()
            ticks += 1

    async def main() -> None:
        body = b'{"task":"work","args":{"a":[' + b"1," * INLINE_MAX_BYTES + b"NaN]}}"
        async with anyio.create_task_group() as group:
            group.start_soon(tick)
            with pytest.raises(Malformed):
                await decode_body(body, JobIn)
            group.cancel_scope.cancel()

    anyio.run(main)
    assert ticks > 1


def parameters(query: bytes) -> dict[str | None, str]:
    errors = refusal(lambda: decode_query(query, JobListQuery)).errors
    return {error.parameter: error.detail for error in errors}


def test_a_query_without_parameters_has_the_defaults() -> None:
    query = decode_query(b"", JobListQuery)
    assert (query.limit, query.to_filter().before_id) == (50, None)


def test_every_query_parameter_arrives() -> None:
    last_id = uuid4()
    query = decode_query(
        b"state=dead&queue=q&task=t&created_after=2026-01-01T00:00:00Z&created_before=2026-01-02T00:00:00%2B02:00"
        b"&limit=500&cursor=" + encode_cursor(last_id).encode(),
        JobListQuery,
    )
    where = query.to_filter()
    assert (query.limit, where.state, where.queue, where.task, where.before_id) == (
        500, JobState.DEAD, "q", "t", last_id,
    )  # fmt: skip
    assert where.created_after == datetime(2026, 1, 1, tzinfo=UTC)
    assert where.created_before == datetime(2026, 1, 1, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        (b"limit=0", "limit"), (b"limit=501", "limit"), (b"limit=x", "limit"), (b"limit=", "limit"),
        (b"limit=%D9%A3", "limit"), (b"limit=" + b"9" * 5_000, "limit"),
        (b"state=", "state"), (b"state=READY", "state"), (b"state=%00", "state"),
        (b"queue=", "queue"), (b"queue=%00", "queue"), (b"task=" + b"x" * 129, "task"), (b"task=a%0A", "task"),
        (b"created_after=2026", "created_after"), (b"created_after=2026-01-01T00:00:00", "created_after"),
        (b"created_after=1969-12-31T23:59:59Z", "created_after"), (b"created_before=infinity", "created_before"),
        (b"created_before=9999-12-31T23:59:59-14:00", "created_before"), (b"created_before=20260101", "created_before"),
        (b"cursor=", "cursor"), (b"cursor=x", "cursor"), (b"cursor=%FF", None), (b"cursor=\xff", None),
        (b"foo=1", "foo"), (b"Limit=1", "Limit"), (b"limit=1&limit=2", "limit"), (b"%00=1", "\x00"),
    ],
)  # fmt: skip
def test_a_bad_query_parameter_is_named(query: bytes, parameter: str | None) -> None:
    error = refusal(lambda: decode_query(query, JobListQuery))
    assert isinstance(error, Invalid)
    assert [found.parameter for found in error.errors] == ([parameter] if parameter else [])


def test_every_bad_query_parameter_is_named_at_once() -> None:
    assert set(parameters(b"limit=0&cursor=x&state=x&foo=1")) == {"limit", "cursor", "state", "foo"}


def test_a_plus_that_a_url_turned_into_a_space_is_explained() -> None:
    assert "%2B" in parameters(b"created_after=2026-01-01T00:00:00+02:00")["created_after"]


def test_a_route_without_parameters_takes_none() -> None:
    assert decode_query(b"", Nothing) == Nothing()
    assert refusal(lambda: decode_query(b"x=1", Nothing)).errors == (FieldError("is not known here", parameter="x"),)


def test_a_cursor_leads_back_to_its_id() -> None:
    last_id = uuid4()
    assert decode_cursor(encode_cursor(last_id)) == last_id


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "A",
        "====",
        "AQ",
        "é",
        "AQAAAAAAAAAAAAAAAAAAAAA\n",
        "AgAAAAAAAAAAAAAAAAAAAAA",
        "AQAAAAAAAAAAAAAAAAAAAAAA",
        "a" * 10_000,
    ],
)
def test_what_is_no_cursor_of_ours_is_refused(cursor: str) -> None:
    with pytest.raises(ValueError, match="is not a cursor"):
        decode_cursor(cursor)
