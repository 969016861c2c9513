-- Wakes whoever listens. One statement may carry several payloads, each under 8,000 bytes.
--
-- $1 channel, $2 payloads.
-- The commit does not wait for the disk, for this transaction alone: there is nothing in it but the notification, which a crash
-- would forget in any case. That is a third of the way from an enqueue to its claim.
select set_config('synchronous_commit', 'off', true), pg_notify($1::text, p)::text from unnest($2::text[]) as p
