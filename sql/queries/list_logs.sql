-- The log lines of a job, in the order in which they were stored.
--
-- $1 job id, $2 only those after this line (null: from the first), $3 the most rows.
-- Plan: the job's range of the primary key, bounded by the lines that a job may have, then a sort.
select l.id, l.at, l.generation, l.attempt, l.n, l.level, l.message, l.fields
from clarion.job_logs as l
where l.job_id = $1::uuid and l.id > coalesce($2::bigint, 0)
order by l.id
limit $3::integer
