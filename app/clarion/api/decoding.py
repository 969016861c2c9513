"""From the bytes of a request to a struct, or to a list of everything that is wrong with them.

The way in is one call into msgspec. It stops at the first thing wrong, so when it refuses, and only then, a second
pass takes the document apart field by field and lists all of it. Where the text is not JSON at all, a third finds the
place (`payload.find_fault`).
"""

import difflib
import re
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, TypeVar, get_args, get_origin
from urllib.parse import parse_qsl

import anyio.to_thread
import msgspec

from clarion.errors import ClarionError, FieldError, Invalid, Malformed
from clarion.payload import FaultFinder, kind_of_json, pointer_to

# A body may hold more errors than anybody will read; the answer must not outgrow it.
ERRORS_MAX = 1_000
# Bodies up to this size are decoded on the event loop: a hop to a thread costs more than they do.
INLINE_MAX_BYTES = 65_536
# What stands around a payload at most: a batch, its array of jobs, a job.
_PAYLOAD_DEPTH = 3
_QUERY_FIELDS_MAX = 50
_UNHELPFUL = re.compile("matching regex|Invalid enum|RFC3339|timezone")


class Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request may say: the types of its fields, and the rules that types cannot express."""

    def broken_rules(self, finder: FaultFinder) -> Iterator[FieldError]:
        """Every rule that values of the right types still break, with pointers from this struct on."""
        yield from ()


class Nothing(Form, frozen=True):
    """No body, or no query parameters."""


FormT = TypeVar("FormT", bound=Form)


async def decode_body(body: bytes, kind: type[FormT]) -> FormT:
    """The body as a struct; a large one in a thread, so that reading it does not stop everybody else's requests.

    Raises Malformed, or Invalid with every error.
    """
    if len(body) <= INLINE_MAX_BYTES:
        return decode(body, kind)
    return await anyio.to_thread.run_sync(decode, body, kind)


def decode(body: bytes, kind: type[FormT]) -> FormT:
    """The same, here and now."""
    try:
        # msgspec.Raw keeps bytes as they are, so UTF-8 is checked on the whole.
        str(body, "utf-8")
        value: FormT = _decoder(kind).decode(body)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise _diagnose(body, kind, error) from None
    errors = list(islice(value.broken_rules(FaultFinder()), ERRORS_MAX))
    if errors:
        raise invalid(errors)
    return value


def decode_query(query_string: bytes, kind: type[FormT]) -> FormT:
    """The query parameters as a struct; raises Invalid with every error."""
    values: dict[str, Any] = {}
    errors = list(_query_errors(_pairs(query_string), kind, values)) if query_string else []
    value = kind(**values)
    errors += value.broken_rules(FaultFinder())
    if errors:
        raise invalid(errors)
    return value


def invalid(errors: Sequence[FieldError]) -> Invalid:
    """The problem of a request with these errors; its detail shows the first to those who read no further."""
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Invalid(f"{first.parameter or first.pointer or 'the body'}: {first.detail}{more}", errors=errors)


@cache
def _fields(kind: type[Form]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


@cache
def _decoder(kind: type[Form]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


def _diagnose(body: bytes, kind: type[Form], error: Exception) -> ClarionError:
    finder = FaultFinder()
    if not body.strip():
        return _malformed("is empty", "")
    if isinstance(error, UnicodeDecodeError):
        before = finder.in_document(body[: error.start].decode(), payload_depth=_PAYLOAD_DEPTH)
        return _malformed(f"is not UTF-8 at byte {error.start}", before.pointer if before else "")
    try:
        # Of a key that is there twice the first may be wrong and the last, which the second pass sees, not.
        return invalid(list(islice(_field_errors(body, kind, finder), ERRORS_MAX)) or [_first_error(error)])
    except (msgspec.DecodeError, RecursionError) as syntax_error:
        fault = finder.in_document(body.decode(), payload_depth=_PAYLOAD_DEPTH)
        if fault is None:
            return _malformed(f"is not JSON that can be read: {syntax_error}", "")
        if fault.malformed:
            return _malformed(fault.detail, fault.pointer)
        return invalid([FieldError(fault.detail, pointer=fault.pointer)])


def _malformed(detail: str, pointer: str) -> Malformed:
    return Malformed(f"the body {detail}", errors=[FieldError(detail, pointer=pointer)])


def _first_error(error: Exception) -> FieldError:
    detail, _, path = str(error).rpartition(" - at `$")
    return FieldError(detail or path, pointer=re.sub(r"[.\[]", "/", path.strip("`")).replace("]", "") if detail else "")


def _field_errors(raw: bytes, kind: type[Form], finder: FaultFinder, at: str = "") -> Iterator[FieldError]:
    """Every error of an object that is to become a `kind`. Raises DecodeError when it is not even JSON."""
    if not raw.lstrip().startswith(b"{"):
        msgspec.json.decode(raw, type=msgspec.Raw)
        yield FieldError(f"must be a JSON object, not {kind_of_json(raw)}", pointer=at)
        return
    members = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    fields = _fields(kind)
    good: dict[str, Any] = {}
    for name, field in fields.items():
        if name in members:
            member = yield from _member(bytes(members[name]), field, finder, pointer_to(at, name))
            good |= {} if member is None else {field.name: member}
        elif field.required:
            yield FieldError("is required", pointer=pointer_to(at, name))
    for name in members:
        if name not in fields:
            yield FieldError(_unknown(name, fields), pointer=pointer_to(at, name))
    # Required fields that are missing or bad stand empty, so that the rules of the others can still be checked.
    empty = {field.name: () for field in fields.values() if field.required}
    for error in kind(**(empty | good)).broken_rules(finder):
        yield below(at, error)


def _member(
    raw: bytes, field: msgspec.structs.FieldInfo, finder: FaultFinder, at: str
) -> Generator[FieldError, None, Any]:
    """Yields a member's errors and returns its value, None if there is none (or it is null: nothing to check)."""
    item = next(iter(get_args(field.type)), None) if get_origin(field.type) is list else None
    try:
        if item is None or not issubclass(item, Form):
            return msgspec.json.decode(raw, type=field.type)
        for index, part in enumerate(msgspec.json.decode(raw, type=list[msgspec.Raw])):
            yield from _field_errors(bytes(part), item, finder, pointer_to(at, index))
    except msgspec.ValidationError as error:
        yield FieldError(_in_words(error, field.type), pointer=at)
    return None


def _pairs(query_string: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(
            query_string.decode(), keep_blank_values=True, errors="strict", max_num_fields=_QUERY_FIELDS_MAX
        )
    except ValueError as error:
        raise Invalid(f"the query string cannot be read: {error}") from None


def _query_errors(pairs: Sequence[tuple[str, str]], kind: type[Form], values: dict[str, Any]) -> Iterator[FieldError]:
    fields = _fields(kind)
    for name, text in pairs:
        if name not in fields:
            yield FieldError(_unknown(name, fields), parameter=name)
        elif name in values:
            yield FieldError("is given twice", parameter=name)
        else:
            # Only numbers need a lenient reading; a lenient date would take "2026" for seconds since 1970.
            kind_of_field = fields[name].type
            strict = int not in (kind_of_field, *get_args(kind_of_field))
            try:
                values[name] = msgspec.convert(text, kind_of_field, strict=strict)
            except msgspec.ValidationError as error:
                hint = "; in a URL, write + as %2B" if " " in text else ""
                # msgspec would say that it "got `str`", which in a URL everything is.
                detail = _description(kind_of_field) or str(error)
                yield FieldError(detail + hint, parameter=name)


def below(at: str, error: FieldError) -> FieldError:
    """An error found in a part, with its place in the whole."""
    return FieldError(error.detail, pointer=f"{at}{error.pointer or ''}", parameter=error.parameter)


def _unknown(name: str, fields: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name[:64], fields, n=1)
    return f"is not known here; did you mean `{near[0]}`?" if near else "is not known here"


def _in_words(error: msgspec.ValidationError, kind: Any) -> str:
    """msgspec's message without its path; where that quotes a pattern or hides the choices, what the field says."""
    text = str(error).rpartition(" - at `$")[0] or str(error)
    return (_description(kind) or text) if _UNHELPFUL.search(text) else text


def _description(kind: Any) -> str | None:
    metas = [meta for part in (kind, *get_args(kind)) for meta in getattr(part, "__metadata__", ())]
    return next((meta.description for meta in metas if isinstance(meta, msgspec.Meta)), None)
