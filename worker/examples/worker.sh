#!/usr/bin/env bash
# A Clarion worker in bash: one job at a time, over HTTP, with curl and awk.
# Put your own tasks into `tasks` and `handle`, then run it with these in its environment:
#
# CLARION_URL            where Clarion answers; default: http://127.0.0.1:8080
# CLARION_API_TOKEN      its bearer token, if it has one
# CLARION_QUEUES         queues to work on, comma-separated; default: default
# CLARION_LEASE          how long a claim holds a job without a heartbeat; default: 30s
# CLARION_DRAIN_SECONDS  time that a running job gets after SIGTERM before it is handed back; default: 20
# Limits: Linux (the clock is /proc/uptime), bash 4.4, curl 7.71. JSON is read a character at a time: keep arguments
# under a megabyte. systemd has to stop it with KillMode=mixed, so that its children get no signal of their own.
set -meuo pipefail # -m: what starts in the background leads a group, and is ended with all its children
LC_ALL=C.UTF-8 # for printf: \u, and no decimal commas
tasks='["demo.echo", "demo.sleep", "demo.fail", "demo.sha256"]'

# Gets a task and its arguments, as JSON; prints the result, as JSON or not at all. Where a command fails, the job does,
# and what was written to standard error is the message.
handle() {
  case $1 in
    demo.echo) printf '%s' "$2" ;;
    demo.sleep) sleep "$(member seconds <<<"$2")" ;;
    demo.fail) text_of "$(member message <<<"$2")" >&2 && return 1 ;;
    demo.sha256) text_of "$(member text <<<"$2")" | sha256sum | sed 's/ .*//; s/.*/{"sha256": "&"}/' ;;
  esac
}

# Prints the value, as it stands, of a member of the JSON it reads; $2 is how deep its object lies, from 1. Without a
# name: depth, name and value of all members, with tabs between.
member() {
  LC_ALL=C awk -v wanted="${1:-}" -v at="${2:-1}" '
    function emit(  value) {
      value = substr(json, start[depth], i - start[depth])
      gsub(/^ +| +$/, "", value)
      if (start[depth] && wanted == "") print depth "\t" name[depth] "\t" value
      if (start[depth] && wanted == name[depth] && depth == at) print value
      start[depth] = 0
    }
    { gsub(/\t/, " "); json = json $0 " " }
    END {
      for (i = 1; (c = substr(json, i, 1)) != ""; i++) {
        if (c == "\"") {
          for (from = ++i; (c = substr(json, i, 1)) != "\"" && c != ""; i++) if (c == "\\") i++
          string = substr(json, from, i - from)
        } else if (c == ":") { name[depth] = string; start[depth] = i + 1 }
        else if (c == "{" || c == "[") start[++depth] = 0
        else if (c == ",") emit()
        else if (c == "}" || c == "]") { emit(); depth-- }
      }
    }'
}

# The text that a JSON string stands for.
text_of() {
  local rest=${1:1:-1} text='' char
  while [[ $rest =~ ^([^\\]*)\\(u[dD][89abAB]..\\u....|u....|.)(.*)$ ]]; do
    char=${BASH_REMATCH[2]} text+=${BASH_REMATCH[1]} rest=${BASH_REMATCH[3]}
    case $char in
      u????\\*) printf -v char 'U%08x' $((0x10000 + (0x${char:1:4} - 0xd800) * 0x400 + 0x${char:7} - 0xdc00)) ;;&
      [Uubfnrt]*) printf -v char '%b' "\\$char" ;;
    esac
    text+=$char
  done
  printf '%s' "$text$rest"
}

# A text as a JSON string, without its control characters other than line ends and tabs.
json_of() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t}
  printf '"%s"' "${text//[[:cntrl:]]/}"
}

log() { printf '%(%FT%T%z)T %s\n' -1 "$*" >&2; }
ms_of() { printf '%.0f' "${1:-0}e3"; }
clock() { read -r now _ </proc/uptime; now=$((10#${now/./} * 10)); } # sets `now`, in ms; nobody can set this clock
is_alive() { kill -0 "$1" 2>/dev/null; }
end() { kill "-$1" -- "-$2" 2>/dev/null || true; }

# Waits so many seconds, or until the bell rings: something has ended, or a signal came. The first signal asks for an
# orderly stop; a second one, or the death of the process that gets them, is obeyed at once.
pause() {
  local rung=''
  read -r -t "$1" -u "$bell" rung || true
  if [[ $rung == stop && $stopping == signal ]] || ! is_alive $$; then
    end KILL "$request" && end KILL "${handler:-$request}"
    is_alive $$ || rm -r -- "$dir" && exit 1
  fi
  if [[ $rung == stop ]]; then stopping=signal; fi
}

# Posts a body; more arguments are curl's. Sets `answer`, and `status`, which is empty where no whole answer came.
post() {
  rm -f "$dir/status" && : >"$dir/answer" && printf '%s' "$2" >"$dir/body"
  {
    curl --silent --show-error --header "@$dir/headers" --data-binary "@$dir/body" --output "$dir/answer" \
      --write-out '%{http_code}' "${@:3}" "$url$1" >"$dir/code" || : >"$dir/code"
    mv "$dir/code" "$dir/status" && echo >&"$bell"
  } &
  request=$!
  while [[ ! -e $dir/status && ! ($polling && $stopping) ]] && is_alive "$request"; do pause 1; done
  if [[ ! -e $dir/status ]]; then end TERM "$request" && { wait "$request" 2>/dev/null || true; }; fi
  status=$(cat "$dir/status" 2>/dev/null || true) answer=$(<"$dir/answer")
}

obey() { if [[ $(member directive <<<"$answer") == '"drain"' ]]; then stopping=${stopping:-directive}; fi; }

# Renews the lease, or without one says "I am alive"; sets `verdict` where the job is to end early.
heartbeat() {
  local sent=$now held=${job[token]:+"{\"token\": ${job[token]}}"}
  post /v1/leases/heartbeat "{$who, \"leases\": [$held]}" \
    --max-time $(((third < expires_at - now ? third : expires_at - now) / 1000 + 1))
  clock
  beat_at=$((now + third / 4)) # without an answer, or where the row was busy
  obey
  case $(member status 3 <<<"$answer") in
    '"extended"') beat_at=$((sent + third)) expires_at=$((sent + $(ms_of "$(member lease 3 <<<"$answer")"))) ;;
    '"cancel"') verdict=release ;;
    '"lost"') verdict=lost ;;
  esac
}

# Says how the job ended, again and again until the server has answered: the token makes that harmless. What the server
# does not take (no JSON, too large) is a failure.
report() {
  clock
  post "/v1/leases/${job[token]//\"/}/$1" "$2" --max-time 10 \
    --retry 999 --retry-all-errors --retry-max-time $(((expires_at - now) / 1000 + 60))
  log "${job[id]} $1: HTTP ${status:-without an answer}"
  if [[ $status =~ ^4(00|13|22)$ && $2 != "$refused" ]]; then report fail "$refused"; fi
}

# Runs the job in `answer`: keeps its lease, ends it early where it must, and reports how it ended.
run() {
  local depth name value text verdict=''
  while IFS=$'\t' read -r depth name value; do [[ $depth != 3 ]] || job[$name]=$value; done < <(member <<<"$answer")
  if [[ ! ${job[token]:-} ]]; then log "no lease: $answer" && { [[ $stopping ]] || pause 1; } && return 0; fi
  third=$(($(ms_of "${job[lease]}") / 3)) drain_at=$never timeout_at=$never
  clock && rm -f "$dir/end"
  asked=$((asked + $(ms_of "$(member waited 1 <<<"$answer")"))) # the lease began no earlier
  beat_at=$((asked + third)) expires_at=$((asked + 3 * third))
  if [[ ${job[timeout]} != null ]]; then timeout_at=$((now + $(ms_of "${job[timeout]}"))); fi
  (
    trap '[[ -s $dir/end ]] || echo failure >"$dir/end"; echo >&"$bell"' EXIT
    handle "${job[task]//\"/}" "${job[args]}" <<<"${job[args]}" >"$dir/result" 2>"$dir/error"
    echo success >"$dir/end"
  ) &
  handler=$!
  while [[ ! -s $dir/end && ! $verdict ]] && is_alive "$handler"; do
    clock
    if [[ $stopping == signal ]] && ((drain_at == never)); then drain_at=$((now + drain_ms)); fi
    if ((now >= expires_at)); then verdict=lost
    elif ((now >= timeout_at)); then verdict=timeout
    elif ((now >= drain_at)); then verdict=release
    elif ((now >= beat_at)); then heartbeat
    else pause 0.2; fi
  done
  # A lost job's handler is killed at once, since somebody else may run it by now; others have 2 s to end.
  for _ in {1..20}; do if [[ ! -s $dir/end && $verdict != lost ]]; then end TERM "$handler" && pause 0.1; fi; done
  end KILL "$handler"
  wait "$handler" 2>/dev/null || true
  handler='' value=$(<"$dir/result") text=$(json_of "$(head -c 4000 "$dir/error")")
  if [[ $verdict == lost ]]; then log "${job[id]}: lease lost, outcome dropped"
  elif grep -qs success "$dir/end"; then report complete "{\"result\": ${value:-null}}"
  elif [[ $verdict == release ]]; then report release ''
  else report fail "{\"error\": {\"type\": \"Failure\", \"message\": $text}, \"outcome\": \"${verdict:-failed}\"}"; fi
}

# Claims and runs jobs, one after the other.
work() {
  set -m # a subshell has to say so again
  while [[ ! $stopping ]]; do
    declare -A job=()
    third=10000 expires_at=$never polling=yes && clock && asked=$now
    post /v1/leases "$claim" --max-time 45
    polling=''
    case $status in
      200) obey && run ;;
      204) heartbeat && if ((now - asked < 1000)); then pause 1; fi ;; # it may be told to drain; and it never spins
      '' | 408 | 429 | 5??) if [[ ! $stopping ]]; then pause 1.$((RANDOM % 1000)); fi ;;
      *) log "claim: HTTP $status $answer" && return 1 ;; # a wrong token or queue: repeating helps nobody
    esac
  done
  : >"$dir/finished"
}

never=$((1 << 62)) stopping='' polling='' handler='' request='' drain_ms=$(ms_of "${CLARION_DRAIN_SECONDS:-20}")
url=${CLARION_URL:-http://127.0.0.1:8080} queues=${CLARION_QUEUES:-default}
# The id is fresh in each process: nobody else can hold what this one was given.
who="\"worker\": \"$(</proc/sys/kernel/random/uuid)\", \"lease\": \"${CLARION_LEASE:-30s}\""
claim="{$who, \"name\": \"worker.sh\", \"queues\": [\"${queues//,/\", \"}\"], \"tasks\": $tasks, \"wait\": \"30s\"}"
refused='{"error": {"type": "ResultRefused", "message": "the server does not take what the handler said"}}'
dir=$(mktemp -d) && trap 'rm -r -- "$dir"' EXIT
mkfifo "$dir/bell" && exec {bell}<>"$dir/bell"
auth=${CLARION_API_TOKEN:+"authorization: Bearer $CLARION_API_TOKEN"}
printf '%s\n' 'content-type: application/json' "$auth" >"$dir/headers"
log "$who at $url"; work &
trap 'echo stop >&"$bell"' TERM INT
while is_alive $!; do wait $! || true; done # here a trap runs at once, and bash is in the middle of nothing
[[ -e $dir/finished ]]
