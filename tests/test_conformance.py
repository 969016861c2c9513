"""The conformance run: the example workers pass it whole, and broken ones fail exactly where they are broken."""

import hashlib
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from clarion.cli import EXIT_USAGE, main
from clarion.conformance.examination import check_names
from clarion.conformance.forms import Verb, read_form
from clarion.conformance.scenarios import SCENARIOS
from clarion.conformance.script import Refusal
from clarion.conformance.trial import Terms, trial
from verification import clarion

EXAMPLES = Path(__file__).resolve().parents[1] / "worker" / "examples"
WORKER_ID = "0198f8f0-0000-7000-8000-000000000001"
JSON = "application/json"

# Does its jobs, and knows nothing of leases, of cancelling, of bad weather and of stopping.
NAIVE_WORKER = """
import json, os, time, urllib.request, uuid

token = os.environ.get("CLARION_API_TOKEN")
headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
queues = os.environ["CLARION_QUEUES"].split(",")
worker = str(uuid.uuid4())


def post(path, body):
    request = urllib.request.Request(os.environ["CLARION_URL"] + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read() or "{}")


while True:
    for lease in post("/v1/leases", {"worker": worker, "queues": queues, "wait": "30s"}).get("leases", []):
        verb, body = "complete", {"result": lease["args"]}
        if lease["task"] == "demo.sleep":
            time.sleep(lease["args"]["seconds"])
        if lease["task"] == "demo.fail":
            verb, body = "fail", {"error": {"type": "Failure", "message": lease["args"]["message"]}}
        post(f"/v1/leases/{lease['token']}/{verb}", body)
"""
KEPT_BY_NAIVE_WORKER = {
    "asks-for-leases",
    "works-without-a-token",
    "waits-in-its-requests",
    "completes",
    "takes-a-job-late",
    "reports-failures",
    "has-a-fresh-id",
    "sends-what-the-protocol-knows",
    "names-the-tokens-it-was-given",
    "shows-its-api-token",
}


def example(name: str) -> str:
    """The command line of an example; skips the test where this machine has not the tools for it."""
    tools = {"worker.sh": ["bash", "curl", "awk"], "worker.mjs": ["node"]}[name]
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        if os.environ.get("CLARION_TEST_REQUIRE_TOOLS") == "1":
            pytest.fail(f"{missing} not installed")
        pytest.skip(f"{missing} not installed")
    return shlex.join([tools[0], str(EXAMPLES / name)])


async def report_on(worker_cmd: str, *flags: str) -> dict[str, Any]:
    """What `clarion conformance --json` prints; most scenarios wait most of the time, so all of them run at once."""
    command = [*clarion(), "conformance", "--worker-cmd", worker_cmd, "--json", "--at-once", "24", *flags]
    done = await anyio.run_process(command, check=False)
    report: dict[str, Any] = msgspec.json.decode(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1), done.stderr.decode()
    return report


def failed(report: dict[str, Any]) -> dict[str, str]:
    """The names of the checks that failed, with what was seen."""
    return {check["name"]: check["seen"] for check in report["checks"] if not check["ok"]}


@pytest.mark.parametrize("name", ["worker.sh", "worker.mjs"])
async def test_an_example_worker_keeps_every_promise(name: str) -> None:
    report = await report_on(example(name))
    assert [check["name"] for check in report["checks"]] == check_names()
    assert failed(report) == {}


async def test_a_worker_that_only_does_its_jobs_keeps_no_other_promise(tmp_path: Path) -> None:
    (tmp_path / "naive.py").write_text(NAIVE_WORKER)
    report = await report_on(shlex.join([sys.executable, str(tmp_path / "naive.py")]), "--timeout", "8s")
    assert set(check_names()) - set(failed(report)) == KEPT_BY_NAIVE_WORKER


@pytest.mark.parametrize(
    ("good", "bad", "broken"),
    [
        ("'\"lost\"') verdict=lost ;;", "", {"drops-a-lost-job"}),
        ("$(</proc/sys/kernel/random/uuid)", WORKER_ID, {"has-a-fresh-id"}),
        ("--retry-all-errors", "", {"repeats-after-a-cut", "survives-a-restart"}),
    ],
    ids=["completes after lost", "has one id", "gives up"],
)
async def test_a_worker_fails_where_it_is_broken_and_nowhere_else(
    tmp_path: Path, good: str, bad: str, broken: set[str]
) -> None:
    example("worker.sh")
    text = (EXAMPLES / "worker.sh").read_text()
    assert text.count(good) == 1
    (tmp_path / "worker.sh").write_text(text.replace(good, bad))
    report = await report_on(f"bash {shlex.quote(str(tmp_path / 'worker.sh'))}", "--timeout", "9s")
    assert set(failed(report)) == broken


async def test_what_a_worker_printed_last_stands_beside_what_it_did_not_do() -> None:
    report = await report_on("sh -c 'echo no such luck; exit 3'", "--only", "completes")
    (check,) = report["checks"]
    assert not check["ok"]
    assert "exited with 3" in check["seen"]
    assert check["last_words"] == ["no such luck"]


async def test_a_check_of_all_requests_looks_at_every_scenario(tmp_path: Path) -> None:
    await report_on(f"sh -c 'echo started >>{tmp_path}/starts'", "--only", "shows-its-api-token")
    assert len((tmp_path / "starts").read_text().splitlines()) == len(SCENARIOS)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--worker-cmd", "true", "--only", "completes", "--only", "nonsense"], "completes"),
        (["--worker-cmd", "no-such-program", "--only", "completes"], "no-such-program"),
        (["--worker-cmd", "'"], "No closing quotation"),
        (["--worker-cmd", ""], "names no command"),
        (["--worker-cmd", "true", "--timeout", "soon"], "soon"),
    ],
)
def test_a_wrong_flag_is_refused_with_words_that_help(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["conformance", *flags])
    assert ended.value.code == EXIT_USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["worker.sh", "worker.mjs"])
async def test_an_example_worker_reads_text_whatever_its_escapes(name: str) -> None:
    text = 'naïve "☃" \\ 𝄞 \t\n \x01 /'
    escaped = msgspec.Raw(rb'"na\u00efve \"\u2603\" \\ \uD834\udd1e \t\n \u0001 \/"')
    async with trial(shlex.split(example(name)), Terms()) as under_way:
        for sent in (text, escaped):
            args = {"nested": {"text": "not this"}, "text": sent}
            call = await under_way.completion_of(under_way.script.offer("demo.sha256", args))
            assert msgspec.json.decode(call.body) == {"result": {"sha256": hashlib.sha256(text.encode()).hexdigest()}}


@pytest.mark.parametrize("name", ["worker.sh", "worker.mjs"])
async def test_an_example_worker_fails_a_job_whose_result_is_refused(name: str) -> None:
    async with trial(shlex.split(example(name)), Terms()) as under_way:
        offer = under_way.echo()
        offer.refuse(Verb.COMPLETE, Refusal(status=413))
        call = await under_way.ending_of(offer, count=2)
        assert (call.verb, call.fault) == (Verb.FAIL, None)
        assert msgspec.json.decode(call.body)["error"]["type"] == "ResultRefused"


@pytest.mark.parametrize("name", ["worker.sh", "worker.mjs"])
async def test_an_example_worker_that_is_answered_at_once_and_without_a_lease_does_not_spin(name: str) -> None:
    async with trial(shlex.split(example(name)), Terms()) as under_way:
        script = under_way.script
        script.empty_claims, script.hold_seconds = True, 0
        await under_way.until(lambda: len(script.calls_of(Verb.CLAIM)) >= 4, "four requests for leases")
        times = [call.at for call in script.calls_of(Verb.CLAIM)]
        assert times[3] - times[0] > 0.5


@pytest.mark.parametrize("name", ["worker.sh", "worker.mjs"])
async def test_an_example_worker_hears_in_its_claim_that_it_is_to_drain(name: str) -> None:
    async with trial(shlex.split(example(name)), Terms()) as under_way:
        script = under_way.script
        await under_way.until(lambda: script.calls_of(Verb.CLAIM), "a request for leases")
        script.directive = "drain"
        script.change()
        assert (await under_way.exit_after())[0] == 0
        assert (len(script.calls_of(Verb.CLAIM)), script.calls_of(Verb.HEARTBEAT)) == (1, [])


@pytest.mark.parametrize("name", ["worker.sh", "worker.mjs"])
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 200


def test_the_shell_example_passes_shellcheck() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    assert anyio.run(anyio.run_process, [str(checker), str(EXAMPLES / "worker.sh")]).stdout == b""


@pytest.mark.parametrize(
    ("verb", "body"),
    [
        (Verb.CLAIM, {"worker": WORKER_ID, "queues": ["a"], "tasks": ["b"], "max": 9, "lease": "1d", "wait": 30}),
        (Verb.HEARTBEAT, {"worker": WORKER_ID, "leases": []}),
        (Verb.COMPLETE, {"result": None}),
        (Verb.FAIL, {"error": {"type": "E", "message": "", "trace": "…"}, "outcome": "undecodable", "retry_in": "5m"}),
        (Verb.SNOOZE, {"delay": "250ms"}),
        (Verb.PROGRESS, {"current": 1, "total": 2.5, "message": "…", "checkpoint": [1]}),
        (Verb.LOGS, {"lines": [{"n": 1, "level": "info", "message": "…", "fields": {"a": 1}}]}),
    ],
)
def test_a_body_that_follows_the_protocol_is_taken(verb: Verb, body: dict[str, Any]) -> None:
    assert not isinstance(read_form(verb, msgspec.json.encode(body), f"{JSON}; charset=utf-8"), str)


@pytest.mark.parametrize("verb", [Verb.COMPLETE, Verb.RELEASE, Verb.PROGRESS])
def test_where_nothing_needs_saying_no_body_is_needed(verb: Verb) -> None:
    assert not isinstance(read_form(verb, b"", ""), str)


@pytest.mark.parametrize(
    ("verb", "body", "media_type", "said"),
    [
        (Verb.CLAIM, b'{"worker": "me", "queues": ["default"]}', JSON, "/worker"),
        (Verb.CLAIM, b"{}", JSON, "/queues"),
        (Verb.HEARTBEAT, b"", JSON, "empty"),
        (Verb.COMPLETE, b'{"results": 1}', JSON, "/results"),
        (Verb.COMPLETE, b"{}", "application/x-www-form-urlencoded", "content-type"),
        (Verb.COMPLETE, b"{}", "", "content-type"),
        (Verb.COMPLETE, b'{"result": NaN}', JSON, "JSON"),
        (Verb.FAIL, b'{"error": "it failed"}', JSON, "/error"),
        (Verb.RELEASE, b'{"reason": "shutdown"}', JSON, "/reason"),
    ],
)
def test_what_is_wrong_with_a_body_is_said_in_words(verb: Verb, body: bytes, media_type: str, said: str) -> None:
    fault = read_form(verb, body, media_type)
    assert isinstance(fault, str)
    assert said in fault
