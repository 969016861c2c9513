-- Says that a worker is alive: adds its row, or renews it. Answers what it is told to do. A heartbeat over HTTP names no
-- queues: it leaves those that a claim has named.
--
-- $1 worker id, $2 name, $3 version, $4 queues, $5 tasks, $6 concurrency, $7 jobs running, $8 state.
insert into clarion.workers as w (id, name, version, queues, tasks, concurrency, running, state)
values ($1::uuid, $2::text, $3::text, $4::text[], $5::text[], $6::integer, $7::integer, $8::text)
on conflict (id) do update
set
  name = case when excluded.queues = '{}' then w.name else excluded.name end,
  queues = case when excluded.queues = '{}' then w.queues else excluded.queues end,
  tasks = case when excluded.queues = '{}' then w.tasks else excluded.tasks end,
  running = excluded.running, state = excluded.state, seen_at = now()
returning w.directive
