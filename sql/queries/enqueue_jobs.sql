-- Adds jobs: ready when due now, scheduled when due later. Answers one row per input, in input order.
--
-- Takes: → ready, → scheduled.
-- $1 queue, $2 task, $3 args as JSON text, $4 priority, $5 run_at (null: see $6), $6 delay in seconds (null: none),
-- $7 max_attempts, $8 timeout in seconds, $9 backoff in seconds, $10 its cap in seconds; $7 to $10 may be null.
-- A run_at in the past counts as now, so that nobody jumps the line with a date.
-- Plan: one insert from a function scan; the few queues that have settings are hashed, or probed by their key.
with input as materialized (
  select clarion.new_id() as id, greatest(now(), i.run_at, now() + make_interval(secs => i.delay_seconds)) as due, i.*
  from unnest(
    $1::text[], $2::text[], $3::text[], $4::smallint[], $5::timestamptz[], $6::float8[],
    $7::smallint[], $8::real[], $9::real[], $10::real[]
  ) with ordinality as i (
    queue, task, args, priority, run_at, delay_seconds,
    max_attempts, timeout_seconds, backoff_seconds, backoff_cap_seconds, n
  )
),
added as (
  insert into clarion.jobs (
    id, queue, task, args, priority, state, run_at, sort_key,
    max_attempts, timeout_seconds, backoff_seconds, backoff_cap_seconds
  )
  select
    i.id, i.queue, i.task, i.args::json, i.priority,
    case when i.due > now() then 'scheduled' else 'ready' end::clarion.job_state,
    i.due, i.due - i.priority * make_interval(secs => coalesce(q.priority_credit_seconds, 60)),
    i.max_attempts, i.timeout_seconds, i.backoff_seconds, i.backoff_cap_seconds
  from input as i
  left join clarion.queues as q on q.name = i.queue
  order by i.n
  returning id, state, created_at, run_at
)
select a.id, a.state::text as state, a.created_at, a.run_at
from input as i
join added as a on a.id = i.id
order by i.n
