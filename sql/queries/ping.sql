-- A round trip, to know that a connection is alive.
select 1 as alive
