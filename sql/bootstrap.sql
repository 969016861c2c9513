-- What must stand before the first migration: the schema, and the list of migrations.
create schema if not exists clarion;
create table if not exists clarion.schema_migrations (
  version integer primary key,
  name text not null,
  checksum text not null,
  applied_at timestamptz not null default now()
);
