-- How the busy tables are stored and vacuumed, each setting with its reason. `jobs` had most of its own from the start (0001).

-- Large arguments live beside the table, and die as often as the rows do.
alter table clarion.jobs set (
  toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_threshold = 1000,
  toast.autovacuum_vacuum_cost_delay = 0
);

-- One row a worker, updated with every heartbeat: always HOT, since a page is left half empty and no index holds what
-- changes. A few dozen dead rows are not worth a vacuum each minute; pages are pruned as they are read.
alter table clarion.workers set (fillfactor = 50, autovacuum_vacuum_threshold = 500);

-- Ledgers that grow at one end and are pruned at the other. Pruning walks an index from its oldest entry, so what it has
-- deleted must go before it is a fifth of the table, which is the default.
alter table clarion.attempts set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
alter table clarion.job_events set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
alter table clarion.job_logs set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
alter table clarion.idempotency_keys set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- History is written once and dropped by the day: pages are full (fillfactor 100, the default), and the first vacuum of a
-- page freezes it, so that no vacuum against wraparound has to write it again weeks later.
create or replace function clarion.create_history_partition(day date) returns boolean
  language plpgsql set search_path = pg_catalog set lock_timeout = '200ms' as $$
declare
  name text := format('job_history_%s', to_char(day, 'YYYYMMDD'));
  low timestamptz := day::timestamp at time zone 'UTC';
  high timestamptz := (day + 1)::timestamp at time zone 'UTC';
begin
  if to_regclass('clarion.' || name) is not null or not pg_try_advisory_xact_lock(hashtext('clarion.partitions')) then
    return false;
  end if;
  -- A check like the partition's bound lets ATTACH skip its scan.
  execute format(
    'create table clarion.%I (like clarion.job_history including defaults including constraints,
       constraint bound check (finished_at >= %L and finished_at < %L))
     with (autovacuum_freeze_min_age = 0)', name, low, high);
  -- Strays: rows of this day that came while it had no partition. For the moment of their move the whole history is
  -- locked: who had already looked up the partitions, without this one, would find the row in none of them.
  if exists (select from clarion.job_history_default where finished_at >= low and finished_at < high) then
    lock table clarion.job_history in access exclusive mode;
    execute format(
      'with strays as (delete from clarion.job_history_default where finished_at >= %L and finished_at < %L returning *)
       insert into clarion.%I select * from strays', low, high, name);
  end if;
  execute format('alter table clarion.job_history attach partition clarion.%I for values from (%L) to (%L)', name, low, high);
  execute format('alter table clarion.%I drop constraint bound', name);
  return true;
end
$$;

do $$
declare
  partition regclass;
begin
  for partition in
    select i.inhrelid::regclass
    from pg_inherits as i
    where i.inhparent = 'clarion.job_history'::regclass and i.inhrelid <> 'clarion.job_history_default'::regclass
  loop
    execute format('alter table %s set (autovacuum_freeze_min_age = 0)', partition);
  end loop;
end
$$;
