-- Bounds the wait for each lock, for the rest of this transaction.
--
-- $1 how long, with a unit: 5s.
select set_config('lock_timeout', $1::text, true)
