"""Which JSON a job may carry, and where in a document a fault is.

Payloads are kept to the letter: Clarion checks them and never re-encodes them. msgspec has already validated the
syntax, in C, when a payload reaches `FaultFinder.in_payload`; what is left are two rules that JSON does not have. A
NUL cannot leave Postgres as text, and depth is bounded because every reader recurses. Both are decided in C too.

Only a document that is refused is read again, by `find_fault`, a JSON reader in Python. It exists because no parser
says *where* it gave up, and whoever sent a thousand jobs needs a JSON pointer, not a byte offset. It is some hundred
times slower than msgspec (a megabyte of small numbers takes it 0.8 s), so it looks no further than a bound.
"""

import json
import re

import msgspec

DEPTH_MAX = 64
# How far into documents one request may have faults looked for; beyond, they are told without their exact place.
SEARCH_MAX_CHARS = 1_048_576
# A pointer repeats the caller's own keys; a key may be as long as the body.
_POINTER_KEY_MAX_CHARS = 200

_HAS_NUL = "holds \\u0000, which Postgres cannot store as text"
_HAS_HALF_A_PAIR = "holds half a surrogate pair (\\ud800 to \\udfff), which is no character"
_IS_DEEP = f"nests deeper than {DEPTH_MAX} levels"

# In valid JSON, after an even number of backslashes; after an odd number it is an escaped backslash and five letters.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*+\\u0000")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_TO_ROUND = bytes.maketrans(b"{}[]", b"()()")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))

_SPACE = re.compile(r"[ \t\n\r]*+")
_SCALAR = re.compile(
    r"""(?P<string>"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+")"""
    r"|(?P<other>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+|true|false|null)"
)
_NOT_A_NUMBER = re.compile(r"NaN|-?Infinity")


class Fault(msgspec.Struct, frozen=True):
    """What is wrong with a JSON text: where (a JSON pointer) and what. `malformed`: it is not JSON at all."""

    pointer: str
    detail: str
    malformed: bool


class FaultFinder:
    """Finds the faults of one request's documents, and bounds what looking for their places costs."""

    def __init__(self) -> None:
        self._chars_left = SEARCH_MAX_CHARS

    def in_payload(self, raw: bytes) -> Fault | None:
        """Why a syntactically valid JSON text cannot be a payload, which is an object; None when it can."""
        if raw[:1] != b"{":
            return Fault("", f"must be a JSON object, not {kind_of_json(raw)}", malformed=False)
        return self.in_value(raw)

    def in_value(self, raw: bytes) -> Fault | None:
        """Why a syntactically valid JSON text cannot be stored, whatever sort of value it is; None when it can."""
        if b"\\u0000" in raw and _NUL.search(raw):
            detail = _HAS_NUL
        elif _is_deep(raw):
            detail = _IS_DEEP
        else:
            return None
        return self._search(raw.decode(), DEPTH_MAX) or Fault("", detail, malformed=False)

    def in_document(self, text: str, *, payload_depth: int) -> Fault | None:
        """Why a text is refused as a whole, payloads standing so many levels deep in it; None if that was not found."""
        return self._search(text, DEPTH_MAX + payload_depth)

    def _search(self, text: str, depth_max: int) -> Fault | None:
        fault = find_fault(text, depth_max=depth_max, chars_max=self._chars_left)
        self._chars_left = max(0, self._chars_left - len(text))
        return fault


def kind_of_json(raw: bytes) -> str:
    """What sort of value a JSON text is, in words."""
    kinds = {b"{": "an object", b"[": "an array", b'"': "a string", b"t": "true", b"f": "false", b"n": "null"}
    return kinds.get(raw.lstrip()[:1], "a number")


def pointer_to(parent: str, key: str | int) -> str:
    """The JSON pointer (RFC 6901) of a member of `parent`. A key over 200 characters is cut, with an ellipsis."""
    text = str(key)
    if len(text) > _POINTER_KEY_MAX_CHARS:
        text = text[:_POINTER_KEY_MAX_CHARS] + "…"
    return f"{parent}/{text.replace('~', '~0').replace('/', '~1')}"


def find_fault(text: str, *, depth_max: int, chars_max: int) -> Fault | None:
    """What first keeps a text from being JSON that Clarion takes; None if so much of it holds nothing of the kind."""
    try:
        _Reader(text, depth_max, chars_max).read()
    except _FaultFound as found:
        return found.fault
    return None


def _is_deep(raw: bytes) -> bool:
    """Whether a valid JSON text nests deeper than DEPTH_MAX: peels the innermost brackets off, level by level."""
    if raw.count(b"{") + raw.count(b"[") <= DEPTH_MAX:
        return False
    brackets = _STRING.sub(b"", raw).translate(_TO_ROUND, _NOT_BRACKETS)
    for _ in range(DEPTH_MAX):
        brackets = brackets.replace(b"()", b"")
    return bool(brackets)


class _FaultFound(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


class _Reader:
    """One pass over a JSON text, without recursion: the depth of a hostile one is unbounded.

    `path` holds one entry for each container that is open: the key of the object's current member (None before
    the first), or the index of the array's current item (-1 before the first).
    """

    def __init__(self, text: str, depth_max: int, chars_max: int) -> None:
        self._text = text
        self._depth_max = depth_max
        self._chars_max = chars_max
        self._at = 0
        self._path: list[str | int | None] = []

    def read(self) -> None:
        """Raises _FaultFound at the first fault; returns at the end, or once it has read far enough."""
        self._value()
        while self._path and self._at <= self._chars_max:
            self._member_or_end()
        if not self._path and self._peek():
            raise self._malformed()

    def _value(self) -> None:
        first = self._peek()
        if first and first in "{[":
            self._open(None if first == "{" else -1)
            return
        match = _SCALAR.match(self._text, self._at)
        if match is None:
            raise self._malformed()
        self._at = match.end()
        if match["string"]:
            self._decode(match["string"])

    def _open(self, entry: int | None) -> None:
        if len(self._path) >= self._depth_max:
            raise self._fault(_IS_DEEP)
        self._at += 1
        self._path.append(entry)

    def _member_or_end(self) -> None:
        current = self._path[-1]
        if self._take("]" if isinstance(current, int) else "}"):
            self._path.pop()
            return
        if current not in (None, -1) and not self._take(","):
            raise self._malformed()
        self._path[-1] = current + 1 if isinstance(current, int) else self._key()
        self._value()

    def _key(self) -> str:
        self._peek()
        match = _SCALAR.match(self._text, self._at)
        if match is None or not match["string"]:
            raise self._malformed()
        self._path[-1] = None
        key = self._decode(match["string"])
        self._at = match.end()
        if not self._take(":"):
            raise self._malformed()
        return key

    def _decode(self, token: str) -> str:
        if "\\" not in token:
            return token[1:-1]
        text: str = json.loads(token)
        if "\x00" in text:
            raise self._fault(_HAS_NUL)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self._fault(_HAS_HALF_A_PAIR) from None
        return text

    def _peek(self) -> str:
        """The next character that is not space, or nothing at the end."""
        match = _SPACE.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        self._at += found
        return found

    def _fault(self, detail: str) -> _FaultFound:
        return _FaultFound(Fault(self._pointer(), detail, malformed=False))

    def _malformed(self) -> _FaultFound:
        line = self._text.count("\n", 0, self._at) + 1
        column = self._at - self._text.rfind("\n", 0, self._at)
        detail = f"is not valid JSON at line {line}, column {column}: {self._surprise()}"
        return _FaultFound(Fault(self._pointer(), detail, malformed=True))

    def _surprise(self) -> str:
        character = self._peek()
        number = _NOT_A_NUMBER.match(self._text, self._at)
        if number:
            return f"{number[0]} has no JSON form; send null or a string"
        if character == '"':
            return "a string with a raw control character or an unknown escape, or without an end"
        return f"unexpected {character!r}" if character else "unexpected end"

    def _pointer(self) -> str:
        pointer = ""
        for entry in self._path:
            if entry not in (None, -1):
                pointer = pointer_to(pointer, entry)
        return pointer
