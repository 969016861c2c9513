-- Whether this database has ever been migrated.
select to_regclass('clarion.schema_migrations') is not null as present
