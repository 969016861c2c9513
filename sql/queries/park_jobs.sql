-- Takes a job that reap_jobs cannot handle out of its way: dead as `unprocessable`, nothing else of it touched.
--
-- Takes: running → dead.
-- $1 job id, $2 its lease token: a row that somebody else has dealt with meanwhile is left alone.
-- Plan: one primary key probe.
with parked as (
  update clarion.jobs as j
  set
    state = 'dead', dead_reason = 'unprocessable', died_at = clock_timestamp(),
    lease_token = null, lease_expires_at = null, worker_id = null, cancel_requested_at = null
  where j.id = $1::uuid and j.lease_token = $2::uuid
  returning j.id, j.generation
),
noted as (
  insert into clarion.job_events (job_id, event, actor, state, generation)
  select p.id, 'parked', 'reaper', 'dead', p.generation
  from parked as p
)
select p.id from parked as p
