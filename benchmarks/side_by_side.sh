# For the scripts that renew figures: commands side by side, their words in files of a folder, all ended by the script's
# end. To be sourced:
#
#   source side_by_side.sh LOG
logs=$1
declare -A named

end_together() { # In a subshell as well, which doesn't inherit it
  trap 'kill $(jobs -p) 2> /dev/null' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

start() { # GPU NAME ARGUMENTS...: Python in the background, as $!; it is Python itself, so that it can be ended
  local gpu=$1 name=$2
  shift 2
  CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-$gpu} python3 "$@" > "$logs/$name" 2>&1 &
  named[$!]=$name
}

finish() { # PID...: wait for them; the script goes on if one fails, of which it tells
  local pid failed=0
  for pid in "$@"; do
    wait "$pid" || { failed=1 && echo "${named[$pid]} failed: see $logs/${named[$pid]}" >&2; }
  done
  return $failed
}

end_together
