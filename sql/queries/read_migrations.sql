-- The migrations that this database has seen, in order.
select m.version, m.name, m.checksum, m.applied_at from clarion.schema_migrations as m order by m.version
