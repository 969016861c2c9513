-- What start-up and /readyz check of the database: is it safe to keep promises on?
--
-- One row: fsync, in recovery, server version number, latest migration (null: none), tables that are not logged, and
-- tables whose primary key is missing or invalid.
select
  current_setting('fsync')::boolean as fsync,
  pg_is_in_recovery() as read_only,
  current_setting('server_version_num')::integer as server_version,
  current_setting('synchronous_commit') <> 'off' as synchronous_commit,
  (select max(m.version) from clarion.schema_migrations as m) as schema_version,
  array(
    select c.relname::text
    from pg_class as c
    where c.relnamespace = 'clarion'::regnamespace and c.relkind in ('r', 'p') and c.relpersistence <> 'p'
    order by c.relname
  ) as unlogged_tables,
  array(
    select t.name
    from unnest(array['jobs', 'job_history', 'attempts', 'job_logs', 'idempotency_keys']) as t (name)
    where not exists (
      select
      from pg_index as i
      where i.indrelid = to_regclass('clarion.' || t.name) and i.indisprimary and i.indisvalid
    )
  ) as missing_unique_indexes
