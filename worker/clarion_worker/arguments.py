"""A handler's arguments, validated from its signature: the payload's keys are the parameters' names."""

import inspect
import typing
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import msgspec

from clarion.errors import UsageError

CONTEXT_PARAMETER = "ctx"


class Arguments:
    """Decodes a payload for one handler. A key that no parameter takes is an error, unless there is a `**kwargs`."""

    def __init__(self, handler: Callable[..., Any], *, task: str) -> None:
        parameters = inspect.signature(handler).parameters
        self.wants_context = CONTEXT_PARAMETER in parameters
        self._decoder = _decoder(handler, parameters, task)

    def decode(self, payload: str) -> dict[str, Any]:
        """Keyword arguments for the handler; raises ValueError in words about the payload."""
        try:
            decoded = self._decoder.decode(payload)
        except Exception as error:
            raise ValueError(f"the payload does not fit the handler: {error}") from error
        if isinstance(decoded, dict):
            return decoded
        return {name: value for name, value in msgspec.structs.asdict(decoded).items() if value is not msgspec.UNSET}


def _decoder(
    handler: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], task: str
) -> msgspec.json.Decoder[Any]:
    kinds = {parameter.kind for parameter in parameters.values()}
    if kinds & {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}:
        raise UsageError(f"task {task}: a handler takes its arguments by name, so no positional-only ones and no *args")
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return msgspec.json.Decoder(dict[str, Any])
    hints = _hints(handler, parameters, task)
    fields = [
        _field(parameter, hints.get(name, Any)) for name, parameter in parameters.items() if name != CONTEXT_PARAMETER
    ]
    try:
        return msgspec.json.Decoder(msgspec.defstruct("Arguments", fields, kw_only=True, forbid_unknown_fields=True))
    except TypeError as error:
        raise UsageError(f"task {task}: its signature cannot be read from JSON: {error}") from error


def _hints(handler: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], task: str) -> dict[str, Any]:
    """The types of the arguments that come from the payload; those of `ctx` and of the result are nobody's business."""
    wanted = {
        name: parameter.annotation
        for name, parameter in parameters.items()
        if name != CONTEXT_PARAMETER and parameter.annotation is not inspect.Parameter.empty
    }
    names = getattr(inspect.unwrap(handler), "__globals__", {})
    try:
        return typing.get_type_hints(SimpleNamespace(__annotations__=wanted), names, include_extras=True)
    except NameError as error:
        raise UsageError(
            f"task {task}: {error} in its signature: import it at run time, not under TYPE_CHECKING"
        ) from error


def _field(parameter: inspect.Parameter, hint: Any) -> tuple[str, Any] | tuple[str, Any, Any]:
    if parameter.default is inspect.Parameter.empty:
        return (parameter.name, hint)
    # Left out means left to the function's own default, which may be any object.
    return (parameter.name, hint | msgspec.UnsetType if hint is not Any else Any, msgspec.UNSET)
