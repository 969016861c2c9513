-- Tells a worker to claim no more, end what it runs, and exit; it hears of it with its next heartbeat. No row: unknown.
--
-- $1 worker id.
update clarion.workers as w set directive = 'drain' where w.id = $1::uuid
returning w.id
