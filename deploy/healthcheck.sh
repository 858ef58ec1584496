#!/usr/bin/env bash
# 0 where /livez answers 200: what the image's HEALTHCHECK asks every ten seconds, so in bash and not in a Python of 200 ms.
set -euo pipefail
exec 3<>"/dev/tcp/127.0.0.1/${PORT:-${BENTOML_PORT:-3000}}"
printf 'GET /livez HTTP/1.0\r\n\r\n' >&3
read -r _ status _ <&3
[[ $status == 200 ]]
