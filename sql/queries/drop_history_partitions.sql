-- Drops the partitions whose every row finished more than a number of days ago. Answers their names.
--
-- $1 days to keep. Needs ACCESS EXCLUSIVE on the history for a moment; the caller's lock timeout bounds the wait.
select p as name
from clarion.drop_history_partitions((now() at time zone 'UTC')::date - $1::integer) as p
