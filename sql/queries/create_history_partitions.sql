-- Makes the history partitions of today and of the coming days, and of days whose rows went astray. Answers how many
-- were missing.
--
-- $1 days ahead. Two callers at once make each partition once; the second makes nothing.
select clarion.create_history_partitions($1::integer) as created
