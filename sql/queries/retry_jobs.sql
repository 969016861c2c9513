-- Runs jobs again: dead and cancelled ones in a new generation of attempts, scheduled ones without their wait. One row
-- per input, in input order.
--
-- Takes: dead → ready, dead → scheduled, cancelled → ready, cancelled → scheduled, scheduled → ready,
-- scheduled → scheduled.
-- $1 job ids, each once, $2 seconds until each runs, $3 only dead ones, $4 who asks, $5 why (null: no reason given),
-- $6 only those of this generation (null: any).
-- `state` is what the job is now; null where it runs, has succeeded, is unknown, or is not meant. `queue` and `sort_key` say
-- where it waits, for the ring. That is due for a ready job too, although nothing is done to it, meant or not: it was
-- locked here, and a claim that skipped it meanwhile looks further on (`app/clarion/watermark.py`).
-- Jobs are locked whatever they are, unless they run: only what is locked can be trusted, and who waited here for another's
-- retry keeps the row locked until the end, found dead no more.
-- A new generation starts from nothing: attempts, errors, crashes and snoozes are counted anew, the total timeout begins
-- again, a start_by is over. The place in line is what an enqueue now would get. The checkpoint stays. Jobs are taken in
-- the order of their ids, so that two calls that share some never deadlock.
-- Plan: one primary key probe a job in jobs to lock it, one to write it, and one in each history partition, whatever the
-- statistics: a join with the history may read all of it.
with input as materialized (
  select i.* from unnest($1::uuid[], $2::float8[]) with ordinality as i (id, delay_seconds, n)
),
due as materialized (
  select i.*, now() + make_interval(secs => i.delay_seconds) as run_at,
    case when i.delay_seconds > 0 then 'scheduled' else 'ready' end::clarion.job_state as state
  from input as i
  order by i.id
),
locked as materialized (
  select
    d.*, j.state as was, j.queue, j.sort_key,
    (j.state = 'dead' or not $3::boolean) and ($6::smallint is null or j.generation = $6::smallint) as is_meant
  from due as d
  join clarion.jobs as j on j.id = any(array[d.id])
  where j.state <> 'running'
  for update of j
),
retried as (
  update clarion.jobs as j
  set
    state = l.state,
    run_at = l.run_at,
    sort_key = l.run_at - j.priority * make_interval(secs => coalesce(q.priority_credit_seconds, 60)),
    generation = least(j.generation + (l.was = 'dead')::integer, 32767),
    attempt = case when l.was = 'dead' then 0 else j.attempt end,
    errors = case when l.was = 'dead' then 0 else j.errors end,
    crashes = case when l.was = 'dead' then 0 else j.crashes end,
    snoozes = case when l.was = 'dead' then 0 else j.snoozes end,
    progress = case when l.was = 'dead' then null else j.progress end,
    log_lines = case when l.was = 'dead' then 0 else j.log_lines end,
    start_by = case when l.was = 'dead' then null else j.start_by end,
    finish_by = case
      when l.was = 'dead' then l.run_at + make_interval(secs => j.total_timeout_seconds) else j.finish_by
    end,
    dead_reason = null, died_at = null
  from locked as l
  left join clarion.queues as q on q.name = l.queue
  where j.id = any(array[l.id]) and l.is_meant and l.was <> 'ready'
  returning j.id, j.state, j.queue, j.sort_key, j.generation
),
taken_back as (
  delete from clarion.job_history as h
  where
    h.id = any($1::uuid[])
    and h.state = 'cancelled'
    and not $3::boolean
    and ($6::smallint is null or h.generation = $6::smallint)
  returning h.*, now() + make_interval(secs => ($2::float8[])[array_position($1::uuid[], h.id)]) as next_run_at
),
revived as (
  insert into clarion.jobs (
    id, created_at, run_at, sort_key, started_at, state, priority, max_attempts, timeout_seconds, backoff_seconds,
    backoff_cap_seconds, queue, task, args, finish_by, total_timeout_seconds, generation, log_lines, enqueued_by,
    error_type, checkpoint
  )
  select
    t.id, t.created_at, t.next_run_at,
    t.next_run_at - t.priority * make_interval(secs => coalesce(q.priority_credit_seconds, 60)),
    t.started_at, case when t.next_run_at > now() then 'scheduled' else 'ready' end::clarion.job_state, t.priority,
    t.max_attempts, t.timeout_seconds, t.backoff_seconds, t.backoff_cap_seconds, t.queue, t.task, t.args,
    t.next_run_at + make_interval(secs => t.total_timeout_seconds), t.total_timeout_seconds, least(t.generation + 1, 32767),
    0, t.enqueued_by, t.error_type, t.checkpoint
  from taken_back as t
  left join clarion.queues as q on q.name = t.queue
  returning id, state, queue, sort_key, generation
),
changed as materialized (
  select r.* from retried as r
  union all
  select v.* from revived as v
),
noted as (
  insert into clarion.job_events (job_id, event, actor, state, generation, detail)
  select c.id, 'retried', $4::text, c.state, c.generation, $5::text
  from changed as c
)
select
  coalesce(c.state, case when r.is_meant then r.was end)::text as state,
  coalesce(c.queue, r.queue) as queue, coalesce(c.sort_key, r.sort_key) as sort_key
from input as i
left join changed as c on c.id = i.id
left join locked as r on r.id = i.id and r.was = 'ready'
order by i.n
