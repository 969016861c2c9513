-- Says that workers are alive: adds their rows, or renews them. Answers what each is told to do. A heartbeat over HTTP names
-- no queues: it leaves what a claim has said of the worker.
--
-- $1 worker ids, each once, $2 names, $3 versions, $4 queues and $5 tasks, those of each as a JSON array, $6 concurrency,
-- $7 jobs running, $8 states.
-- A row that another session has locked at this moment is skipped instead of waited for, as the next call renews it: one
-- locked row must not hold up all others that are in the set. Rows are added in the order of their ids, so that two sets
-- that add some of the same wait for each other and never deadlock.
with input as materialized (
  select
    i.id, i.name, i.version, array(select json_array_elements_text(i.queues::json)) as queues,
    array(select json_array_elements_text(i.tasks::json)) as tasks, i.concurrency, i.running, i.state
  from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::integer[], $7::integer[], $8::text[])
    as i (id, name, version, queues, tasks, concurrency, running, state)
),
known as materialized (
  select w.id, w.directive
  from input as i
  join clarion.workers as w on w.id = any(array[i.id])
),
free as materialized (
  select w.id
  from input as i
  join clarion.workers as w on w.id = any(array[i.id])
  for update of w skip locked
),
renewed as (
  update clarion.workers as w
  set
    name = case when i.queues = '{}' then w.name else i.name end,
    queues = case when i.queues = '{}' then w.queues else i.queues end,
    tasks = case when i.queues = '{}' then w.tasks else i.tasks end,
    concurrency = case when i.queues = '{}' then w.concurrency else i.concurrency end,
    running = i.running, state = i.state, seen_at = now()
  from input as i
  where w.id = any(array[i.id]) and i.id in (select f.id from free as f)
  returning w.id, w.directive
),
added as (
  insert into clarion.workers (id, name, version, queues, tasks, concurrency, running, state)
  select i.id, i.name, i.version, i.queues, i.tasks, i.concurrency, i.running, i.state
  from input as i
  where i.id not in (select k.id from known as k)
  order by i.id
  on conflict (id) do nothing
)
select i.id, coalesce(r.directive, k.directive, 'ok') as directive
from input as i
left join known as k on k.id = i.id
left join renewed as r on r.id = i.id
