#!/bin/sh
# Install lxc_autoscale_api on a Proxmox VE host, upgrade it, or remove it.
#
#   ./install.sh                install or upgrade, and start the service
#   ./install.sh --uninstall    remove it; configuration and logs stay
#   ./install.sh --purge        remove it with configuration and logs
#
# An upgrade keeps configuration, key and logs. The service is restarted only if the
# configuration passes the new version's check, and the old version is put back if the
# new one does not become healthy.
#
# DESTDIR=/some/folder installs below that folder, without root and without systemd
# (SYSTEMCTL names a systemctl to call all the same).
set -eu

NAME=lxc_autoscale_api
DESTDIR=${DESTDIR:-}
if [ -n "$DESTDIR" ]; then SYSTEMCTL=${SYSTEMCTL:-}; else SYSTEMCTL=${SYSTEMCTL:-systemctl}; fi
HEALTH_TRIES=${HEALTH_TRIES:-100}
HERE=$(cd "$(dirname "$0")" && pwd)

MODULE=/usr/local/bin/$NAME.py
UNIT=/etc/systemd/system/$NAME.service
CONFIG_DIR=/etc/lxc_autoscale_ml
CONFIG=$CONFIG_DIR/$NAME.yaml
LOGROTATE=/etc/logrotate.d/$NAME
RUN_DIR=/run/$NAME
LOGS="/var/log/autoscaleapi.log /var/log/autoscaleapi_access.log /var/log/autoscaleapi_error.log"

say() { printf '%s\n' "$*"; }

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

require_host() {
    for file in "$NAME.py" "$NAME.yaml" "$NAME.service"; do
        [ -f "$HERE/$file" ] || fail "$HERE/$file is missing; run install.sh from the project's folder."
    done
    missing=""
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null || missing="$missing Python-3.9-or-later"
    if [ -z "$DESTDIR" ]; then
        [ "$(id -u)" -eq 0 ] || missing="$missing root-rights"
        command -v pct >/dev/null 2>&1 || missing="$missing pct-(this-must-be-a-Proxmox-VE-host)"
        command -v "$SYSTEMCTL" >/dev/null 2>&1 || missing="$missing systemctl"
    fi
    [ -z "$missing" ] || fail "nothing was changed; missing:$missing"
}

require_root() {
    [ -n "$DESTDIR" ] || [ "$(id -u)" -eq 0 ] || fail "nothing was changed; missing: root-rights"
}

# put MODE SOURCE TARGET: replace a file in one step, so that nobody ever sees half of it.
put() {
    mkdir -p "$DESTDIR$(dirname "$3")"
    cp "$2" "$DESTDIR$3.tmp"
    chmod "$1" "$DESTDIR$3.tmp"
    mv -f "$DESTDIR$3.tmp" "$DESTDIR$3"
}

# keep FILE: a copy of what is installed, to put back if the new version fails.
keep() {
    rm -f "$DESTDIR$1.old"
    [ ! -e "$DESTDIR$1" ] || cp -p "$DESTDIR$1" "$DESTDIR$1.old"
}

put_back() {
    for file in "$MODULE" "$UNIT"; do
        [ ! -e "$DESTDIR$file.old" ] || mv -f "$DESTDIR$file.old" "$DESTDIR$file"
    done
}

drop_kept() { rm -f "$DESTDIR$MODULE.old" "$DESTDIR$UNIT.old"; }

install_files() {
    keep "$MODULE"
    keep "$UNIT"
    put 0755 "$HERE/$NAME.py" "$MODULE"
    say "installed $DESTDIR$MODULE"
    put 0644 "$HERE/$NAME.service" "$UNIT"
    say "installed $DESTDIR$UNIT"
}

install_config() {
    if [ ! -e "$DESTDIR$CONFIG" ]; then
        key=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
        mkdir -p "$DESTDIR$CONFIG_DIR"
        (umask 077 && sed "s/your-secret-api-key/$key/" "$HERE/$NAME.yaml" >"$DESTDIR$CONFIG.tmp")
        mv -f "$DESTDIR$CONFIG.tmp" "$DESTDIR$CONFIG"
        say "installed $DESTDIR$CONFIG with a new key"
        return
    fi
    say "kept $DESTDIR$CONFIG"
    # Only settings and comments are compared: the key always differs.
    if same_but_key "$DESTDIR$CONFIG" "$HERE/$NAME.yaml"; then
        rm -f "$DESTDIR$CONFIG.new"
    else
        put 0600 "$HERE/$NAME.yaml" "$CONFIG.new"
        say "installed the new sample beside it: $DESTDIR$CONFIG.new"
    fi
}

same_but_key() {
    [ "$(sed 's/^\( *api_key:\).*/\1/' "$1")" = "$(sed 's/^\( *api_key:\).*/\1/' "$2")" ]
}

install_logrotate() {
    rotate=$(mktemp)
    cat >"$rotate" <<END
$LOGS {
    weekly
    rotate 8
    compress
    delaycompress
    missingok
    notifempty
}
END
    put 0644 "$rotate" "$LOGROTATE"
    rm -f "$rotate"
    say "installed $DESTDIR$LOGROTATE"
}

# The configuration that is there must suit the version that is about to be installed.
check_config() {
    [ -e "$DESTDIR$CONFIG" ] || return 0
    python3 "$HERE/$NAME.py" --config "$DESTDIR$CONFIG" --check-config >/dev/null ||
        fail "nothing was changed; mend the configuration and run install.sh again."
}

restart_service() {
    "$SYSTEMCTL" daemon-reload
    "$SYSTEMCTL" enable --quiet $NAME.service
    "$SYSTEMCTL" restart $NAME.service
}

# health: the URL and the answer of /health/check, as the configuration says where.
health() {
    python3 - "$DESTDIR$MODULE" "$DESTDIR$CONFIG" <<'END'
import runpy, sys, urllib.error, urllib.request
daemon = runpy.run_path(sys.argv[1])
server = daemon["read_config"](sys.argv[2]).server
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
url = f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"
try:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer = opener.open(url + "/health/check", timeout=20)
except urllib.error.HTTPError as error:
    answer = error
except OSError:
    sys.exit(1)
print(url)
sys.exit(0 if answer.status == 200 else 1)
END
}

wait_until_healthy() {
    tries=0
    until url=$(health); do
        tries=$((tries + 1))
        [ "$tries" -lt "$HEALTH_TRIES" ] || return 1
        sleep 0.2
    done
}

start_service() {
    if restart_service && wait_until_healthy; then
        say "enabled and started $NAME.service; it is healthy. Try:"
        say "  KEY=\$(sed -n 's/^  api_key: \"\\(.*\\)\"/\\1/p' $CONFIG)"
        say "  curl -s -H \"X-API-Key: \$KEY\" $url/routes"
        return
    fi
    [ -e "$DESTDIR$MODULE.old" ] || fail "the service does not become healthy; see: journalctl -u $NAME"
    put_back
    restart_service || true
    fail "the new version did not become healthy, and the old one was put back; see: journalctl -u $NAME"
}

uninstall() {
    [ -z "$SYSTEMCTL" ] || "$SYSTEMCTL" disable --now --quiet $NAME.service 2>/dev/null || true
    rm -f "$DESTDIR$MODULE" "$DESTDIR$UNIT" "$DESTDIR$LOGROTATE"
    rm -rf "$DESTDIR$RUN_DIR"
    drop_kept
    [ -z "$SYSTEMCTL" ] || "$SYSTEMCTL" daemon-reload 2>/dev/null || true
    say "removed $NAME"
}

purge() {
    rm -f "$DESTDIR$CONFIG" "$DESTDIR$CONFIG.new"
    rmdir "$DESTDIR$CONFIG_DIR" 2>/dev/null || true
    for log in $LOGS; do
        rm -f "$DESTDIR$log" "$DESTDIR$log".*
    done
    say "removed its configuration and logs"
}

main() {
    case "${1:-}" in
    "")
        require_host
        check_config
        install_files
        install_config
        install_logrotate
        [ -z "$SYSTEMCTL" ] || start_service
        drop_kept
        ;;
    --uninstall)
        require_root
        uninstall
        say "kept $DESTDIR$CONFIG and the logs (--purge removes these too)"
        ;;
    --purge)
        require_root
        uninstall
        purge
        ;;
    *)
        fail "unknown option '$1'; known: --uninstall, --purge"
        ;;
    esac
}

main "$@"
