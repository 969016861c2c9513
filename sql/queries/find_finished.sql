-- Of many jobs, those that will not run again by themselves: finished, dead, or gone. Serves all `?wait=` requests at once.
--
-- $1 job ids.
-- Plan: one primary key probe of jobs an id; the history is not touched.
select i.id
from unnest($1::uuid[]) as i (id)
where not exists (select from clarion.jobs as j where j.id = i.id and j.state <> 'dead')
