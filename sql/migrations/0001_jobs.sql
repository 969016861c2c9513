-- The jobs themselves: live rows, history, and the attempts that ended badly.
--
-- A job's life is two tables. `jobs` holds what is still to be done (scheduled, ready, running) and the dead
-- that wait for somebody's decision; it stays small, so its indexes stay hot and its vacuum short. Finishing
-- *moves* the row into `job_history`, partitioned by day, so pruning a day is DROP TABLE: O(1), no bloat.
-- Measured on PostgreSQL 18: moving costs as much as an UPDATE in place (45 against 47 µs of CPU a job).

create type clarion.job_state as enum ('scheduled', 'ready', 'running', 'succeeded', 'cancelled', 'dead');

-- How an attempt that did not succeed ended.
create type clarion.attempt_outcome as enum ('failed', 'timeout', 'lease_lost', 'snoozed', 'released');

-- Why a job is dead.
create type clarion.dead_reason as enum (
  'attempts_exhausted', 'not_retryable', 'undecodable_payload', 'result_unstorable', 'crash_loop', 'unprocessable'
);

-- Time-ordered ids (UUIDv7, RFC 9562 section 5.7), so that new rows share index pages and jobs of one statement keep
-- their order. PostgreSQL 18 has them built in; before it, the first bytes of a random UUID are replaced by what it
-- does too: 48 bits of whole milliseconds, the version, and 12 bits for the fraction (section 6.2, method 3).
do $$
begin
  if current_setting('server_version_num')::int >= 180000 then
    create function clarion.new_id() returns uuid language sql volatile parallel safe
      set search_path = pg_catalog as 'select uuidv7()';
  else
    create function clarion.new_id() returns uuid language sql volatile parallel safe
      set search_path = pg_catalog as $body$
        select encode(overlay(
          uuid_send(gen_random_uuid())
          placing substring(int8send(us / 1000) from 3) || substring(int8send(28672 + us % 1000 * 4096 / 1000) from 7)
          from 1 for 8), 'hex')::uuid
        from (select (extract(epoch from clock_timestamp()) * 1000000)::bigint as us) as clock
      $body$;
  end if;
end
$$;

-- The smallest id that `new_id` can have made at `moment`: turns "created since" into a range of the primary key.
create function clarion.id_floor(moment timestamptz) returns uuid
  language sql immutable strict parallel safe
  return encode(
    substring(int8send(greatest(floor(extract(epoch from moment) * 1000), 0)::bigint) from 3)
    || '\x70008000000000000000'::bytea, 'hex')::uuid;

-- The wait after the n-th error or crash: min(cap, base · 2^(n-1)), ±20 % at random, so that jobs that failed
-- together do not come back together. The exponent is clamped: 2^60 s is past every cap.
create function clarion.backoff(n integer, base_seconds float8, cap_seconds float8) returns interval
  language sql volatile parallel safe
  return make_interval(secs =>
    least(cap_seconds, base_seconds * power(2, least(greatest(n, 1), 60) - 1)) * (0.8 + 0.4 * random()));

-- The moment past which no lease of an attempt is extended; null without a timeout. A worker that does not cancel its
-- handler loses the job then even under healthy heartbeats; the 5 s let a worker that does report it first.
create function clarion.attempt_deadline(started_at timestamptz, timeout_seconds real) returns timestamptz
  language sql stable parallel safe
  return started_at + make_interval(secs => timeout_seconds + 5);

-- When a lease taken or renewed now runs out.
create function clarion.lease_end(lease_seconds float8, started_at timestamptz, timeout_seconds real) returns timestamptz
  language sql volatile parallel safe
  return least(
    clock_timestamp() + make_interval(secs => lease_seconds),
    clarion.attempt_deadline(started_at, timeout_seconds));

create table clarion.jobs (
  id uuid primary key default clarion.new_id(),
  lease_token uuid,                       -- set while running; a fresh random one for each claim
  worker_id uuid,
  created_at timestamptz not null default now(),
  run_at timestamptz not null default now(),   -- when it became, or becomes, ready
  sort_key timestamptz not null default now(), -- run_at less the head start of its priority: the place in line
  lease_expires_at timestamptz,           -- in no index, so that a heartbeat stays a HOT update
  started_at timestamptz,                 -- of the latest attempt
  died_at timestamptz,
  state clarion.job_state not null default 'ready',
  dead_reason clarion.dead_reason,
  priority smallint not null default 0,
  attempt smallint not null default 0,    -- runs begun; counted by the claim, given back by release and snooze
  errors smallint not null default 0,
  crashes smallint not null default 0,
  snoozes smallint not null default 0,
  max_attempts smallint,                  -- null until the job, or the task at its first claim, says
  timeout_seconds real,                   -- of one attempt; null: none
  backoff_seconds real,
  backoff_cap_seconds real,
  queue text not null default 'default',
  task text not null,
  args json not null default '{}',        -- json, not jsonb: kept to the letter, exact numbers included

  constraint jobs_times_are_sane check (
    run_at between '2000-01-01Z' and '2200-01-01Z' and sort_key between '1900-01-01Z' and '2200-01-01Z'
  ),
  -- A duration that no interval can hold would stop every claim or reap that meets its row. NaN is above all numbers.
  constraint jobs_durations_are_sane check (
    timeout_seconds between 0 and 1e9 and backoff_seconds between 0 and 1e9 and backoff_cap_seconds between 0 and 1e9
  ),
  constraint jobs_state_is_live check (state in ('scheduled', 'ready', 'running', 'dead')),
  constraint jobs_running_has_lease check (
    (state = 'running') = (lease_token is not null)
    and (state = 'running') = (lease_expires_at is not null)
    and (state = 'running') = (worker_id is not null)
    and (state <> 'running' or started_at is not null)
  ),
  constraint jobs_dead_has_reason check ((state = 'dead') = (dead_reason is not null))
)
-- Free room on each page keeps heartbeats HOT. Vacuum early and without the default cost delay: the table is
-- small and every row in it dies soon, and dead entries at the head of the ready index are what claims walk over.
with (
  fillfactor = 70,
  autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
  autovacuum_analyze_scale_factor = 0.1
);

-- A claim reads one range of this index per queue, in order, and stops at its limit.
create index jobs_ready on clarion.jobs (queue, sort_key, id) where state = 'ready';
-- Promotion reads the due head of this one.
create index jobs_scheduled on clarion.jobs (run_at) where state = 'scheduled';
-- The reaper reads all of this one: as many entries as jobs are running at this moment.
create index jobs_running on clarion.jobs (id) where state = 'running';
create index jobs_dead on clarion.jobs (id) where state = 'dead';

create table clarion.job_history (
  id uuid not null,
  lease_token uuid,                       -- of the attempt that finished it: the same call again finds its answer
  worker_id uuid,
  created_at timestamptz not null,
  run_at timestamptz not null,
  started_at timestamptz,
  finished_at timestamptz not null default now(),
  state clarion.job_state not null,
  priority smallint not null,
  attempt smallint not null,
  errors smallint not null,
  crashes smallint not null,
  snoozes smallint not null,
  max_attempts smallint,
  timeout_seconds real,
  queue text not null,
  task text not null,
  args json not null,
  result json,

  primary key (id, finished_at),
  constraint job_history_state_is_final check (state in ('succeeded', 'cancelled'))
) partition by range (finished_at);

-- Catches what no daily partition covers; `create_history_partition` moves it where it belongs.
create table clarion.job_history_default partition of clarion.job_history default;

-- One row per attempt that did not succeed; a clean success lives in its history row and costs nothing here.
-- Keyed by the lease token, which is unique to the attempt: a repeated `fail` finds its first answer.
create table clarion.attempts (
  job_id uuid not null,
  lease_token uuid not null,
  worker_id uuid,
  attempt smallint not null,
  outcome clarion.attempt_outcome not null,
  state clarion.job_state not null,       -- what the job became
  started_at timestamptz not null,
  ended_at timestamptz not null default now(),
  next_run_at timestamptz,                -- null: no further run is planned
  error_type text,
  error_message text,
  error_trace text,
  reaped boolean not null default false,  -- ended by the reaper: no call of its worker can be a repetition

  primary key (job_id, lease_token)
);
create index attempts_ended on clarion.attempts (ended_at);

-- The next two answer a call whose token holds nothing: was it made before, and its answer lost? They are volatile
-- functions on purpose, since each of their queries sees what is committed by now. The calling statement does not: if
-- the same call is still being committed elsewhere, it waits for the row, finds it gone, and its own snapshot, older
-- than the wait, would take that for a lost lease. They also spare the calls that do hold their job the planning and
-- the locks of every partition of the history.

-- Whether the attempt of this token completed its job.
create function clarion.was_completed(job uuid, token uuid) returns boolean
  language plpgsql volatile set search_path = pg_catalog as $$
begin
  return exists (
    select from clarion.job_history as h where h.id = job and h.lease_token = token and h.state = 'succeeded'
  );
end
$$;

-- What the attempt of this token made of its job, if its worker ended it in one of these ways; null: it did not.
create function clarion.ended_as(job uuid, token uuid, outcomes clarion.attempt_outcome[]) returns clarion.job_state
  language plpgsql volatile set search_path = pg_catalog as $$
begin
  return (
    select a.state
    from clarion.attempts as a
    where a.job_id = job and a.lease_token = token and a.outcome = any(outcomes) and not a.reaped
  );
end
$$;

-- Settings of a queue; a queue without a row has the defaults.
create table clarion.queues (
  name text primary key,
  priority_credit_seconds real not null default 60 check (priority_credit_seconds >= 0),
  created_at timestamptz not null default now()
);

-- Worker processes that are alive or died lately: for people to look at. Leases do not depend on it.
create table clarion.workers (
  id uuid primary key,                    -- fresh for every process start, never a host name
  name text not null,                     -- host and pid, for people
  version text not null,
  queues text[] not null,
  tasks text[] not null,
  concurrency integer not null,
  running integer not null default 0,
  state text not null default 'running' check (state in ('running', 'draining')),
  started_at timestamptz not null default now(),
  seen_at timestamptz not null default now()
)
with (fillfactor = 70);
