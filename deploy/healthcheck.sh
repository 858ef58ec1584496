#!/usr/bin/env bash
# The image's HEALTHCHECK: 0 if /livez answers 200. In bash, because Python would take 200 ms to start.
set -euo pipefail
exec 3<>"/dev/tcp/127.0.0.1/${PORT:-${BENTOML_PORT:-3000}}"
printf 'GET /livez HTTP/1.0\r\n\r\n' >&3
read -r _ status _ <&3
[[ $status == 200 ]]
