"""The pages behind every problem's `type`."""

import msgspec

from clarion.api.decoding import Nothing
from clarion.api.operation import Call, Operation, Reply
from clarion.api.problems import ProblemPage, problem_page
from clarion.errors import NotFound, problems


class ProblemList(msgspec.Struct, frozen=True):
    """Every problem a client can meet."""

    problems: list[ProblemPage]


async def list_problems(call: Call[Nothing, Nothing]) -> Reply:
    """All pages at once."""
    return Reply(ProblemList([problem_page(problem) for problem in problems()]))


async def show_problem(call: Call[Nothing, Nothing]) -> Reply:
    """One page."""
    for problem in problems():
        if problem.slug == call.path["slug"]:
            return Reply(problem_page(problem))
    raise NotFound("there is no problem of this type; /problems lists all")


OPERATIONS = (
    Operation(
        method="GET",
        path="/problems",
        summary="List every problem type",
        handler=list_problems,
        permission=None,
        body=Nothing,
        query=Nothing,
        responds=ProblemList,
    ),
    Operation(
        method="GET",
        path="/problems/{slug}",
        summary="Explain one problem type",
        handler=show_problem,
        permission=None,
        body=Nothing,
        query=Nothing,
        responds=ProblemPage,
        problems=(NotFound,),
    ),
)
