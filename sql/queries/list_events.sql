-- What happened to a job besides its attempts, in order.
--
-- $1 job id.
-- Plan: the job's range of job_events_of_job.
select e.at, e.event::text as event, e.actor, e.state::text as state, e.generation, e.detail
from clarion.job_events as e
where e.job_id = $1::uuid
order by e.id
