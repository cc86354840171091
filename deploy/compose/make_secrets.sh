#!/bin/sh
# Makes the secrets of compose.yaml, once: files in secrets/ that the user who runs this, and its group, can read. The
# containers join that group (SECRETS_GID in .env), since a file keeps its owner and mode when Docker mounts it.
# With rootless Docker it is group 0 there: SECRETS_GID=0 make_secrets.sh
set -eu
umask 027
cd "$(dirname "$0")"
mkdir -p secrets
for name in peer proof tenant redis-password api-keys; do
    [ -s "secrets/$name" ] || openssl rand -hex 32 > "secrets/$name"
done
echo "redis: redis://:$(cat secrets/redis-password)@redis:6379/0" > secrets/registry.yaml
chmod 750 secrets
chmod 640 secrets/*
echo "SECRETS_GID=${SECRETS_GID:-$(id -g)}" > .env
