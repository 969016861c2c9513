"""How attempts end over HTTP: every verb, said again, said with a token that is over, and said with mistakes."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx2
import msgspec
import pytest

from api_harness import client_of, services_over
from clarion.api.lease_bodies import whole_characters
from clarion.api.lease_tokens import decode_lease_token, encode_lease_token
from clarion.api.requests import IDEMPOTENCY_KEY_MAX_CHARS
from clarion.db import Database
from clarion.errors import Unstorable
from clarion.execution import Completed, Completion, Release
from clarion.job import NewJob
from clarion.main import running_services
from clarion.settings import Settings
from clarion.store import Store

JSON = {"content-type": "application/json"}
ERROR = {"type": "Oops", "message": "no luck"}
# Each verb with a body, and the state that it takes a job to.
VERBS: list[tuple[str, Any, str]] = [
    ("complete", {"result": {"n": 1}}, "succeeded"),
    ("fail", {"error": ERROR}, "scheduled"),
    ("fail", {"error": ERROR, "retryable": False}, "dead"),
    ("snooze", {"delay": "1h"}, "scheduled"),
    ("release", None, "ready"),
]
each_verb = pytest.mark.parametrize(("verb", "body", "state"), VERBS)


async def running(store: Store, **options: Any) -> dict[str, Any]:
    """A job of its own that is claimed: its id and its token."""
    [added] = await store.enqueue_jobs([NewJob(task="work", queue="mine", **options)])
    [lease] = await store.claim_for(uuid4(), {"mine": 1}, None, lease_seconds=30)
    assert lease.id == added.id
    return {"id": str(lease.id), "token": encode_lease_token(lease.id, lease.token)}


async def say(
    client: httpx2.AsyncClient, lease: Mapping[str, Any], verb: str, body: Any = None, **headers: str
) -> httpx2.Response:
    """One call; bytes are sent as they are."""
    content = body if isinstance(body, bytes) else msgspec.json.encode(body) if body is not None else b""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.post(f"/v1/leases/{lease['token']}/{verb}", content=content, headers=JSON | names)


async def job_of(client: httpx2.AsyncClient, lease: Mapping[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = (await client.get(f"/v1/jobs/{lease['id']}")).json()
    return job


async def lose(store: Store, lease: Mapping[str, Any]) -> dict[str, Any]:
    """Another worker has the job now; its lease."""
    await store.release_jobs([Release(*decode_lease_token(lease["token"]))])
    [other] = await store.claim_for(uuid4(), {"mine": 1}, None, lease_seconds=30)
    return {"id": str(other.id), "token": encode_lease_token(other.id, other.token)}


def errors(answer: httpx2.Response) -> set[str]:
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/invalid"), answer.text
    return {error.get("pointer", error.get("parameter")) for error in answer.json()["errors"]}


# -- Every verb ------------------------------------------------------------------------------------------------------


@each_verb
async def test_an_ending_says_what_became_of_the_job(
    client: httpx2.AsyncClient, store: Store, verb: str, body: Any, state: str
) -> None:
    lease = await running(store)
    answer = await say(client, lease, verb, body)
    assert answer.status_code == 200
    job = await job_of(client, lease)
    assert (answer.json()["id"], answer.json()["state"], job["state"]) == (lease["id"], state, state)
    if verb == "complete":
        assert answer.json()["result"] == {"n": 1}
    else:
        assert answer.json()["run_at"] == (job["run_at"] if state == "scheduled" else None)


@each_verb
async def test_the_same_call_again_has_the_same_answer(
    client: httpx2.AsyncClient, store: Store, verb: str, body: Any, state: str
) -> None:
    lease = await running(store)
    first, again = [await say(client, lease, verb, body) for _ in range(2)]
    assert (again.status_code, again.content) == (first.status_code, first.content)


@each_verb
async def test_the_same_call_has_the_same_answer_long_after_the_job_has_gone_on(
    client: httpx2.AsyncClient, store: Store, database: Database, verb: str, body: Any, state: str
) -> None:
    lease = await running(store)
    first = await say(client, lease, verb, body)
    if state != "succeeded":
        await store.retry_jobs([UUID(lease["id"])], [0], actor="api")
        [other] = await store.claim_for(uuid4(), {"mine": 1}, None, lease_seconds=30)
        [completed] = await store.complete_jobs([Completion(other.id, other.token, "2")])
        assert completed.state == "succeeded"
    again = await say(client, lease, verb, body)
    assert (again.status_code, again.content) == (200, first.content)


@each_verb
async def test_a_token_that_is_over_ends_nothing(
    client: httpx2.AsyncClient, store: Store, verb: str, body: Any, state: str
) -> None:
    lease = await running(store)
    await lose(store, lease)
    if verb == "release":  # which is what took the job away, so it is the same call again
        assert (await say(client, lease, verb, body)).json()["state"] == "ready"
        return
    answer = await say(client, lease, verb, body)
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/lease-lost")
    assert (answer.json()["state"], (await job_of(client, lease))["state"]) == ("running", "running")


@each_verb
async def test_a_token_of_an_attempt_that_was_ended_otherwise_ends_nothing(
    client: httpx2.AsyncClient, store: Store, verb: str, body: Any, state: str
) -> None:
    for other_verb, other_body, other_state in VERBS:
        if other_verb != verb:
            lease = await running(store)
            await say(client, lease, other_verb, other_body)
            answer = await say(client, lease, verb, body)
            assert (answer.status_code, answer.json()["state"]) == (409, other_state)
            await store.claim_for(uuid4(), {"mine": 1}, None, lease_seconds=30)  # out of the next one's way


@each_verb
async def test_a_token_of_a_job_that_does_not_exist_has_no_state(
    client: httpx2.AsyncClient, verb: str, body: Any, state: str
) -> None:
    answer = await say(client, {"token": encode_lease_token(uuid4(), uuid4())}, verb, body)
    assert (answer.status_code, answer.json()["state"]) == (409, None)


@each_verb
async def test_after_a_cancellation_was_requested_success_counts_and_all_else_is_cancelled(
    client: httpx2.AsyncClient, store: Store, verb: str, body: Any, state: str
) -> None:
    lease = await running(store)
    await store.cancel_jobs([UUID(lease["id"])], actor="api:ada")
    answer, again = [await say(client, lease, verb, body) for _ in range(2)]
    final = "succeeded" if verb == "complete" else "cancelled"
    assert (answer.json()["state"], (await job_of(client, lease))["state"]) == (final, final)
    assert again.content == answer.content
    if verb != "complete":
        assert answer.json()["run_at"] is None


@each_verb
async def test_the_same_call_many_times_at_once_has_one_answer(
    store: Store, settings: Settings, verb: str, body: Any, state: str
) -> None:
    """Through the batchers of a real process, which put them into one statement, or into several."""
    lease = await running(store)
    answers: list[httpx2.Response] = []
    async with running_services(store, settings) as services, client_of(services) as client:

        async def call() -> None:
            answers.append(await say(client, lease, verb, body))

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(call)
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert answers[0].json()["state"] == state
    if verb == "complete":
        assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1


async def test_the_way_of_a_cancellation(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    await store.cancel_jobs([UUID(lease["id"])], actor="api")
    body = {"worker": str(uuid4()), "leases": [{"token": lease["token"]}]}
    [told] = (await client.post("/v1/leases/heartbeat", json=body)).json()["leases"]
    assert (told["status"], told["state"]) == ("cancel", "running")
    assert (await say(client, lease, "release")).json() == {"id": lease["id"], "state": "cancelled", "run_at": None}


# -- Complete --------------------------------------------------------------------------------------------------------


async def test_a_result_is_kept_to_the_letter(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    answer = await say(client, lease, "complete", b'{"result": {"b":1.50, "a":12345678901234567890.1,  "b":2}}')
    text = '"result":{"b":1.50, "a":12345678901234567890.1,  "b":2}'
    assert text in answer.text
    assert text in (await client.get(f"/v1/jobs/{lease['id']}")).text


@pytest.mark.parametrize(
    ("body", "result"),
    [
        (b"", None),
        (b"{}", None),
        (b'{"result":null}', None),
        (b'{"result":0}', 0),
        (b'{"result":"x"}', "x"),
        (b'{"result":[]}', []),
    ],
)
async def test_any_json_is_a_result_and_none_is_too(
    client: httpx2.AsyncClient, store: Store, body: bytes, result: Any
) -> None:
    lease = await running(store)
    assert (await say(client, lease, "complete", body)).json()["result"] == result
    assert (await job_of(client, lease))["result"] == result


async def test_the_first_result_stands(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    first = await say(client, lease, "complete", {"result": 1})
    again = await say(client, lease, "complete", {"result": 2})
    assert "idempotency-replayed" not in first.headers
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("again", ["k-1", '"k-1"', None])
async def test_the_same_key_again_is_a_replay(client: httpx2.AsyncClient, store: Store, again: str | None) -> None:
    lease = await running(store)
    first = await say(client, lease, "complete", {"result": 1}, idempotency_key="k-1")
    named = {} if again is None else {"idempotency_key": again}
    answer = await say(client, lease, "complete", {"result": 1}, **named)
    assert (answer.status_code, answer.content) == (200, first.content)
    assert answer.headers["idempotency-replayed"] == "true"


async def test_another_key_for_the_same_lease_is_a_mismatch(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    await say(client, lease, "complete", {"result": 1}, idempotency_key="one")
    answer = await say(client, lease, "complete", {"result": 1}, idempotency_key="two")
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/idempotency-mismatch")
    assert answer.json()["errors"][0]["parameter"] == "Idempotency-Key"


@pytest.mark.parametrize(
    "key", ["", '""', '"a', "a" * (IDEMPOTENCY_KEY_MAX_CHARS + 1), "ü", '"a\\b"', '"a";v=1', "a\tb"]
)
async def test_a_key_that_is_none_is_refused_and_ends_nothing(
    client: httpx2.AsyncClient, store: Store, key: str
) -> None:
    lease = await running(store)
    content, url = b'{"result":1}', f"/v1/leases/{lease['token']}/complete"
    headers = [(b"content-type", b"application/json"), (b"idempotency-key", key.encode())]
    assert errors(await client.post(url, content=content, headers=headers)) == {"Idempotency-Key"}
    assert (await job_of(client, lease))["state"] == "running"


async def test_a_key_may_have_any_printable_character(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    await say(client, lease, "complete", {"result": 1}, idempotency_key=r'"a \"b\" \\ c"')
    again = await say(client, lease, "complete", {"result": 1}, idempotency_key=r"""a "b" \ c""")
    assert again.headers["idempotency-replayed"] == "true"


async def test_two_keys_are_refused(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    headers = [*JSON.items(), ("idempotency-key", "a"), ("idempotency-key", "a")]
    answer = await client.post(f"/v1/leases/{lease['token']}/complete", content=b"{}", headers=headers)
    assert errors(answer) == {"Idempotency-Key"}


@pytest.mark.parametrize(
    ("result", "pointer", "why"),
    [
        (b'"\\u0000"', "/result", "u0000"),
        (b'{"a": ["\\u0000"]}', "/result/a/0", "u0000"),
        (b'{"a": "\\ud800"}', "/result/a", "surrogate"),
        (b"[" * 65 + b"]" * 65, "/result" + "/0" * 64, "64 levels"),
        (b"[" * 5000 + b"]" * 5000, "/result" + "/0" * 66, "64 levels"),
        (b'"%s"' % (b"x" * 1_048_575), "/result", "1048577 bytes"),
    ],
)
async def test_a_result_that_cannot_be_kept_is_the_end_of_the_job(
    client: httpx2.AsyncClient, store: Store, result: bytes, pointer: str, why: str
) -> None:
    lease = await running(store)
    answer, again = [await say(client, lease, "complete", b'{"result": %s}' % result) for _ in range(2)]
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/result-unstorable")
    [error] = answer.json()["errors"]
    assert error["pointer"].startswith(pointer)
    assert why in error["detail"]
    job = await job_of(client, lease)
    assert (job["state"], job["dead_reason"], why in job["error"]["message"]) == ("dead", "result_unstorable", True)
    assert {**again.json(), "request_id": None} == {**answer.json(), "request_id": None}


async def test_a_result_of_just_the_limit_is_kept(database: Database, settings: Settings) -> None:
    changed = msgspec.structs.replace(settings, result_max_bytes=10)
    services = services_over(Store(database, changed), changed)
    async with client_of(services) as client:
        fits, does_not = await running(services.store), await running(services.store)
        assert (await say(client, fits, "complete", b'{"result":    "12345678"}')).status_code == 200
        assert (await say(client, does_not, "complete", b'{"result":"123456789"}')).status_code == 422


async def test_a_result_that_postgres_refuses_is_the_end_of_the_job(database: Database, settings: Settings) -> None:
    class Refusing(Store):
        async def complete_jobs(self, completions: Any) -> list[Completed]:
            raise Unstorable("Postgres refuses the value")

    services = services_over(Refusing(database, settings), settings)
    async with client_of(services) as client:
        lease = await running(services.store)
        answer, again = [await say(client, lease, "complete", {"result": 1}) for _ in range(2)]
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/result-unstorable")
        assert again.json()["detail"] == answer.json()["detail"]
        assert (await job_of(client, lease))["dead_reason"] == "result_unstorable"


async def test_a_result_that_cannot_be_kept_is_told_also_when_the_job_is_cancelled_by_it(
    client: httpx2.AsyncClient, store: Store
) -> None:
    lease = await running(store)
    await store.cancel_jobs([UUID(lease["id"])], actor="api")
    answer = await say(client, lease, "complete", {"result": "\x00"})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/result-unstorable")
    assert (await job_of(client, lease))["state"] == "cancelled"


async def test_a_result_that_cannot_be_kept_is_fenced_too(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    other = await lose(store, lease)
    answer = await say(client, lease, "complete", {"result": "\x00"})
    assert (answer.status_code, answer.json()["state"]) == (409, "running")
    assert (await say(client, other, "complete", {"result": 1})).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"), [(b"[]", 422), (b'{"results": 1}', 422), (b'{"result": "\\u0000", "x": 1}', 422), (b"{", 400)]
)
async def test_a_body_that_is_wrong_otherwise_ends_nothing(
    client: httpx2.AsyncClient, store: Store, body: bytes, status: int
) -> None:
    lease = await running(store)
    answer = await say(client, lease, "complete", body)
    assert (answer.status_code, answer.json()["type"] != "/problems/result-unstorable") == (status, True)
    assert (await job_of(client, lease))["state"] == "running"


async def test_a_query_that_is_wrong_ends_nothing(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    for query in ("x=1", "%ff=1", "&".join(["a=1"] * 60)):
        answer = await client.post(f"/v1/leases/{lease['token']}/complete?{query}", json={})
        assert answer.json()["type"] == "/problems/invalid"
    assert (await job_of(client, lease))["state"] == "running"


# -- Fail ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "state", "dead_reason", "outcome"),
    [
        ({}, "scheduled", None, "failed"),
        ({"outcome": "timeout"}, "scheduled", None, "timeout"),
        ({"outcome": "undecodable"}, "dead", "undecodable_payload", "failed"),
        ({"retryable": False}, "dead", "not_retryable", "failed"),
        ({"retryable": False, "outcome": "timeout", "retry_in": "5s"}, "dead", "not_retryable", "timeout"),
        ({"retryable": False, "outcome": "undecodable"}, "dead", "undecodable_payload", "failed"),
    ],
)
async def test_a_failure_is_recorded_as_it_was(
    client: httpx2.AsyncClient, store: Store, body: Any, state: str, dead_reason: str | None, outcome: str
) -> None:
    lease = await running(store)
    answer = await say(client, lease, "fail", {"error": {**ERROR, "trace": "at line 1"}} | body)
    assert answer.json()["state"] == state
    job = await job_of(client, lease)
    assert (job["dead_reason"], job["error"]) == (dead_reason, {"type": "Oops", "message": "no luck"})
    [attempt] = await store.list_attempts(UUID(lease["id"]))
    assert (attempt.outcome, attempt.error_trace) == (outcome, "at line 1")


async def test_the_last_try_is_the_end(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store, max_attempts=1)
    assert (await say(client, lease, "fail", {"error": ERROR})).json()["state"] == "dead"
    assert (await job_of(client, lease))["dead_reason"] == "attempts_exhausted"


async def test_a_failure_may_say_when_to_try_again(
    client: httpx2.AsyncClient, store: Store, database: Database
) -> None:
    lease = await running(store)
    await say(client, lease, "fail", {"error": ERROR, "retry_in": "7d"})
    [row] = await database.fetch("select extract(epoch from run_at - now())::float8 as wait from clarion.jobs")
    assert 7 * 86_400 - 60 < row["wait"] <= 7 * 86_400


async def test_texts_of_errors_are_cut_and_cleaned_and_never_refused(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    error = rb'{"type": "%s", "message": "%s", "trace": "a\u0000b \ud83d \udc4b\ud83d\ude00 \\ud83d"}'
    body = b'{"error": %s}' % (error % (b"T" * 900, b"m" * 2_000_000))
    assert (await say(client, lease, "fail", body)).status_code == 200
    [attempt] = await store.list_attempts(UUID(lease["id"]))
    assert [len(text or "") <= most for text, most in ((attempt.error_type, 200), (attempt.error_message, 4096))]
    assert attempt.error_trace == "a\ufffdb \ufffd \ufffd\N{GRINNING FACE} \\ud83d"


async def test_an_error_without_a_type_is_an_error(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    await say(client, lease, "fail", {"error": {"type": "", "message": ""}})
    assert (await job_of(client, lease))["error"] == {"type": "Error", "message": ""}


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, {"/error"}),
        ({"error": "Oops"}, {"/error"}),
        ({"error": {}}, {"/error/type", "/error/message"}),
        (
            {"error": {"type": 1, "message": None, "trace": [], "x": 1}, "outcome": "lost", "retryable": "no", "y": 1},
            {"/error/type", "/error/message", "/error/trace", "/error/x", "/outcome", "/retryable", "/y"},
        ),
        ({"error": ERROR, "retry_in": "8d"}, {"/retry_in"}),
        ({"error": ERROR, "retry_in": -1}, {"/retry_in"}),
    ],
)
async def test_every_mistake_of_a_failure_is_listed(
    client: httpx2.AsyncClient, store: Store, body: Any, wrong: set[str]
) -> None:
    lease = await running(store)
    assert errors(await say(client, lease, "fail", body)) == wrong
    assert (await job_of(client, lease))["state"] == "running"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (rb"\ud800", rb"\ufffd"),
        (rb"\uDC00\uD800", rb"\ufffd\ufffd"),
        (rb"\uD83D\uDE00", rb"\uD83D\uDE00"),
        (rb"\ud800\ud83d\ude00\ude00", rb"\ufffd\ud83d\ude00\ufffd"),
        (rb"\\ud800", rb"\\ud800"),
        (rb"\\\ud800", rb"\\\ufffd"),
        (rb"\ud83d\\ude00", rb"\ufffd\\ude00"),
        (rb"\ud7ff\ue000", rb"\ud7ff\ue000"),
    ],
)
def test_only_halves_of_characters_are_replaced(text: bytes, whole: bytes) -> None:
    assert whole_characters(b'["%s"]' % text) == b'["%s"]' % whole


# -- Snooze ----------------------------------------------------------------------------------------------------------


async def test_a_snooze_costs_no_attempt(client: httpx2.AsyncClient, store: Store, database: Database) -> None:
    lease = await running(store)
    await say(client, lease, "snooze", {"delay": "365d"})
    job = await job_of(client, lease)
    assert (job["state"], job["attempt"], job["snoozes"]) == ("scheduled", 0, 1)
    [row] = await database.fetch("select extract(epoch from run_at - now())::float8 as wait from clarion.jobs")
    assert 365 * 86_400 - 60 < row["wait"] <= 365 * 86_400


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, {"/delay"}),
        ({"delay": None}, {"/delay"}),
        ({"delay": "366d"}, {"/delay"}),
        ({"delay": "soon", "reason": "x"}, {"/delay", "/reason"}),
    ],
)
async def test_every_mistake_of_a_snooze_is_listed(
    client: httpx2.AsyncClient, store: Store, body: Any, wrong: set[str]
) -> None:
    lease = await running(store)
    assert errors(await say(client, lease, "snooze", body)) == wrong


# -- Release ---------------------------------------------------------------------------------------------------------


async def test_a_release_needs_no_body_and_costs_no_attempt(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    answer = await client.post(f"/v1/leases/{lease['token']}/release")
    assert answer.json() == {"id": lease["id"], "state": "ready", "run_at": None}
    assert (await job_of(client, lease))["attempt"] == 0


async def test_a_job_that_was_released_is_claimed_under_another_token(client: httpx2.AsyncClient, store: Store) -> None:
    lease = await running(store)
    await say(client, lease, "release")
    [other] = await store.claim_for(uuid4(), {"mine": 1}, None, lease_seconds=30)
    assert encode_lease_token(other.id, other.token) != lease["token"]
    assert (await say(client, lease, "complete")).status_code == 409


# -- Methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["complete", "fail", "snooze", "release", "progress", "logs"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
async def test_calls_about_leases_are_posts(client: httpx2.AsyncClient, method: str, verb: str) -> None:
    answer = await client.request(method, f"/v1/leases/{encode_lease_token(uuid4(), uuid4())}/{verb}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
