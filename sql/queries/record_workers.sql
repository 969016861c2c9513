-- Says that workers are alive: adds their rows, or renews them. Answers what each is told to do. A heartbeat over HTTP names
-- no queues: it leaves those that a claim has named.
--
-- $1 worker ids, each once, $2 names, $3 versions, $4 queues and $5 tasks, those of each as a JSON array, $6 concurrency,
-- $7 jobs running, $8 states.
-- Rows are written in the order of their ids, so that two sets that share some wait for each other and never deadlock.
insert into clarion.workers as w (id, name, version, queues, tasks, concurrency, running, state)
select
  i.id, i.name, i.version, array(select json_array_elements_text(i.queues::json)),
  array(select json_array_elements_text(i.tasks::json)), i.concurrency, i.running, i.state
from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::integer[], $7::integer[], $8::text[])
  as i (id, name, version, queues, tasks, concurrency, running, state)
order by i.id
on conflict (id) do update
set
  name = case when excluded.queues = '{}' then w.name else excluded.name end,
  queues = case when excluded.queues = '{}' then w.queues else excluded.queues end,
  tasks = case when excluded.queues = '{}' then w.tasks else excluded.tasks end,
  running = excluded.running, state = excluded.state, seen_at = now()
returning w.id, w.directive
