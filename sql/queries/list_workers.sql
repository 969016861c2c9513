-- The workers that were seen lately, the youngest first.
--
-- $1 the most rows.
select
  w.id, w.name, w.version, w.queues, w.tasks, w.concurrency, w.running, w.state, w.directive, w.started_at, w.seen_at
from clarion.workers as w
order by w.started_at desc, w.id
limit $1::integer
