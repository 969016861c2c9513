-- Daily partitions of the history, made ahead and dropped by retention.
--
-- CREATE TABLE … PARTITION OF would take ACCESS EXCLUSIVE on the parent and stop every finish for as long as the
-- slowest reader; a table made apart and then attached takes SHARE UPDATE EXCLUSIVE, which no finish waits for.
-- Each function gives up after 200 ms without its locks, so that nobody queues behind it; it is tried again.

create function clarion.create_history_partition(day date) returns boolean
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
       constraint bound check (finished_at >= %L and finished_at < %L))', name, low, high);
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

-- The days to come, and those whose rows went astray: these would stay for ever, since retention drops partitions.
create function clarion.create_history_partitions(days_ahead integer) returns integer
  language plpgsql set search_path = pg_catalog set lock_timeout = '200ms' as $$
begin
  if not pg_try_advisory_xact_lock(hashtext('clarion.partitions')) then
    return 0;
  end if;
  return (
    select count(*) filter (where clarion.create_history_partition(d.day))
    from (
      select (now() at time zone 'UTC')::date + ahead as day from generate_series(0, days_ahead) as ahead
      union
      select (h.finished_at at time zone 'UTC')::date from clarion.job_history_default as h
    ) as d
  );
end
$$;

create function clarion.drop_history_partitions(before date) returns setof text
  language plpgsql set search_path = pg_catalog set lock_timeout = '200ms' as $$
declare
  name text;
begin
  if not pg_try_advisory_xact_lock(hashtext('clarion.partitions')) then
    return;
  end if;
  for name in
    select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
    where i.inhparent = 'clarion.job_history'::regclass
      and c.relname ~ '^job_history_[0-9]{8}$' and right(c.relname, 8) < to_char(before, 'YYYYMMDD')
    order by c.relname
  loop
    execute format('drop table clarion.%I', name);
    return next name;
  end loop;
end
$$;

-- The first days, so that no job finishes before its partition is there.
select clarion.create_history_partitions(3);
