-- Adds jobs: ready when due now, scheduled when due later. Answers one row per input, in input order.
--
-- A moment is what costs a client most to decode, so those of a job that this call added are told only where they differ:
-- created_at is null, and is the `moment` in the first row; so is run_at, where it is that too; so is sort_key, where it
-- is run_at. A row with a created_at is the answer of a known key.
--
-- Takes: → ready, → scheduled.
-- $1 queue, $2 task, $3 args as JSON text, $4 priority, $5 run_at (null: see $6), $6 delay in seconds (null: none),
-- $7 max_attempts, $8 timeout in seconds, $9 backoff in seconds, $10 its cap in seconds; $7 to $10 may be null.
-- $11 start_by, $12 seconds from due to start_by, $13 seconds from due to finish_by, $14 who enqueues; null: none.
-- $15 idempotency key (null: none), $16 digests of the request's fields as JSON text, $17 seconds that a key is kept.
-- A run_at in the past counts as now, so that nobody jumps the line with a date.
--
-- Keys: the first to insert one wins, here and in any other process; who comes second waits for the first's commit and
-- then gets its answer, with `request` to compare. An old key counts as none. Keys are taken in their order, so that two
-- batches that share some wait for each other and never deadlock. Of one key twice in the input the first counts. A
-- volatile function looks the answer up, since it may be younger than this statement's snapshot, or this statement's own.
-- Where a key stands for another request, none of the set is added: the state of the jobs that this kept out is empty. A
-- key that another session is committing at this very moment is found too late for that, and costs its own job only.
-- Plan: one insert from a function scan; the few queues that have settings are hashed, or probed by their key; one probe a key
-- to see whether it is known. That asks for the key alone: with a condition on `expires_at` it may read all of that index.
with input as materialized (
  select clarion.new_id() as id, greatest(now(), i.run_at, now() + make_interval(secs => i.delay_seconds)) as due, i.*
  from unnest(
    $1::text[], $2::text[], $3::text[], $4::smallint[], $5::timestamptz[], $6::float8[],
    $7::smallint[], $8::real[], $9::real[], $10::real[], $11::timestamptz[], $12::float8[], $13::float8[], $14::text[],
    $15::text[], $16::text[]
  ) with ordinality as i (
    queue, task, args, priority, run_at, delay_seconds,
    max_attempts, timeout_seconds, backoff_seconds, backoff_cap_seconds, start_by, start_within_seconds,
    total_timeout_seconds, enqueued_by, key, request, n
  )
),
known as materialized (
  select k.expires_at > now() and k.request::text <> i.request as differs
  from input as i
  join clarion.idempotency_keys as k on k.key = any(array[i.key])
),
refused as materialized (
  select exists (select from known as w where w.differs) as is_refused
),
taken as (
  insert into clarion.idempotency_keys as k (key, job_id, state, created_at, run_at, request, expires_at)
  select
    i.key, i.id, case when i.due > now() then 'scheduled' else 'ready' end::clarion.job_state, now(), i.due,
    i.request::json, now() + make_interval(secs => $17::float8)
  from (select distinct on (f.key) f.* from input as f where f.key is not null order by f.key, f.n) as i
  where not (select r.is_refused from refused as r)
  order by i.key
  on conflict (key) do update
  set
    job_id = excluded.job_id, state = excluded.state, created_at = excluded.created_at, run_at = excluded.run_at,
    request = excluded.request, expires_at = excluded.expires_at
  where k.expires_at <= now()
  returning k.job_id
),
added as (
  insert into clarion.jobs (
    id, queue, task, args, priority, state, run_at, sort_key,
    max_attempts, timeout_seconds, backoff_seconds, backoff_cap_seconds,
    start_by, finish_by, total_timeout_seconds, enqueued_by
  )
  select
    i.id, i.queue, i.task, i.args::json, i.priority,
    case when i.due > now() then 'scheduled' else 'ready' end::clarion.job_state,
    i.due, i.due - i.priority * make_interval(secs => coalesce(q.priority_credit_seconds, 60)),
    i.max_attempts, i.timeout_seconds, i.backoff_seconds, i.backoff_cap_seconds,
    coalesce(i.start_by, i.due + make_interval(secs => i.start_within_seconds)),
    i.due + make_interval(secs => i.total_timeout_seconds), i.total_timeout_seconds, i.enqueued_by
  from input as i
  left join clarion.queues as q on q.name = i.queue
  where (i.key is null or i.id in (select t.job_id from taken as t)) and not (select r.is_refused from refused as r)
  order by i.n
  returning id, state, created_at, run_at, sort_key
)
select
  coalesce(a.id, o.job_id, case when r.is_refused then i.id end) as id, coalesce(a.state, o.state)::text as state,
  o.created_at, coalesce(nullif(a.run_at, now()), o.run_at) as run_at, o.request::text as request,
  nullif(a.sort_key, a.run_at) as sort_key, case when i.n = 1 then now() end as moment
from input as i
cross join refused as r
left join added as a on a.id = i.id
left join lateral clarion.answer_of(case when a.id is null then i.key end) as o on true
order by i.n
