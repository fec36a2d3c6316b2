#!/bin/sh
# Install lxc_autoscale_api on a Proxmox VE host, upgrade it, or remove it.
#
#   ./install.sh                install or upgrade, and start the service
#   ./install.sh --tls          the same; a new configuration names this node's own certificate
#   ./install.sh --uninstall    remove it; configuration and logs stay
#   ./install.sh --purge        remove it with configuration and logs
#
# An upgrade keeps configuration, key and logs. The service is restarted only if the
# configuration passes the new version's check, and the old version is put back if the
# new one does not become healthy; so it is if an upgrade was cut off and is run again.
#
# DESTDIR=/some/folder installs below that folder, without root and without systemd
# (SYSTEMCTL names a systemctl to call all the same, and PVE_DIR another /etc/pve).
set -eu
umask 022
unset CDPATH                            # or cd might go elsewhere
PATH=$PATH:/usr/sbin:/sbin              # which a shell from su may not have

NAME=lxc_autoscale_api
DESTDIR=${DESTDIR:-}
if [ -n "$DESTDIR" ]; then SYSTEMCTL=${SYSTEMCTL:-}; else SYSTEMCTL=${SYSTEMCTL:-systemctl}; fi
HEALTH_TRIES=${HEALTH_TRIES:-100}
HERE=$(cd "$(dirname "$0")" && pwd)

MODULE=/usr/local/bin/$NAME.py
UNIT=/etc/systemd/system/$NAME.service
CONFIG_DIR=/etc/lxc_autoscale_ml
CONFIG=$CONFIG_DIR/$NAME.yaml
CREDENTIAL=$UNIT.d/credential.conf
LOGROTATE=/etc/logrotate.d/$NAME
RUN_DIR=/run/$NAME
KEPT=/var/lib/$NAME.old
# This node's certificate and the CA of the cluster that signed it (pve-cluster's
# PVE::Cluster::Setup). It names 127.0.0.1, ::1, localhost, the node and its address.
PVE_DIR=${PVE_DIR:-/etc/pve}
TLS_CERTIFICATE=$PVE_DIR/local/pve-ssl.pem
TLS_KEY=$PVE_DIR/local/pve-ssl.key
TLS_CA=$PVE_DIR/pve-root-ca.pem
TLS=""
FILES="$MODULE $UNIT $CREDENTIAL $LOGROTATE"
LOG_DIR=/var/log
LOGS="$LOG_DIR/autoscaleapi.log $LOG_DIR/autoscaleapi_access.log $LOG_DIR/autoscaleapi_error.log"

say() { printf '%s\n' "$*"; }

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

require_host() {
    for file in "$NAME.py" "$NAME.yaml" "$NAME.service"; do
        [ -f "$HERE/$file" ] ||
            fail "$HERE/$file is missing; run install.sh from the project's folder."
    done
    # The Python that will run the daemon also checks and asks it here: always with -I, for what
    # lies in the current folder must not stand for a module of its own.
    PYTHON=$(sed -n 's/^ExecStart=\([^ ]*\) .*/\1/p' "$HERE/$NAME.service")
    missing=""
    "$PYTHON" -Ic 'import sys; sys.exit(sys.version_info < (3, 9))' 2>/dev/null ||
        missing="$missing Python-3.9-or-later-as-$PYTHON"
    if [ -z "$DESTDIR" ]; then
        [ "$(id -u)" -eq 0 ] || missing="$missing root-rights"
        command -v pct >/dev/null 2>&1 || missing="$missing pct-(this-must-be-a-Proxmox-VE-host)"
        command -v "$SYSTEMCTL" >/dev/null 2>&1 || missing="$missing systemctl"
        [ -z "$TLS" ] || [ -r "$TLS_CERTIFICATE" ] || missing="$missing $TLS_CERTIFICATE"
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

# keep_old: copies of what is installed, to put back if the new version fails. The folder appears
# as a whole, and while it is there its copies stay: what an upgrade that was cut off has
# installed is not the old version.
keep_old() {
    [ ! -d "$DESTDIR$KEPT" ] || return 0
    rm -rf "$DESTDIR$KEPT.tmp"
    mkdir -p "$DESTDIR$KEPT.tmp"
    for file in $FILES; do
        [ ! -e "$DESTDIR$file" ] || cp -p "$DESTDIR$file" "$DESTDIR$KEPT.tmp/${file##*/}"
    done
    mv "$DESTDIR$KEPT.tmp" "$DESTDIR$KEPT"
}

was_installed() { [ -e "$DESTDIR$KEPT/${UNIT##*/}" ]; }

put_back() {
    for file in $FILES; do
        if [ -e "$DESTDIR$KEPT/${file##*/}" ]; then
            cp -p "$DESTDIR$KEPT/${file##*/}" "$DESTDIR$file.tmp"
            mv -f "$DESTDIR$file.tmp" "$DESTDIR$file"
        else
            rm -f "$DESTDIR$file"
        fi
    done
    rmdir "$DESTDIR$UNIT.d" 2>/dev/null || true
    drop_bytecode
    drop_old
}

# The bytecode of the module, for whatever Python. Of another version of the module it would be
# passed over, for it says of which time and size its source was.
drop_bytecode() {
    rm -f "$DESTDIR${MODULE%/*}/__pycache__/$NAME".*.pyc
    rmdir "$DESTDIR${MODULE%/*}/__pycache__" 2>/dev/null || true
}

drop_old() {
    [ ! -d "$DESTDIR$KEPT" ] || mv "$DESTDIR$KEPT" "$DESTDIR$KEPT.tmp"
    rm -rf "$DESTDIR$KEPT.tmp"
}

# ours: whether the unit of our name runs our module.
ours() { grep -qsF "$MODULE" "$DESTDIR$UNIT"; }

install_files() {
    keep_old
    install_credential
    put 0755 "$HERE/$NAME.py" "$MODULE"
    say "installed $DESTDIR$MODULE"
    drop_bytecode
    "$PYTHON" -Im py_compile "$DESTDIR$MODULE" || true      # a start does without, and takes longer
    put 0644 "$HERE/$NAME.service" "$UNIT"
    say "installed $DESTDIR$UNIT"
}

# A credential that stands in the unit moves beside it, where an upgrade leaves it alone.
install_credential() {
    { ours && [ ! -e "$DESTDIR$CREDENTIAL" ]; } || return 0
    lines=$(sed -nE 's/^[[:space:]]+//
        /^(Load|Set)Credential(Encrypted)?[[:space:]]*=[[:space:]]*api_key/p' "$DESTDIR$UNIT")
    [ -n "$lines" ] || return 0
    drop_in=$(mktemp)
    printf '[Service]\n%s\n' "$lines" >"$drop_in"
    put 0600 "$drop_in" "$CREDENTIAL"
    rm -f "$drop_in"
    say "moved the credential api_key from the unit to $DESTDIR$CREDENTIAL"
}

install_config() {
    if [ ! -e "$DESTDIR$CONFIG" ]; then
        mkdir -p "$DESTDIR$CONFIG_DIR"
        (umask 077 && with_new_key <"$HERE/$NAME.yaml" >"$DESTDIR$CONFIG.tmp")
        mv -f "$DESTDIR$CONFIG.tmp" "$DESTDIR$CONFIG"
        say "installed $DESTDIR$CONFIG with a new key"
        return
    fi
    say "kept $DESTDIR$CONFIG"
    say_tls
    # Only settings and comments are compared: what is set here always differs.
    if same_but_key "$DESTDIR$CONFIG" "$HERE/$NAME.yaml"; then
        rm -f "$DESTDIR$CONFIG.new"
    else
        put 0600 "$HERE/$NAME.yaml" "$CONFIG.new"
        say "installed the new sample beside it: $DESTDIR$CONFIG.new"
    fi
}

# with_new_key: the sample with a key, and with --tls the certificate. The key comes near no
# command line, where every user of the host could read it.
with_new_key() {
    "$PYTHON" -Ic 'import secrets, sys
text = sys.stdin.read().replace("your-secret-api-key", secrets.token_hex(32))
for setting, path in zip(("tls_certificate", "tls_key"), sys.argv[1:]):
    text = text.replace(f"{setting}: \"\"", f"{setting}: \"{path}\"")
sys.stdout.write(text)' ${TLS:+"$TLS_CERTIFICATE" "$TLS_KEY"}
}

# say_tls: what a configuration that is kept needs for --tls.
say_tls() {
    [ -n "$TLS" ] || return 0
    ! grep -Eq "^ +tls_certificate: *([^ \"'#]|\"[^\"]|'[^'])" "$DESTDIR$CONFIG" || return 0
    say "for TLS, set these in it under server:, and run: systemctl reload $NAME"
    say "  tls_certificate: \"$TLS_CERTIFICATE\""
    say "  tls_key: \"$TLS_KEY\""
}

same_but_key() {
    set_here='s/^( *(api_key|tls_certificate|tls_key):).*/\1/'
    [ "$(sed -E "$set_here" "$1")" = "$(sed -E "$set_here" "$2")" ]
}

# rotated_by LOG: the file by which logrotate rotates a log already, other than ours.
rotated_by() {
    for file in "$DESTDIR/etc/logrotate.conf" "$DESTDIR${LOGROTATE%/*}"/*; do
        case $file in "$DESTDIR$LOGROTATE" | "$DESTDIR$LOGROTATE.tmp") continue ;; esac
        # Such copies logrotate passes over, too (its tabooext).
        case ${file##*/} in
        *,v | *~ | *.bak | *.cfsaved | *.disabled | *.swp | *.dpkg-* | *.rpm* | *.ucf-*) continue ;;
        esac
        [ -f "$file" ] || continue
        if rotated_paths "$file" | while read -r path; do
            # Unquoted, for the path may be a pattern, such as /var/log/autoscaleapi*.log.
            # shellcheck disable=SC2254
            case $1 in $path) echo yes ;; esac
        done | grep -q yes; then
            printf '%s\n' "$file"
            return
        fi
    done
}

# rotated_paths FILE: the paths that a logrotate file names, one a line, but for its scripts'.
rotated_paths() {
    scripts='(pre|post)rotate|(first|last)action|preremove'
    sed -E "/^[[:space:]]*#/d
        /^[[:space:]]*($scripts)/,/^[[:space:]]*endscript/d" "$1" |
        tr -s "[:space:]\"'{}" '\n' | grep '^/' || true
}

# changed_rotation SAMPLE: whether the administrator has changed how our file rotates, or named
# other logs there. Which of our own it names is up to us.
changed_rotation() {
    [ -e "$DESTDIR$LOGROTATE" ] || return 1
    [ "$(sed '0,/{/d' "$DESTDIR$LOGROTATE")" = "$(sed '0,/{/d' "$1")" ] || return 0
    rotated_paths "$DESTDIR$LOGROTATE" | grep -vxqF "$(printf '%s\n' "$LOGS" | tr ' ' '\n')"
}

# logrotate refuses a log that two files name, and then skips our file as a whole.
install_logrotate() {
    logs=""
    for log in $LOGS; do
        other=$(rotated_by "$log")
        if [ -z "$other" ]; then
            logs="$logs$log "
        else
            say "left the rotation of $log to $other, which names it already"
        fi
    done
    if [ -z "$logs" ]; then
        rm -f "$DESTDIR$LOGROTATE"
        return
    fi
    rotate=$(mktemp)
    cat >"$rotate" <<END
$logs{
    weekly
    rotate 8
    compress
    delaycompress
    missingok
    notifempty
}
END
    if changed_rotation "$rotate"; then
        say "kept $DESTDIR$LOGROTATE, which was changed"
    else
        put 0644 "$rotate" "$LOGROTATE"
        say "installed $DESTDIR$LOGROTATE"
    fi
    rm -f "$rotate"
}

# credential_line: where systemd takes the credential api_key from; its last word counts.
credential_line() {
    for folder in usr/lib run etc; do
        folder="$DESTDIR/$folder/systemd/system/$NAME.service"
        cat "$folder" "$folder.d"/*.conf 2>/dev/null || true
    done | sed -nE 's/^[[:space:]]+//; s/[[:space:]]*=[[:space:]]*/=/; s/[[:space:]]+$//
        /^((Load|Set)Credential(Encrypted)?=(api_key(:.*)?)?$|ImportCredential=)/p' | tail -n 1
}

# with_credential COMMAND...: run it with the credential that systemd would give the daemon. Of
# one that only systemd can open, a stand-in says that it is there.
with_credential() {
    line=$(credential_line)
    folder=$(mktemp -d)
    case $line in
    "" | *=) ;;
    LoadCredential=api_key:/*) ln -s "$DESTDIR${line#*:}" "$folder/api_key" ;;
    *) echo a-credential-that-systemd-opens >"$folder/api_key" ;;
    esac
    status=0
    CREDENTIALS_DIRECTORY=$folder "$@" || status=$?
    rm -rf "$folder"
    return "$status"
}

# The Flask service of lxc_autoscale_ml keeps its configuration at the same path, in other sections.
is_old_config() {
    grep -qsE '^["'\'']?(lxc|error_handling|gunicorn)["'\'']?[[:space:]]*:' "$DESTDIR$CONFIG"
}

refuse_config() {
    if [ -L "$DESTDIR$CONFIG" ] && [ ! -e "$DESTDIR$CONFIG" ]; then
        fail "nothing was changed; $DESTDIR$CONFIG is a link to a file that is not there now."
    fi
    is_old_config || return 0
    fail "nothing was changed; $DESTDIR$CONFIG is that of lxc_autoscale_ml's Flask service,\
 which has other settings. What to do:
  1. mv $DESTDIR$CONFIG $DESTDIR$CONFIG.flask
  2. run install.sh again, which installs a configuration of its own with a new key
  3. carry over host, port, limits and, if it has at least 16 characters, the key;\
 then: systemctl restart $NAME"
}

# The configuration that is there must suit the version that is about to be installed.
check_config() {
    set -- --version
    [ ! -e "$DESTDIR$CONFIG" ] || set -- --config "$DESTDIR$CONFIG" --check-config
    status=0
    said=$(with_credential "$PYTHON" -I "$HERE/$NAME.py" "$@" 2>&1 >/dev/null) || status=$?
    [ -z "$said" ] || printf '%s\n' "$said" >&2
    case $status in
    0) ;;
    78) fail "nothing was changed; mend the configuration and run install.sh again." ;;
    *)
        said=$(printf '%s\n' "$said" | tail -n 1)
        fail "nothing was changed; the new version cannot run here: ${said:-exit status $status}"
        ;;
    esac
}

restart_service() {
    "$SYSTEMCTL" daemon-reload
    "$SYSTEMCTL" enable --quiet $NAME.service
    "$SYSTEMCTL" restart $NAME.service
}

# health: print the URL that the configuration names, with what curl needs for it, and fail unless
# /health/check is 200. No certificate is verified: on this host nobody else can answer there.
health() {
    with_credential "$PYTHON" -IB - \
        "$DESTDIR${MODULE%/*}" "$DESTDIR$CONFIG" "$TLS_CERTIFICATE" "$TLS_CA" <<'END'
import sys, urllib.error, urllib.request
sys.path.append(sys.argv[1])            # there it has its bytecode
import lxc_autoscale_api as daemon
config = daemon.read_settings(sys.argv[2])
server = config.server
host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
scheme = "https" if config.tls else "http"
url = f"{scheme}://[{host}]:{server.port}" if ":" in host else f"{scheme}://{host}:{server.port}"
try:
    handlers = [urllib.request.HTTPSHandler(context=daemon.unverified())] if config.tls else []
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), *handlers)
    answer = opener.open(url + "/health/check", timeout=20)
except urllib.error.HTTPError as error:
    answer = error
except OSError:
    sys.exit(1)
trust = "--cacert " + sys.argv[4] if server.tls_certificate == sys.argv[3] else "-k"
print(f"{trust} {url}" if config.tls else url)
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

# say_key: the line by which a shell learns the key, from the daemon's own reader of its settings.
# While the service runs, its credential is where systemd put it.
say_key() {
    say "  KEY=\$(CREDENTIALS_DIRECTORY=$DESTDIR/run/credentials/$NAME.service" \
        "$PYTHON -IBc 'import sys; sys.path.append(\"$DESTDIR${MODULE%/*}\");" \
        "import $NAME as api; print(*api.read_settings(\"$DESTDIR$CONFIG\").keys[:1])')"
}

start_service() {
    if restart_service && wait_until_healthy; then
        say "enabled and started $NAME.service; it is healthy. Try:"
        say_key
        say "  curl -s -H \"X-API-Key: \$KEY\" $url/routes"
        return
    fi
    if ! was_installed; then
        drop_old
        fail "the service does not become healthy; see: journalctl -u $NAME"
    fi
    put_back
    restart_service || true
    if ! ours && [ -e "$DESTDIR$CONFIG.flask" ]; then
        say "the old service needs its configuration: mv $DESTDIR$CONFIG $DESTDIR$CONFIG.new &&" \
            "mv $DESTDIR$CONFIG.flask $DESTDIR$CONFIG && systemctl restart $NAME" >&2
    fi
    fail "the new version did not become healthy, and the old one was put back;\
 see: journalctl -u $NAME"
}

uninstall() {
    if ours; then
        [ -z "$SYSTEMCTL" ] || "$SYSTEMCTL" disable --now --quiet $NAME.service 2>/dev/null || true
        rm -f "$DESTDIR$UNIT"
    fi
    rm -f "$DESTDIR$MODULE" "$DESTDIR$LOGROTATE"
    drop_bytecode
    for file in $FILES; do
        rm -f "$DESTDIR$file.tmp" "$DESTDIR$file.old"
    done
    rm -rf "$DESTDIR$RUN_DIR"
    drop_old
    [ -z "$SYSTEMCTL" ] || "$SYSTEMCTL" daemon-reload 2>/dev/null || true
    say "removed $NAME"
}

purge() {
    rm -f "$DESTDIR$CONFIG.new" "$DESTDIR$CONFIG.tmp" "$DESTDIR$CREDENTIAL"
    rmdir "$DESTDIR$UNIT.d" 2>/dev/null || true
    if is_old_config; then              # then the logs, whose names are the same, are its own
        say "left $DESTDIR$CONFIG and the logs, which are those of lxc_autoscale_ml's Flask service"
        return
    fi
    rm -f "$DESTDIR$CONFIG"
    rmdir "$DESTDIR$CONFIG_DIR" 2>/dev/null || true
    purge_logs
    say "removed its configuration and logs"
}

# The three logs, and what logrotate makes of them: FILE.1, FILE-20241224, compressed or not.
purge_logs() {
    [ -d "$DESTDIR$LOG_DIR" ] || return 0
    rotated='(\.[0-9]+|-20[0-9]{6}([0-9]{2})?)(\.(gz|bz2|xz|zst))?'
    (cd "$DESTDIR$LOG_DIR" &&
        find . -maxdepth 1 \( -type f -o -type l \) -regextype posix-extended \
            -regex "\./autoscaleapi(_access|_error)?\.log($rotated)?" -delete)
}

main() {
    case "${1:-}" in
    "" | --tls)
        TLS=${1:-}
        require_host
        refuse_config
        check_config
        install_files
        install_config
        install_logrotate
        [ -z "$SYSTEMCTL" ] || start_service
        drop_old
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
        fail "unknown option '$1'; known: --tls, --uninstall, --purge"
        ;;
    esac
}

main "$@"
