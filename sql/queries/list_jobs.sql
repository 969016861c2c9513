-- Jobs by id, newest first, without payloads: a page is bounded whatever the payloads weigh.
--
-- $1 state, $2 queue, $3 task, $4 created at or after, $5 created before, $6 ids below this one (the cursor);
-- null means any. $7 the most rows.
-- Plan: the primary keys of jobs and of each history partition, backwards, merged; stops at the limit. Ids start with
-- their time, so $4 ends the scan too.
select
  u.id, u.queue, u.task, u.state::text as state, u.priority, u.attempt, u.max_attempts, u.errors, u.crashes, u.snoozes,
  u.generation, u.created_at, u.run_at, u.started_at, u.finished_at, u.timeout_seconds, u.start_by, u.finish_by,
  u.total_timeout_seconds, u.cancel_requested_at, u.worker_id, u.dead_reason::text as dead_reason, u.error_type
from (
  (
    select
      j.id, j.queue, j.task, j.state, j.priority, j.attempt, j.max_attempts, j.errors, j.crashes, j.snoozes, j.generation,
      j.created_at, j.run_at, j.started_at, j.died_at as finished_at, j.timeout_seconds, j.start_by, j.finish_by,
      j.total_timeout_seconds, j.cancel_requested_at, j.worker_id, j.dead_reason, j.error_type
    from clarion.jobs as j
    where
      ($1::text is null or j.state = $1::text::clarion.job_state)
      and ($2::text is null or j.queue = $2::text)
      and ($3::text is null or j.task = $3::text)
      and j.id >= coalesce(clarion.id_floor($4::timestamptz), '00000000-0000-0000-0000-000000000000')
      and j.created_at >= coalesce($4::timestamptz, '-infinity')
      and j.created_at < coalesce($5::timestamptz, 'infinity')
      and j.id < coalesce($6::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    order by j.id desc
    limit $7::integer
  )
  union all
  (
    select
      h.id, h.queue, h.task, h.state, h.priority, h.attempt, h.max_attempts, h.errors, h.crashes, h.snoozes, h.generation,
      h.created_at, h.run_at, h.started_at, h.finished_at, h.timeout_seconds, h.start_by, h.finish_by,
      h.total_timeout_seconds, null, h.worker_id, null, h.error_type
    from clarion.job_history as h
    where
      ($1::text is null or h.state = $1::text::clarion.job_state)
      and ($2::text is null or h.queue = $2::text)
      and ($3::text is null or h.task = $3::text)
      and h.id >= coalesce(clarion.id_floor($4::timestamptz), '00000000-0000-0000-0000-000000000000')
      and h.created_at >= coalesce($4::timestamptz, '-infinity')
      and h.created_at < coalesce($5::timestamptz, 'infinity')
      and h.id < coalesce($6::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    order by h.id desc
    limit $7::integer
  )
) as u
order by u.id desc
limit $7::integer
