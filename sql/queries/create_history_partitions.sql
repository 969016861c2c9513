-- Makes the history partitions of today and of the coming days. Answers how many were missing.
--
-- $1 days ahead. Two callers at once make each partition once; the second makes nothing.
select count(*) filter (where clarion.create_history_partition(d::date))::integer as created
from generate_series(
  (now() at time zone 'UTC')::date, (now() at time zone 'UTC')::date + $1::integer, interval '1 day'
) as d
