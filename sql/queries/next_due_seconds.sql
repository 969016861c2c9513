-- Seconds until the next scheduled job is due: negative when one is late, null when none is scheduled.
--
-- Plan: the first entry of jobs_scheduled.
select extract(epoch from s.run_at - clock_timestamp())::float8 as seconds
from clarion.jobs as s
where s.state = 'scheduled'
order by s.run_at
limit 1
