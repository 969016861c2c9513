-- Deletes idempotency keys whose time is over.
--
-- $1 the most rows.
-- Plan: the old end of idempotency_keys_expire, then a TID scan.
delete from clarion.idempotency_keys
where ctid = any(array(
  select k.ctid
  from clarion.idempotency_keys as k
  where k.expires_at < now()
  order by k.expires_at
  limit $1::integer
  for update skip locked
))
returning key
