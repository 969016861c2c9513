-- Takes a worker that stops by itself off the list.
--
-- $1 worker id.
delete from clarion.workers where id = $1::uuid
