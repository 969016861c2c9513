-- Wakes whoever listens. One statement may carry several payloads, each under 8,000 bytes.
--
-- $1 channel, $2 payloads.
select pg_notify($1::text, p)::text from unnest($2::text[]) as p
