-- Lets one process at a time migrate; the lock goes with the session. False: another process has it.
select pg_try_advisory_lock(hashtext('clarion.migrations')) as locked
