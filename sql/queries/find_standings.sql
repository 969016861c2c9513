-- For each queue of a worker, its rank among the live workers that hear the same rings: how many precede it by id, how
-- many there are, and how many of them had room when they last said so. The worker itself counts; one that drains does
-- not.
--
-- Those count that hear the same rings and can run the same jobs: of the same version, since rings are understood by
-- workers of one release, and those over HTTP, whose version is `http`, hear none; and with the same tasks.
-- $1 worker id, $2 seconds since it was last seen after which a worker counts as gone.
-- Why this shape: every worker asks with each beat, so what one answer costs counts by the number of workers again.
-- Workers of one deployment have the same queues and are counted together first; what is left are few sets of queues. 1,000
-- workers with 50 queues, on a busy machine: 2 to 5 ms, or 12 to 23 if no two of them have the same set. Looking for each
-- queue in each worker's took 35 to 90.
-- Plan: one primary key probe, one scan of the workers, for which nothing but its own beat waits, and one join of the
-- sets' queues with the worker's own.
with me as materialized (
  select w.id, w.version, w.tasks, w.queues from clarion.workers as w where w.id = $1::uuid
),
alike as materialized (
  select
    w.queues, count(*) filter (where w.id < me.id) as rank, count(*) as workers,
    count(*) filter (where w.running < w.concurrency) as idle
  from me
  join clarion.workers as w
    on w.version = me.version
    and w.tasks = me.tasks
    and (w.id = me.id or (w.state = 'running' and w.seen_at > now() - make_interval(secs => $2::float8)))
  group by w.queues
),
mine as (
  select distinct m.queue from me cross join lateral unnest(me.queues) as m (queue)
)
select m.queue, sum(a.rank)::integer as rank, sum(a.workers)::integer as workers, sum(a.idle)::integer as idle
from alike as a
cross join lateral (select distinct s.queue from unnest(a.queues) as s (queue)) as u
join mine as m on m.queue = u.queue
group by m.queue
