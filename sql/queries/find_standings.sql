-- For each queue of a worker, its rank among the live workers that hear the same rings: how many precede it by id, how
-- many there are, and how many of them had room when they last said so. The worker itself counts; one that drains does
-- not.
--
-- Those count that hear the same rings and can run the same jobs: of the same version, since rings are understood by
-- workers of one release, and those over HTTP, whose version is `http`, hear none; and with the same tasks.
-- $1 worker id, $2 seconds since it was last seen after which a worker counts as gone.
-- Plan: one primary key probe, then a scan of the workers a queue, for which nothing but its own beat waits.
select q.queue, s.rank, s.workers, s.idle
from clarion.workers as me
cross join lateral unnest(me.queues) as q (queue)
cross join lateral (
  select
    (count(*) filter (where w.id < me.id))::integer as rank,
    count(*)::integer as workers,
    (count(*) filter (where w.running < w.concurrency))::integer as idle
  from clarion.workers as w
  where
    w.version = me.version
    and w.tasks = me.tasks
    and q.queue = any(w.queues)
    and (w.id = me.id or (w.state = 'running' and w.seen_at > now() - make_interval(secs => $2::float8)))
) as s
where me.id = $1::uuid
