-- Takes workers off the list that have not been seen for a while.
--
-- $1 seconds since they were seen, $2 the most rows.
delete from clarion.workers
where id in (
  select w.id
  from clarion.workers as w
  where w.seen_at < now() - make_interval(secs => $1::float8)
  limit $2::integer
  for update skip locked
)
returning id
