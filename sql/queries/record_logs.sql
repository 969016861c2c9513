-- Keeps log lines of running attempts, up to a limit per job. Answers one row per input, in input order.
--
-- Takes no edge: running stays running.
-- $1 job ids, $2 lease tokens, $3 numbers of the lines within their attempt, $4 levels, $5 messages, $6 fields as JSON text
-- (null: none), $7 the most lines of a job.
-- `kept` is true for a line that is stored, now or by an earlier call, and false for one beyond the limit, which is only
-- counted; null means the lease is lost.
-- Plan: one primary key probe a job to lock it, one to count its lines, and one a line in job_logs.
with input as materialized (
  select i.*
  from unnest($1::uuid[], $2::uuid[], $3::integer[], $4::text[], $5::text[], $6::text[])
    with ordinality as i (id, token, n, level, message, fields, place)
),
held as materialized (
  select j.id, j.lease_token as token, j.attempt, j.generation, j.log_lines
  from (select distinct d.id, d.token from input as d order by d.id, d.token) as i
  join clarion.jobs as j on j.id = any(array[i.id]) and j.lease_token = i.token
  for update of j
),
fresh as materialized (
  select
    i.*, h.attempt, h.generation, h.log_lines + row_number() over (partition by i.id order by i.place) as line
  from (select distinct on (f.id, f.token, f.n) f.* from input as f order by f.id, f.token, f.n, f.place) as i
  join held as h on h.id = i.id and h.token = i.token
  where not clarion.has_line(h.id, h.token, i.n)
),
kept as (
  insert into clarion.job_logs (job_id, lease_token, n, generation, attempt, level, message, fields)
  select f.id, f.token, f.n, f.generation, f.attempt, f.level, f.message, f.fields::json
  from fresh as f
  where f.line <= $7::integer
  order by f.place
  returning job_id, lease_token, n
),
counted as (
  update clarion.jobs as j
  set log_lines = least(j.log_lines::bigint + c.lines, 2147483647)::integer
  from (select f.id, count(*)::integer as lines from fresh as f group by f.id) as c
  where j.id = any(array[c.id])
)
select
  case
    when k.n is not null then true
    when clarion.has_line(i.id, i.token, i.n) then true
    when h.id is not null then false
  end as kept
from input as i
left join held as h on h.id = i.id and h.token = i.token
left join kept as k on k.job_id = i.id and k.lease_token = i.token and k.n = i.n
order by i.place
