#!/usr/bin/env node
// A Clarion worker for Node 18 and later, without dependencies: several jobs at once, over HTTP.
// Put your own tasks into `handlers`, then run `node worker.mjs` with these in its environment:
//
// CLARION_URL            where Clarion answers; default: http://127.0.0.1:8080
// CLARION_API_TOKEN      its bearer token, if it has one
// CLARION_QUEUES         queues to work on, comma-separated; default: default
// CLARION_LEASE          how long a claim holds a job without a heartbeat; default: 30s
// CLARION_CONCURRENCY    jobs at once; default: 10
// CLARION_DRAIN_SECONDS  time that running jobs get after SIGTERM before they are handed back; default: 20
// Limits: a handler that blocks the event loop blocks the heartbeats too; integers beyond 2^53 must come as text.

import { createHash, randomUUID } from "node:crypto";
import { once } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";

// A handler gets the job's arguments and a context; what it returns is the result, what it throws the failure.
// It heeds `ctx.signal`, which is aborted when the job is to end early: cancelled, timed out, lost, or at shutdown.
const handlers = {
  "demo.echo": async (args) => args,
  "demo.sleep": ({ seconds }, ctx) => sleep(seconds * 1000, { slept_seconds: seconds }, { signal: ctx.signal }),
  "demo.fail": ({ message }) => Promise.reject(new Error(message)),
  "demo.sha256": async ({ text }, ctx) => {
    await ctx.log("hashing", { attempt: ctx.attempt });
    const sha256 = createHash("sha256").update(text).digest("hex");
    await ctx.progress({ current: text.length, total: text.length });
    return { sha256 };
  },
};

const { CLARION_URL: url = "http://127.0.0.1:8080", CLARION_API_TOKEN: token } = process.env;
const { CLARION_QUEUES: queues = "default", CLARION_LEASE: lease = "30s" } = process.env;
const { CLARION_CONCURRENCY: concurrency = 10, CLARION_DRAIN_SECONDS: drainSeconds = 20 } = process.env;
const headers = { "content-type": "application/json", ...(token && { authorization: `Bearer ${token}` }) };

const IDLE_BEAT_MS = 10_000; // how soon an idle worker hears that it is to drain
const GRACE_MS = 3_000; // what a handler gets to heed its signal before its job ends without it
const PATIENCE_MS = 60_000; // how long an outcome is still repeated after its lease

const worker = randomUUID(); // fresh in each process: nobody else can hold what this one was given
const jobs = new Map(); // token → job, from its claim until the server knows its outcome
const now = () => performance.now(); // monotonic: setting the clock costs no lease
const say = (...words) => console.error(new Date().toISOString(), ...words);
let [beatAt, draining] = [now() + IDLE_BEAT_MS, false];
let poll; // aborts the claim that is under way

// Posts JSON and reads the whole answer. Throws where the same request should be sent again later: the server is away
// or busy, or the answer was cut off, which says nothing about whether it did what was asked.
async function post(path, body, signal = AbortSignal.timeout(10_000)) {
  const answer = await fetch(url + path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const [text, status, retryMs] = [await answer.text(), answer.status, answer.headers.get("retry-after") * 1000 || 0];
  if (status >= 500 || status === 408 || status === 429) throw Object.assign(new Error(`HTTP ${status}`), { retryMs });
  return { status, text, body: status === 200 ? JSON.parse(text) : {} };
}

const call = (job, verb, body) => post(`/v1/leases/${encodeURIComponent(job.token)}/${verb}`, body);

// After a post that threw: waits as long as the server asked for, and longer with each failure.
async function pause(error, what, failures, signal) {
  const waitMs = Math.max(error.retryMs ?? 0, Math.min(10_000, 250 * 2 ** failures) * (0.5 + Math.random()));
  say(`${what}: ${error.cause?.message ?? error.message}; again in ${waitMs.toFixed()} ms`);
  await sleep(waitMs, undefined, { signal });
}

// Ends a handler early and remembers why; a job that is lost stays lost, whatever else was to become of it.
function end(job, verdict) {
  if (!job.verdict || verdict === "lost") job.verdict = verdict;
  job.controller.abort(new Error(verdict));
}

// What the server says of a lease: it counts from before the request was sent, since the server's clock began later.
function judge(job, sent, { status, lease: seconds }) {
  if (status === "lost" || status === "cancel") end(job, status);
  else if (seconds != null) job.expiresAt = sent + seconds * 1000;
}

// One heartbeat for all leases, every third of the shortest; sooner after a failure or where a row was busy.
async function beat() {
  const sent = now();
  const held = [...jobs.values()];
  const everyMs = Math.min(IDLE_BEAT_MS, ...held.map((job) => (job.lease * 1000) / 3));
  let waitMs = everyMs / 4;
  beatAt = Infinity; // until this one is answered, or a new lease wants its own
  try {
    const body = { worker, lease, leases: held.map((job) => ({ token: job.token })) };
    const answer = await post("/v1/leases/heartbeat", body, AbortSignal.timeout(Math.ceil(everyMs)));
    if (answer.status !== 200) throw new Error(`HTTP ${answer.status} ${answer.text}`);
    answer.body.leases.forEach((said, i) => judge(held[i], sent, said));
    if (answer.body.directive === "drain") drain();
    if (answer.body.leases.every(({ status }) => status !== "unchanged")) waitMs = everyMs;
  } catch (error) {
    say("heartbeat:", error.cause?.message ?? error.message);
  }
  beatAt = Math.min(beatAt, sent + waitMs);
}

const contextOf = (job) => ({
  attempt: job.attempt,
  signal: job.controller.signal,
  progress: (state) => tell(job, "progress", state),
  log: (message, fields = {}) => tell(job, "logs", { lines: [{ n: ++job.lines, level: "info", message, fields }] }),
});

// What a handler tells on its way; where that fails, the job goes on without.
async function tell(job, verb, body) {
  const sent = now();
  const answer = await call(job, verb, body).catch((error) => say(job.id, `${verb}: ${error.message}`));
  if (answer) judge(job, sent, answer.status === 409 ? { status: "lost" } : answer.body);
}

async function run(job) {
  const { signal } = job.controller;
  const work = async () => handlers[job.task](job.args, contextOf(job));
  const ignored = once(signal, "abort").then(() => sleep(GRACE_MS)).then(() => Promise.reject(signal.reason));
  let outcome = ["release"];
  try {
    const result = await Promise.race([work(), ignored]);
    JSON.stringify(result); // what cannot be JSON is the handler's failure
    outcome = ["complete", { result }];
  } catch (thrown) {
    const error = { type: thrown?.name ?? "Error", message: String(thrown?.message ?? thrown), trace: thrown?.stack };
    if (!job.verdict || job.verdict === "timeout") outcome = ["fail", { error, outcome: job.verdict ?? "failed" }];
  }
  if (job.verdict === "lost") say(job.id, "lease lost: outcome dropped");
  else await report(job, ...outcome);
  jobs.delete(job.token);
}

// Says how a job ended, again and again until the server has answered: the token makes that harmless.
async function report(job, verb, body) {
  for (let failures = 0; now() < job.expiresAt + PATIENCE_MS; failures++) {
    try {
      const answer = await call(job, verb, body);
      say(job.id, `${verb}: ${answer.body.state ?? `HTTP ${answer.status} ${answer.text}`}`);
      // 409 and 404: the lease is lost. What else is no success is a result that the server will not take: a failure.
      if ([200, 404, 409].includes(answer.status) || verb !== "complete") return;
      return await report(job, "fail", { error: { type: "ResultRefused", message: answer.text } });
    } catch (error) {
      await pause(error, `${job.id} ${verb}`, failures);
    }
  }
  say(job.id, `${verb}: given up; another worker has it by now`);
}

// Waits for jobs, at most so many, and starts them.
async function claim(max) {
  const asked = now();
  poll = new AbortController();
  const timer = setTimeout(() => poll.abort(), 45_000); // a server that has vanished without a word
  const where = { queues: queues.split(","), tasks: Object.keys(handlers) };
  const body = { worker, name: "worker.mjs", ...where, max, lease, wait: "30s" };
  const answer = await post("/v1/leases", body, poll.signal).finally(() => clearTimeout(timer));
  if (answer.status >= 300) {
    say(`claim: HTTP ${answer.status} ${answer.text}`); // a wrong token or queue: repeating helps nobody
    process.exit(1);
  }
  if (answer.body.directive === "drain") drain();
  if (!answer.body.leases?.length && now() - asked < 1000) throw new Error("the server does not wait"); // never spin
  const since = asked + (answer.body.waited ?? 0) * 1000; // the leases began no earlier
  for (const given of answer.body.leases ?? []) {
    const job = { ...given, controller: new AbortController(), lines: 0, expiresAt: since + given.lease * 1000 };
    job.timeoutAt = now() + (given.timeout ?? Infinity) * 1000;
    beatAt = Math.min(beatAt, since + (given.lease * 1000) / 3);
    jobs.set(job.token, job);
    job.ended = run(job);
  }
}

function drain() {
  draining = true;
  poll?.abort();
}

function stop() {
  process.on("SIGTERM", () => process.exit(1)).on("SIGINT", () => process.exit(1));
  drain();
  setTimeout(() => jobs.forEach((job) => end(job, "drain")), drainSeconds * 1000);
}

process.once("SIGTERM", stop).once("SIGINT", stop);
setInterval(() => {
  jobs.forEach((job) => now() >= job.timeoutAt && end(job, "timeout"));
  jobs.forEach((job) => now() >= job.expiresAt && end(job, "lost")); // also when the server is silent
  if (now() >= beatAt) beat();
}, 50);

say("worker", worker, "on", url);
const ends = () => [...jobs.values()].map(({ ended }) => ended);
for (let failures = 0; !draining; ) {
  try {
    await claim(concurrency - jobs.size);
    failures = 0;
    if (jobs.size >= concurrency) await Promise.race(ends());
  } catch (error) {
    if (!draining) await pause(error, "claim", failures++, poll.signal).catch(() => {});
  }
}
await Promise.all(ends());
process.exit(0);
