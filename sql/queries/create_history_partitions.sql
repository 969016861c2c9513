-- Makes the history partitions of today and of the coming days, and of days whose rows went astray. Answers how many
-- were missing.
--
-- $1 days ahead. Two callers at once make each partition once; the second makes nothing. Strays of days gone by would
-- stay for ever otherwise, since retention drops whole partitions.
select count(*) filter (where clarion.create_history_partition(d.day))::integer as created
from (
  select (now() at time zone 'UTC')::date + ahead as day from generate_series(0, $1::integer) as ahead
  union
  select (h.finished_at at time zone 'UTC')::date from clarion.job_history_default as h
) as d
