-- Takes the first job whose lease ran out out of the reaper's way: dead as `unprocessable`, nothing else of it touched.
-- For the row that reap_jobs cannot handle; the others must not wait for it. Answers its id.
--
-- Takes: running → dead.
-- $1 grace in seconds after a start of Postgres, as in reap_jobs; the rows come in the same order.
-- Plan: the head of jobs_running, then a TID scan.
update clarion.jobs as j
set
  state = 'dead', dead_reason = 'unprocessable', died_at = clock_timestamp(),
  lease_token = null, lease_expires_at = null, worker_id = null
where j.ctid = any(array(
  select r.ctid
  from clarion.jobs as r
  where
    r.state = 'running'
    and r.lease_expires_at < clock_timestamp()
    and (
      r.started_at > pg_postmaster_start_time()
      or pg_postmaster_start_time() + make_interval(secs => $1::float8) < clock_timestamp()
    )
  order by r.id
  limit 1
  for update skip locked
))
returning j.id
