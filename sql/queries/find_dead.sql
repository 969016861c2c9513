-- Dead jobs, those that died first at the head, without payloads.
--
-- $1 queue, $2 task, $3 error type, $4 reason, $5 died at or after, $6 died before, $7 and $8 after this one (when it died, and
-- its id: the cursor); null means any. $9 the most rows.
-- Plan: a range of jobs_dead_since, from its start or the cursor, that stops at the limit.
select
  j.id, j.queue, j.task, j.state::text as state, j.priority, j.attempt, j.max_attempts, j.errors, j.crashes, j.snoozes,
  j.generation, j.created_at, j.run_at, j.started_at, j.died_at as finished_at, j.timeout_seconds, j.start_by, j.finish_by,
  j.total_timeout_seconds, j.cancel_requested_at, j.worker_id, j.dead_reason::text as dead_reason, j.error_type
from clarion.jobs as j
where
  j.state = 'dead'
  and ($1::text is null or j.queue = $1::text)
  and ($2::text is null or j.task = $2::text)
  and ($3::text is null or j.error_type = $3::text)
  and ($4::text is null or j.dead_reason = $4::text::clarion.dead_reason)
  and j.died_at >= coalesce($5::timestamptz, '-infinity')
  and j.died_at < coalesce($6::timestamptz, 'infinity')
  and (j.died_at, j.id) > (coalesce($7::timestamptz, '-infinity'), coalesce($8::uuid, '00000000-0000-0000-0000-000000000000'))
order by j.died_at, j.id
limit $9::integer
