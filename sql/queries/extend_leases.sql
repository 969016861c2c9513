-- Extends leases, counted from now, each by as much as its claim asked for. Answers one row per lease that is still held; a
-- lease without a row is lost.
--
-- Takes no edge: running stays running.
-- $1 job ids in ascending order, $2 lease tokens.
-- `lease_seconds` is what is left of a lease that its job's deadlines or its cancellation shorten; infinity for all others, of
-- which that need not be computed. A lease whose cancellation was requested is not extended any more.
--
-- What a worker's heartbeats are nearly always: it costs 1.1 times the barest update that could be sent, where
-- heartbeat_jobs costs 2.4 times that, since it probes each row three times to pass over those that are locked. This one
-- waits for them, up to the lock timeout, which is short on a worker's heartbeat connection; then it has done nothing, and
-- heartbeat_jobs does it. In the order of the ids, as all that end attempts take them, so that they never deadlock.
-- Plan: one primary key probe a lease; for `any(array[…])` see complete_jobs. The update is HOT: no index holds the expiry.
update clarion.jobs as j
set
  lease_expires_at = case
    when j.cancel_requested_at is not null then j.lease_expires_at
    when j.timeout_seconds is null and j.finish_by is null
    then clock_timestamp() + make_interval(secs => coalesce(j.lease_seconds, 30))
    else clarion.lease_end(coalesce(j.lease_seconds, 30), j.started_at, j.timeout_seconds, j.finish_by)
  end
from unnest($1::uuid[], $2::uuid[]) as h (id, token)
where j.id = any(array[h.id]) and j.lease_token = h.token
returning
  j.id, j.lease_token as token, true as extended, j.cancel_requested_at is not null as cancelled,
  case
    when j.timeout_seconds is null and j.finish_by is null and j.cancel_requested_at is null then 'infinity'
    else extract(epoch from j.lease_expires_at - clock_timestamp())::float8
  end as lease_seconds
