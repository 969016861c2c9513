-- Empties every table of Clarion's but the list of migrations, between two tests that share a database.
do $$
declare
  tables text := (
    select string_agg(c.oid::regclass::text, ', ')
    from pg_catalog.pg_class as c
    where
      c.relnamespace = 'clarion'::regnamespace
      and c.relkind in ('r', 'p')
      and not c.relispartition
      and c.relname <> 'schema_migrations'
  );
begin
  execute 'truncate ' || tables || ' restart identity';
end
$$
