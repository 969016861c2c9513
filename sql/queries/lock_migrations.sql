-- Lets one process at a time migrate; the lock goes with the session.
select pg_advisory_lock(hashtext('clarion.migrations'))
