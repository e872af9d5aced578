#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs what the end-to-end tests run against: Debian's curl and nginx; with the word bench, what the benchmark runs beside,
# too. Does nothing where they are.
set -eu
missing=""
command -v curl >/dev/null || missing="$missing curl"
command -v nginx >/dev/null || [ -x /usr/sbin/nginx ] || missing="$missing nginx-light"
if [ "${1:-}" = bench ]; then
	command -v wrk >/dev/null || missing="$missing wrk"
	command -v h2load >/dev/null || missing="$missing nghttp2-client"
	command -v haproxy >/dev/null || [ -x /usr/sbin/haproxy ] || missing="$missing haproxy"
fi
[ -z "$missing" ] && exit 0
[ "$(id -u)" = 0 ] || { echo "e2e: install these first:$missing" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
