-- Makes due jobs ready. Answers how many in each queue and the earliest sort_key among them,
-- for the rings.
--
-- Takes: scheduled → ready.
-- $1 the most rows to take.
-- The place in line was fixed when the job was scheduled; promotion is late or early for nobody.
-- Plan: the due head of jobs_scheduled, then a TID scan. It is now() because clock_timestamp() is volatile and cannot
-- bound an index scan: each promotion walked all that is scheduled for later (200,000 jobs: 23 ms, now 0.1 ms).
with promoted as (
  update clarion.jobs as j
  set state = 'ready'
  where j.ctid = any(array(
    select s.ctid
    from clarion.jobs as s
    where s.state = 'scheduled' and s.run_at <= now()
    order by s.run_at
    limit $1::integer
    for update skip locked
  ))
  returning j.queue, j.sort_key
)
select p.queue, count(*)::integer as jobs, min(p.sort_key) as earliest
from promoted as p
group by p.queue
