"""Which payloads are taken, and how the place of a fault is found."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clarion.payload import DEPTH_MAX, SEARCH_MAX_CHARS, Fault, FaultFinder, find_fault, kind_of_json, pointer_to

ANY = 10_000_000

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)


def nested(depth: int) -> bytes:
    """An object so many levels deep, itself counted."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def fault_in(text: str) -> Fault:
    fault = find_fault(text, depth_max=DEPTH_MAX, chars_max=ANY)
    assert fault
    return fault


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b'{"a":1e400}',
        b'{"a":' + b"9" * 5_000 + b"}",
        b'{"a":-0.00,"a":1E+2}',
        b'{"":{"":""}}',
        b'{"a":"\\ud83d\\ude00"}',
        b'{"a":"\\\\u0000"}',
        b'{"a":"\\\\\\\\u0000 \\"[[[["}',
        b'{"a":"' + b"[{" * 100 + b'"}',
        b'{"a":[' + b"[]," * 200 + b"[]]}",
        nested(DEPTH_MAX),
    ],
)
def test_an_object_is_a_payload(raw: bytes) -> None:
    assert FaultFinder().in_payload(raw) is None


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"null", "null"),
        (b"[]", "an array"),
        (b'"{}"', "a string"),
        (b"-1", "a number"),
        (b"true", "true"),
        (b"false", "false"),
    ],
)
def test_nothing_but_an_object_is_a_payload(raw: bytes, kind: str) -> None:
    assert kind_of_json(raw) == kind
    assert FaultFinder().in_payload(raw) == Fault("", f"must be a JSON object, not {kind}", malformed=False)


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        (b'{"a":"\\u0000"}', "/a"),
        (b'{"a":[1,{"b":"x\\u0000y"}]}', "/a/1/b"),
        (b'{"a":{"\\u0000":1}}', "/a"),
        (b'{"a":{"b":1,"c\\u0000":1}}', "/a"),
        (b'{"a/b":{"~":"\\\\\\u0000"}}', "/a~1b/~0"),
        (b'{"a":1,"b":[[],{},"\\u0000"]}', "/b/2"),
    ],
)
def test_a_nul_is_found_where_it_is(raw: bytes, pointer: str) -> None:
    fault = FaultFinder().in_payload(raw)
    assert fault
    assert (fault.pointer, fault.malformed) == (pointer, False)
    assert "\\u0000" in fault.detail


@pytest.mark.parametrize("depth", [DEPTH_MAX + 1, DEPTH_MAX + 2, 900])
def test_what_nests_too_deep_is_refused_at_the_first_level_too_many(depth: int) -> None:
    assert FaultFinder().in_payload(nested(depth)) == Fault(
        "/a" + "/0" * (DEPTH_MAX - 1), "nests deeper than 64 levels", False
    )


def test_depth_that_no_recursive_reader_survives_is_refused() -> None:
    assert fault_in('{"a":' + "[" * 1_000_000).detail == "nests deeper than 64 levels"


@pytest.mark.parametrize(
    ("text", "pointer"),
    [
        ('{"a":"\\ud800"}', "/a"),
        ('{"a":"\\ud800 "}', "/a"),
        ('{"a":"\\ud800\\u0041"}', "/a"),
        ('{"a":"\\udc00\\ud800"}', "/a"),
        ('{"a":{"\\udfff":1}}', "/a"),
    ],
)
def test_half_a_surrogate_pair_is_found_where_it_is(text: str, pointer: str) -> None:
    fault = fault_in(text)
    assert (fault.pointer, fault.malformed) == (pointer, False)
    assert "surrogate" in fault.detail
    msgspec.json.encode(fault)


@pytest.mark.parametrize(
    ("text", "pointer", "detail"),
    [
        ("", "", "line 1, column 1: unexpected end"),
        ("nul", "", "line 1, column 1: unexpected 'n'"),
        ("{}}", "", "line 1, column 3: unexpected '}'"),
        ('{"a"}', "", "line 1, column 5: unexpected '}'"),
        ("{1:2}", "", "line 1, column 2: unexpected '1'"),
        ('{"a":1,}', "/a", "line 1, column 8: unexpected '}'"),
        ('{"a":[1,]}', "/a/1", "line 1, column 9: unexpected ']'"),
        ('{"a":[1 2]}', "/a/0", "line 1, column 9: unexpected '2'"),
        ('{"a":[[],\n  {"b": NaN}]}', "/a/1/b", "line 2, column 9: NaN has no JSON form"),
        ('{"a":[-Infinity]}', "/a/0", "-Infinity has no JSON form"),
        ('{"a":01}', "/a", "unexpected '1'"),
        ('{"a":+1}', "/a", "unexpected '+'"),
        ('{"a":.5}', "/a", "unexpected '.'"),
        ('{"a":"\\x"}', "/a", "a string with a raw control character or an unknown escape"),
        ('{"a":"\t"}', "/a", "a string with a raw control character"),
        ('{"a":"', "/a", "without an end"),
        ('{"a":[', "/a/0", "unexpected end"),
        ("\ufeff{}", "", "unexpected '\\ufeff'"),
    ],
)
def test_broken_syntax_is_found_where_it_is(text: str, pointer: str, detail: str) -> None:
    fault = fault_in(text)
    assert (fault.pointer, fault.malformed) == (pointer, True)
    assert detail in fault.detail


@given(documents)
def test_whatever_is_json_has_no_fault(document: Any) -> None:
    for text in (json.dumps(document), json.dumps(document, ensure_ascii=False, indent=1)):
        fault = find_fault(text, depth_max=ANY, chars_max=ANY)
        assert fault is None or ("\\u0000" in fault.detail and "\\u0000" in text)


@given(documents, st.integers(min_value=0), st.sampled_from('{}[]",:\\u0dN1-.e \n\x00'))
def test_the_slow_reader_and_the_fast_one_agree(document: Any, place: int, character: str) -> None:
    text = json.dumps(document)
    at = place % (len(text) + 1)
    broken = text[:at] + character + text[at + 1 :]
    assume("\\u0000" not in broken)
    try:
        msgspec.json.decode(broken, type=msgspec.Raw)
        is_json = True
    except msgspec.DecodeError:
        is_json = False
    assert is_json == (find_fault(broken, depth_max=ANY, chars_max=ANY) is None)


@given(st.text())
def test_a_pointer_can_be_read_back(key: str) -> None:
    pointer = pointer_to("/a", key[:200])
    assert pointer.removeprefix("/a/").replace("~1", "/").replace("~0", "~") == key[:200]


def test_a_pointer_does_not_grow_with_a_key() -> None:
    assert pointer_to("", "k" * 1_000_000) == "/" + "k" * 200 + "…"


def test_beyond_a_bound_a_fault_is_told_without_its_place() -> None:
    faulty = b'{"a":[' + b"1," * (SEARCH_MAX_CHARS // 2) + b'"\\u0000"]}'
    assert FaultFinder().in_payload(faulty) == Fault("", "holds \\u0000, which Postgres cannot store as text", False)


def test_the_bound_is_for_all_payloads_of_a_request_together() -> None:
    faulty = b'{"a":[' + b"1," * (SEARCH_MAX_CHARS // 4) + b'"\\u0000"]}'
    finder = FaultFinder()
    faults = [finder.in_payload(faulty) for _ in range(3)]
    assert [fault.pointer for fault in faults if fault] == ["/a/262144", "", ""]


def test_a_payload_without_fault_is_not_searched() -> None:
    finder = FaultFinder()
    for _ in range(100):
        assert finder.in_payload(b'{"a":"' + b"\\\\u0000" * 20_000 + b'"}') is None
    fault = finder.in_payload(b'{"a":["\\u0000"]}')
    assert fault
    assert fault.pointer == "/a/0"
