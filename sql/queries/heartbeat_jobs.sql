-- Extends leases, counted from now. Answers one row per lease that is still held; a lease without a row is lost.
--
-- Takes no edge: running stays running.
-- $1 job ids, $2 lease tokens, $3 lease in seconds.
-- A row that another session has locked at this moment is skipped (`extended` false) instead of waited for: one
-- locked row must not cost its neighbours their leases. It is still held, and the next beat extends it.
-- Plan: one primary key probe a lease; the update is HOT, since no index holds the expiry.
with held as materialized (
  select j.id, j.lease_token
  from unnest($1::uuid[], $2::uuid[]) as h (id, token)
  join clarion.jobs as j on j.id = h.id and j.lease_token = h.token
),
extended as (
  update clarion.jobs as j
  set lease_expires_at = clarion.lease_end($3::float8, j.started_at, j.timeout_seconds)
  where j.ctid = any(array(
    select l.ctid
    from held as h
    join clarion.jobs as l on l.id = h.id and l.lease_token = h.lease_token
    for update of l skip locked
  ))
  returning j.id
)
select h.id, e.id is not null as extended
from held as h
left join extended as e on e.id = h.id
