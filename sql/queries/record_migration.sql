-- Notes that a migration was applied, inside its own transaction.
--
-- $1 version, $2 name, $3 SHA-256 of the file, hexadecimal.
insert into clarion.schema_migrations (version, name, checksum) values ($1::integer, $2::text, $3::text)
