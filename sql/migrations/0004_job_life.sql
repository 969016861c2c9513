-- The rest of a job's life: deadlines, cancel and retry, progress and checkpoints, who did what, log lines; and the
-- ledger of idempotency keys.
--
-- The constraints stay `not valid`: in the rows that are there already the new columns are all null. Indexes are made and
-- dropped in place, since the table of live jobs is small.

alter table clarion.jobs
  add column start_by timestamptz,              -- the first attempt begins by then, or the job is dead as `expired`
  add column finish_by timestamptz,             -- the last attempt ends by then, or the job is dead as `total_timeout`
  add column total_timeout_seconds real,        -- what finish_by was made of; a retry makes it anew
  add column cancel_requested_at timestamptz,   -- only while running: no heartbeat extends the lease any more
  add column lease_seconds real,                -- as the claim asked for; heartbeats that do not say extend by so much
  add column generation smallint not null default 1,  -- a retry of a dead or cancelled job begins the next
  add column log_lines integer not null default 0,    -- offered in this generation; kept up to a limit
  add column enqueued_by text,                  -- null: the API, for somebody who gave no name
  add column error_type text,                   -- of the latest attempt that went wrong
  add column progress json,
  add column checkpoint json,                   -- what an attempt left for the next
  add constraint jobs_deadlines_are_sane check (
    start_by between '1970-01-01Z' and '2300-01-01Z' and finish_by between '1970-01-01Z' and '2300-01-01Z'
    and total_timeout_seconds between 0 and 1e9 and lease_seconds between 0 and 1e9
  ) not valid,
  add constraint jobs_cancel_is_requested_of_running check (cancel_requested_at is null or state = 'running') not valid;

-- What a retry needs to bring a cancelled job back, and what people ask about a finished one.
alter table clarion.job_history
  add column start_by timestamptz,
  add column finish_by timestamptz,
  add column total_timeout_seconds real,
  add column backoff_seconds real,
  add column backoff_cap_seconds real,
  add column generation smallint not null default 1,
  add column log_lines integer not null default 0,
  add column enqueued_by text,
  add column error_type text,
  add column progress json,
  add column checkpoint json,
  add column completion_key text;

alter table clarion.attempts
  add column run_at timestamptz,                -- when it became ready for this attempt
  add column generation smallint not null default 1;

alter table clarion.workers
  add column directive text not null default 'ok' check (directive in ('ok', 'drain'));

-- The moment at which a waiting job is too late; null: never.
create function clarion.too_late_at(started_at timestamptz, start_by timestamptz, finish_by timestamptz)
  returns timestamptz language sql immutable parallel safe
  return least(case when started_at is null then start_by end, finish_by);

-- Expiry reads the passed head of this one; a job without deadlines has no entry.
-- squawk-ignore require-concurrent-index-creation
create index jobs_deadline on clarion.jobs (clarion.too_late_at(started_at, start_by, finish_by))
where state in ('scheduled', 'ready') and (start_by is not null or finish_by is not null);

-- Dead letters are listed, grouped and redriven oldest first.
-- squawk-ignore require-concurrent-index-creation
create index jobs_dead_since on clarion.jobs (died_at, id) where state = 'dead';
-- squawk-ignore require-concurrent-index-deletion
drop index clarion.jobs_dead;

-- The moment past which no lease of an attempt is extended; null: none. The 5 s let a worker that ends its handler in
-- time report it first. The functions that go were called by statements of this repository only.
-- squawk-ignore ban-drop-function
drop function clarion.lease_end;
-- squawk-ignore ban-drop-function
drop function clarion.attempt_deadline;
create function clarion.attempt_deadline(started_at timestamptz, timeout_seconds real, finish_by timestamptz)
  returns timestamptz language sql stable parallel safe
  return least(started_at + make_interval(secs => timeout_seconds), finish_by) + interval '5 s';

-- When a lease taken or renewed now runs out.
create function clarion.lease_end(
  lease_seconds float8, started_at timestamptz, timeout_seconds real, finish_by timestamptz
) returns timestamptz language sql volatile parallel safe
  return least(
    clock_timestamp() + make_interval(secs => lease_seconds),
    clarion.attempt_deadline(started_at, timeout_seconds, finish_by));

-- What happened to a job besides its attempts: commands, and what the maintenance decided. With the attempts and the
-- row itself it is the whole timeline; a job that simply succeeds has no entry.
create type clarion.job_event as enum (
  'cancel_requested', 'cancelled', 'retried', 'changed', 'expired', 'parked'
);
create table clarion.job_events (
  id bigint generated always as identity primary key,
  job_id uuid not null,
  at timestamptz not null default clock_timestamp(),
  event clarion.job_event not null,
  actor text not null,                          -- `api`, `api:ada`, `worker:<id>`, `reaper`, `scheduler`
  state clarion.job_state not null,             -- what the job is then
  generation smallint not null,
  detail text
);
create index job_events_of_job on clarion.job_events (job_id, id);
create index job_events_at on clarion.job_events (at);

-- What handlers said, bounded per job. Numbered by the worker within its attempt: a repeated call adds nothing.
create table clarion.job_logs (
  job_id uuid not null,
  lease_token uuid not null,
  n integer not null,
  id bigint generated always as identity,
  at timestamptz not null default clock_timestamp(),
  generation smallint not null,
  attempt smallint not null,
  level text not null,
  message text not null,
  fields json,

  primary key (job_id, lease_token, n)
);
create index job_logs_at on clarion.job_logs (at);

-- The answers to keyed enqueues. It outlives the jobs: pruning one does not reopen the window of its key.
create table clarion.idempotency_keys (
  key text primary key,
  job_id uuid not null,
  state clarion.job_state not null,             -- as it was answered, with the next two
  created_at timestamptz not null,
  run_at timestamptz not null,
  request json not null,                        -- field → digest, to say what differs in another request
  expires_at timestamptz not null
);
create index idempotency_keys_expire on clarion.idempotency_keys (expires_at);

-- Moves a job to the history as cancelled, and says who did it; null when it is gone already. Its caller has locked it.
create function clarion.finish_cancelled(job uuid, by text, why text) returns clarion.job_state
  language plpgsql volatile set search_path = pg_catalog as $$
declare
  cancelled clarion.job_state;
begin
  with gone as (
    delete from clarion.jobs as j where j.id = job returning j.*
  ),
  moved as (
    insert into clarion.job_history (
      id, lease_token, worker_id, created_at, run_at, started_at, finished_at, state, priority,
      attempt, errors, crashes, snoozes, max_attempts, timeout_seconds, queue, task, args,
      start_by, finish_by, total_timeout_seconds, backoff_seconds, backoff_cap_seconds, generation, log_lines,
      enqueued_by, error_type, progress, checkpoint
    )
    select
      g.id, g.lease_token, g.worker_id, g.created_at, g.run_at, g.started_at, clock_timestamp(), 'cancelled', g.priority,
      g.attempt, g.errors, g.crashes, g.snoozes, g.max_attempts, g.timeout_seconds, g.queue, g.task, g.args,
      g.start_by, g.finish_by, g.total_timeout_seconds, g.backoff_seconds, g.backoff_cap_seconds, g.generation, g.log_lines,
      g.enqueued_by, g.error_type, g.progress, g.checkpoint
    from gone as g
  )
  insert into clarion.job_events (job_id, event, actor, state, generation, detail)
  select g.id, 'cancelled', by, 'cancelled', g.generation, why
  from gone as g
  returning state into cancelled;
  return cancelled;
end
$$;

-- The next two answer a call whose token holds nothing: was it made before, and its answer lost? They replace those
-- that said less; for why they are volatile functions, see 0001. Strict, so that a null id costs nothing.
-- squawk-ignore ban-drop-function
drop function clarion.was_completed;
-- squawk-ignore ban-drop-function
drop function clarion.ended_as;

-- How the attempt of this token completed its job; no row: it did not.
create function clarion.completion_of(job uuid, token uuid) returns table (found boolean, completion_key text, result json)
  language plpgsql volatile strict set search_path = pg_catalog rows 1 as $$
begin
  return query
    select true, h.completion_key, h.result
    from clarion.job_history as h
    where h.id = job and h.lease_token = token and h.state = 'succeeded';
end
$$;

-- What the attempt of this token made of its job, if its worker ended it in one of these ways; no row: it did not.
create function clarion.ending_of(job uuid, token uuid, outcomes clarion.attempt_outcome[])
  returns table (state clarion.job_state, next_run_at timestamptz)
  language plpgsql volatile strict set search_path = pg_catalog rows 1 as $$
begin
  return query
    select a.state, a.next_run_at
    from clarion.attempts as a
    where a.job_id = job and a.lease_token = token and a.outcome = any(outcomes) and not a.reaped;
end
$$;

-- Whether a log line is stored. Volatile for the same reason: the same call may have stored it while this one waited.
create function clarion.has_line(job uuid, token uuid, line integer) returns boolean
  language plpgsql volatile strict set search_path = pg_catalog as $$
begin
  return exists (
    select from clarion.job_logs as l where l.job_id = job and l.lease_token = token and l.n = line
  );
end
$$;

-- What a keyed enqueue was answered; no row: the key is not there. Volatile, since the row may be younger than the
-- snapshot of the statement that ran into it.
create function clarion.answer_of(given text) returns table (
  job_id uuid, state clarion.job_state, created_at timestamptz, run_at timestamptz, request json
)
  language plpgsql volatile strict set search_path = pg_catalog rows 1 as $$
begin
  return query
    select k.job_id, k.state, k.created_at, k.run_at, k.request
    from clarion.idempotency_keys as k
    where k.key = given;
end
$$;
