#!/bin/sh
# Writes .env for docker-compose.yml, beside it: random passwords, and the profile of this machine's worker.
#
#   sh docs/deploy/env.sh [gpu|cpu]
set -eu
cd "$(dirname "$0")/../.."

if [ -e .env ]; then
  echo ".env is there already, and the databases know its passwords: it stays as it is" >&2
  exit 1
fi

profile=${1:-}
if [ -z "$profile" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then profile=gpu; else profile=cpu; fi
fi
case $profile in
  gpu | cpu) ;;
  *) echo "found the profile '$profile', expected gpu or cpu" >&2; exit 2 ;;
esac

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

umask 077
cat > .env <<END
COMPOSE_PROFILES=$profile
FLATLORA_API_KEY=flk_$(random)
FLATLORA_SECRET_KEY=$(random)
POSTGRES_PASSWORD=$(random)
REDIS_PASSWORD=$(random)
OBJECTS_ACCESS_KEY=flatlora
OBJECTS_SECRET_KEY=$(random)
END
echo "wrote .env for the profile $profile; the key that clients send is FLATLORA_API_KEY in it"
