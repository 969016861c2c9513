-- Makes jobs dead that wait past their deadlines: never started by start_by, or not finished by the end of their total
-- timeout. Answers one row per job.
--
-- Takes: scheduled → dead, ready → dead.
-- $1 the most rows to take.
-- One that runs past its total timeout is its worker's to end, and then the reaper's.
-- Plan: the passed head of jobs_deadline; jobs without deadlines are not in it. For now() see promote_jobs.
with late as materialized (
  select
    j.id, j.generation,
    case
      when j.finish_by <= now() then 'total_timeout' else 'expired'
    end::clarion.dead_reason as reason
  from clarion.jobs as j
  where
    j.state in ('scheduled', 'ready')
    and (j.start_by is not null or j.finish_by is not null)
    and clarion.too_late_at(j.started_at, j.start_by, j.finish_by) <= now()
  order by clarion.too_late_at(j.started_at, j.start_by, j.finish_by)
  limit $1::integer
  for update skip locked
),
ended as (
  update clarion.jobs as j
  set state = 'dead', dead_reason = l.reason, died_at = clock_timestamp()
  from late as l
  where j.id = any(array[l.id])
  returning j.id, j.queue, j.task, l.reason, l.generation
),
noted as (
  insert into clarion.job_events (job_id, event, actor, state, generation, detail)
  select e.id, 'expired', 'scheduler', 'dead', e.generation, e.reason::text
  from ended as e
)
select e.id, e.queue, e.task, e.reason::text as reason from ended as e
