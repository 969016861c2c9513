-- Changes a job that waits. Answers its new state, queue and sort_key; no row when it does not wait, or is not the version
-- meant.
--
-- Takes: scheduled → ready, ready → scheduled, scheduled → scheduled, ready → ready.
-- $1 job id, $2 the version that is meant (null: any), $3 who asks, $4 the names of the columns to change; those it does not
-- name keep their values, whatever stands in: $5 queue, $6 priority, $7 run_at, $8 max_attempts, $9 timeout in seconds,
-- $10 backoff in seconds, $11 its cap in seconds, $12 total timeout in seconds, $13 start_by, $14 args as JSON text,
-- $15 delay in seconds, which stands for a run_at.
-- The place in line is what an enqueue with these values would get. A run_at in the past counts as now.
-- Plan: one primary key probe.
with meant as materialized (
  select
    j.id, q.priority_credit_seconds,
    case
      when 'delay_seconds' = any($4::text[]) then now() + make_interval(secs => $15::float8)
      when 'run_at' = any($4::text[]) then greatest(now(), $7::timestamptz)
      else j.run_at
    end as due
  from clarion.jobs as j
  left join clarion.queues as q on q.name = case when 'queue' = any($4::text[]) then $5::text else j.queue end
  where
    j.id = $1::uuid
    and j.state in ('scheduled', 'ready')
    and ($2::text is null or j.xmin::text = $2::text)
  for update of j
),
changed as (
  update clarion.jobs as j
  set
    queue = case when 'queue' = any($4::text[]) then $5::text else j.queue end,
    priority = case when 'priority' = any($4::text[]) then $6::smallint else j.priority end,
    run_at = m.due,
    state = case when m.due > now() then 'scheduled' else 'ready' end::clarion.job_state,
    sort_key = case
      when array['queue', 'priority', 'run_at', 'delay_seconds'] && $4::text[]
      then m.due - case when 'priority' = any($4::text[]) then $6::smallint else j.priority end
        * make_interval(secs => coalesce(m.priority_credit_seconds, 60))
      else j.sort_key
    end,
    max_attempts = case when 'max_attempts' = any($4::text[]) then $8::smallint else j.max_attempts end,
    timeout_seconds = case when 'timeout_seconds' = any($4::text[]) then $9::real else j.timeout_seconds end,
    backoff_seconds = case when 'backoff_seconds' = any($4::text[]) then $10::real else j.backoff_seconds end,
    backoff_cap_seconds = case when 'backoff_cap_seconds' = any($4::text[]) then $11::real else j.backoff_cap_seconds end,
    total_timeout_seconds = case
      when 'total_timeout_seconds' = any($4::text[]) then $12::real else j.total_timeout_seconds
    end,
    finish_by = case
      when 'total_timeout_seconds' = any($4::text[]) then m.due + make_interval(secs => $12::real) else j.finish_by
    end,
    start_by = case when 'start_by' = any($4::text[]) then $13::timestamptz else j.start_by end,
    args = case when 'args' = any($4::text[]) then $14::json else j.args end
  from meant as m
  where j.id = any(array[m.id])
  returning j.id, j.state, j.queue, j.sort_key, j.generation
),
noted as (
  insert into clarion.job_events (job_id, event, actor, state, generation, detail)
  select c.id, 'changed', $3::text, c.state, c.generation, array_to_string($4::text[], ', ')
  from changed as c
)
select c.state::text as state, c.queue, c.sort_key from changed as c
