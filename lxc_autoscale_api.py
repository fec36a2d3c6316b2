#!/usr/bin/env -S python3 -I
"""A REST API to scale, snapshot, clone and watch the LXC containers of a Proxmox VE host.

How a request travels. The file begins with what stands at the bottom of this drawing: what is
used comes before what uses it, but for what is handed over to be called later (a handler to
its Change, a Handler to the Server), and for two handlers that show the table they stand in:

    socket -> Server      a bounded number of connections, a thread each
           -> Handler     bytes, perhaps through Tls, to a strictly framed Request, in time
           -> Api         rate limit, key, row of ROUTES, parameters to values
           -> Changes     a change only: its containers' queues, a thread of its own, a Change
           -> a handler   a few lines an endpoint: a Change's steps, or what is asked of Proxmox
           -> Proxmox     the host: files under /etc/pve and /sys/fs/cgroup, pct, pvesh
           -> Commands    the one place that starts a process, here or by ssh on another node

and back as an Answer, in one write unless it is large. An error anywhere is a Problem, and
becomes an Answer in Problem.answer. The parts, in their order:

    values, logs              what travels, and the lines that tell of it
    settings, parameters      what the administrator and a client may write
    what Proxmox writes       configurations, states, members; what pct fails with
    reading                   files under /etc/pve and /proc, and cgroups
    waiting                   semaphore, threads, one answer for many, reads that may hang
    limits and metrics        who asks too often, and what Prometheus gets
    processes, the host       Commands, and Proxmox over them and the files
    changing                  Change: its steps, and what it leaves; Changes: in order
    endpoints, schemas        a function each, the table of ROUTES, OpenAPI
    Api, TLS, HTTP            from bytes to a row of the table and back
    the daemon                signals, reload, watchdog, main

Five words have one meaning each. A *container* is named by its id, `vm_id`, wherever in the
cluster it lives. A *node* is a host of the cluster; where a Node is expected, None stands for
this one. A *command* is a process that is run on a node, such as `pct set 104 --cores 4`. A
node has a few *slots* for commands: a read holds one for its command, a change one for all of
its own. A *change* is what one request wants to be changed; its steps are those of its commands
that were begun and may have changed something.

Nothing but Python's standard library (3.9 or later) is used. Facts about Proxmox VE are from
its sources, which are cited as (module, function): pve-container (PVE::LXC, PVE::API2::LXC),
pve-guest-common, pve-storage, pve-cluster, pve-manager and pve-common; and from runs of the real
pct and pmxcfs.
"""
import argparse
import atexit
import errno
import fcntl
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import resource
import select
import shlex
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque, namedtuple
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import copy
from email.utils import formatdate
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, SimpleQueue
from socketserver import TCPServer
from types import SimpleNamespace
from urllib.parse import parse_qsl, unquote

VERSION = "1.0.0"
CONFIG_PATH = "/etc/lxc_autoscale_ml/lxc_autoscale_api.yaml"
SAMPLE_KEY = "your-secret-api-key"
RUN_DIR = "/run/lxc_autoscale_api"           # of the sockets of SSH connections that commands share
TEMPORARY_SNAPSHOT = "autoscale_clone_"      # and eight hexadecimal digits
PROC = "/proc"                               # where the kernel tells how a node fares
PVECFG = "/usr/share/perl5/PVE/pvecfg.pm"    # where pve-manager has its version, for pvesh too

MAX_LINE = 8192             # bytes of a request line
MAX_HEAD = 32768            # bytes of a request line and its headers
MAX_BODY = 65536            # bytes of a body
MAX_QUERY = 100             # parameters in a query
LARGE = 65536               # bytes of an answer that is not copied to be sent
MAX_OUTPUT = 4 << 20        # bytes that are read of what a command prints
MAX_DETAILS = 4000          # characters of it that go into an answer
MAX_CLIENTS = 5000          # clients that the rate limiter tells apart
MAX_HOPS = 32               # of X-Forwarded-For, from its end, that are looked at
MAX_BACKLOG = 4 << 20       # characters of a log's lines that wait for its disk
MAX_IDLE = 16               # threads that wait for work
MAX_FLIGHTS = 256           # questions that are being answered at once
MAX_HUNG = 16               # reads that hang; while there are so many, no further one is begun
MAX_OPERATIONS = 1000       # changes that wait or run at once, and that are remembered
MAX_TURNS = 100             # of these for one container
MAX_SENDING = 32            # large answers that are on their way at once
SPARE_FILES = 128           # open files that connections leave to commands, logs and reading
MAX_SESSIONS = 8            # commands at once on another node (sshd's MaxSessions: 10 a connection)

REQUEST_SECONDS = 10        # for a whole request to arrive, and for an answer to leave
IDLE_SECONDS = 30           # between two requests on one connection
YIELD_SECONDS = 1           # after which a connection gives way to one of an address with as many
LINGER_SECONDS = 1          # for a refused client to take its answer
LOCK_SECONDS = 60           # waiting for another change to the same container
SLOT_SECONDS = 30           # waiting for a slot to run commands
RETRY_SECONDS = 30          # after which a client may ask again for what is not there now
FILE_SECONDS = 5            # for what may hang to be read: /etc/pve, a disk, the settings
KILL_SECONDS = 1            # for a command to end that was killed
WORKER_SECONDS = 5          # that an idle thread waits for work
PROBE_SECONDS = 10          # a health probe's result is kept
REACH_SECONDS = 4           # for another node to answer over SSH
BROADCAST_SECONDS = 60      # what nodes broadcast every 10 s is believed
LOOK_SECONDS = 0.5          # between two looks at who has left
HELD_SECONDS = 0.002        # for which all threads are held up that take connections, before more
COMPLAINT_SECONDS = 60      # between two lines about an address that holds too many connections
LOG_SECONDS = 0.5           # for a main or error log line to be written before its caller goes on
SLOW_SECONDS = 0.05         # for a write to a log; after a slower one nobody waits for that log
STOP_SECONDS = 30           # for requests in work to be answered when the daemon stops

MIB, GIB = 1 << 20, 1 << 30
EX_CONFIG = 78              # sysexits.h: configuration error

log = logging.getLogger("lxc_autoscale_api")


# Values

NOTHING_DONE, INCOMPLETE, RUNNING, UNKNOWN = "nothing_done", "incomplete", "running", "unknown"
CHANGING = ("POST", "DELETE")               # the methods of requests for a change


class Answer:
    """What a client gets: a status, a JSON value or text, headers."""

    def __init__(self, status, body, headers=None, content_type="application/json"):
        self.status, self.headers, self.content_type = status, headers or {}, content_type
        self.body = (body if isinstance(body, str) else json.dumps(body) + "\n").encode()

    def with_headers(self, headers):
        """Return the same answer with further headers; the body is shared, for it may be large."""
        other = copy(self)
        other.headers = {**self.headers, **headers}
        return other


def success(message, data=None):
    body = {"status": "success", "message": message}
    return Answer(200, body if data is None else dict(body, data=data))


class Problem(Exception):
    """An error with an HTTP status, a text, further JSON fields and headers."""

    def __init__(self, status, error, headers=None, **fields):
        super().__init__(error)
        self.status, self.error, self.headers, self.fields = status, error, headers or {}, fields

    def add_details(self, *texts):
        if texts:
            told = filter(None, [self.fields.get("details"), *texts])
            self.fields["details"] = "\n".join(told)

    def again(self):
        """Return a copy, to be kept, or to be raised for one more caller.

        The traceback of what was raised keeps alive all that its callers had at hand.
        """
        return Problem(self.status, self.error, self.headers, **self.fields)

    def answer(self, method=None):
        """Return the Answer; if the request's method is one of CHANGING, it says what was done.

        Nothing was, unless a Change has said so: it alone begins what changes something.
        """
        error, fields = self.error, self.fields
        if method in CHANGING and self.status not in (401, 429):        # whose bodies are fixed
            fields = {"outcome": NOTHING_DONE, **fields}
            if self.status == 503:
                error = f"Nothing was done: {error}"
        return Answer(self.status, {"status": "error", "error": error, **fields}, self.headers)


class NotBegun(Problem):
    """A command that was not begun: a 503, for its program, its node or memory is missing now."""


class Lost(Problem):
    """A command on another node whose end nobody knows, for the connection broke."""


def unavailable(error, seconds, kind=Problem):
    """Make a Problem 503: the client may try again after so many seconds."""
    return kind(503, error, {"Retry-After": str(seconds)})


def stopping():
    return unavailable("The daemon is stopping", RETRY_SECONDS)


def hanging():
    return unavailable("Proxmox's files (/etc/pve) do not answer; "
                       "see: systemctl status pve-cluster", RETRY_SECONDS)


def internal_error(error, **fields):
    return Problem(500, f"Internal error ({type(error).__name__}); the daemon's error log says "
                        "more", **fields)


class ClientLeft(Exception):
    """The client has left, or its connection was closed to make room for others."""


class Client:
    """Who is at the other end of a connection.

    `address` is whom it speaks for, `local` whether that is this host itself, `key` the
    fingerprint of the key that its request came with, if one was asked for. `waited_for`
    tells since when the daemon waits for it, to send a request or to take an answer (None:
    the daemon works for it), `asking` since when a request of it is being answered, if one
    is, `changing` whether that is a change that has begun. `gone` is done once it has left,
    or has lost its place to others.
    """

    def __init__(self, sock, address):
        self.sock, self.address, self.local, self.key = sock, address, False, None
        self.waited_for, self.asking, self.changing, self.gone = (
            time.monotonic(), None, False, Future())

    def wait(self, *futures, seconds=None):
        """Wait until one of some Futures is done; ClientLeft if the client leaves before that."""
        wait([*futures, self.gone], seconds, FIRST_COMPLETED)
        if self.gone.done() and not any(future.done() for future in futures):
            raise ClientLeft

    def let_go(self):
        if not self.gone.done():
            self.gone.set_result(None)


class Request(namedtuple("Request", "method path query headers length read_body client")):
    """A well-framed request.

    `headers` is {lower-case name: value}, `length` the Content-Length or None; the body is
    read only when `read_body()` is called.
    """

    def words(self, header):
        """Return the words of a header that is a list of them, such as Connection or Prefer.

        What stands in quotes is a value of one of them.
        """
        unquoted = "".join(self.headers.get(header, "").split('"')[::2])
        return {each.partition(";")[0].strip().lower() for each in unquoted.split(",")}


# Both write a whole epoch second: utc as ISO 8601, http_date as the Date header has it. The texts
# are kept, for mostly the same second is asked for again.
utc = lru_cache(maxsize=64)(
    lambda second: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second)))
http_date = lru_cache(maxsize=2)(partial(formatdate, usegmt=True))


def number(value, digits=19):
    """Return the int that a text of at most so many digits is, or None."""
    known = value and len(value) <= digits and value.isascii() and value.isdigit()
    return int(value) if known else None


def decimal(value):
    """Return the number that a text is, such as "4" (int) or "1.5" (float), or None."""
    if not value or not re.fullmatch(r"[0-9]{1,19}(?:\.[0-9]{1,19})?", value):
        return None
    return float(value) if "." in value else int(value)


def are_numbers(values):
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):      # an integer that no float can hold overflows
        return False


def in_unit(value, unit):
    """Express bytes in MIB or GIB, with at most two decimals; None stays None."""
    if value is None:
        return None
    rounded = round(value / unit, 2)
    return int(rounded) if rounded == int(rounded) else rounded


# Logs

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def complain(text):
    with suppress(OSError):                 # all in one write, for threads complain at once
        print(text + "\n", end="", file=sys.stderr, flush=True)


def open_again(file):
    """Open a log's file, if it is not open or was moved away."""
    if file.fd is not None:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(file.path), os.fstat(file.fd)):
                return
        old, file.fd = file.fd, None        # closed, even if that tells of an error
        os.close(old)
    file.fd = os.open(
        file.path,
        os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o600)


class LogFile(logging.Handler):
    """A log, whose lines a thread of its own writes to a file that logrotate may move away.

    A disk that hangs, or is slow or full, costs lines and nothing else: MAX_BACKLOG characters of
    them wait, further lines are counted, and nobody who logs waits longer than LOG_SECONDS for
    them, once. A record's `patience` may be less: where many are logged one after another, or
    while others wait.
    """

    def __init__(self, gather=0):
        super().__init__()
        self.gather = gather                # seconds in which lines gather before they are written
        self.path = self.thread = None
        self.keys, self.lines, self.backlog, self.lost = [], deque(), 0, 0
        self.changed, self.added, self.written = threading.Condition(), 0, 0
        self.hangs = self.broken = False
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))

    def point(self, path, keys, level=logging.NOTSET):
        """Write to this path from now on, and blot these keys out."""
        self.keys = keys
        self.setLevel(level)
        if path == self.path:
            return
        writer = threading.Thread(target=self.write_lines, args=(path,), name="log", daemon=True)
        # The thread of another path may hang, and ends by itself.
        with self.changed:
            try:
                writer.start()
            except RuntimeError:
                complain(f"{path} cannot be written: no thread is left; going on as before")
                return
            self.path, self.thread, self.hangs = path, writer, False
            self.written = self.added - len(self.lines)     # nobody waits for the other's lines
            self.changed.notify_all()

    def handle(self, record):               # without logging's own lock, under which all would wait
        self.add(self.format(record), getattr(record, "patience", LOG_SECONDS))

    def add(self, line, patience=0):
        """Add a line; with patience, wait so many seconds until it is written."""
        if not self.path:
            return
        line = f"{utc(int(time.time()))} {line}"
        with self.changed:
            if self.backlog + len(line) > MAX_BACKLOG:
                self.lost += 1
                return
            self.lines.append(line)
            self.backlog += len(line)
            self.added += 1
            number = self.added
            if len(self.lines) == 1:        # else it knows already, and each call would wake it
                self.changed.notify_all()
            if patience and not self.hangs and not self.changed.wait_for(
                    lambda: self.written >= number, patience):
                self.hangs = True

    def flush(self):
        """Let the lines that wait be written now, and wait for that for LOG_SECONDS at most."""
        with self.changed:
            self.gather = 0
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.written >= self.added, LOG_SECONDS)

    def write_lines(self, path):
        """Write lines to the file at a path until another one is wanted."""
        file = SimpleNamespace(path=path, fd=None, torn=False)
        self.write(file, [])                # a file that cannot be opened is said at once
        me = threading.current_thread()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.lines or self.thread is not me)
                self.changed.wait_for(lambda: not self.gather or self.thread is not me, self.gather)
                if self.thread is not me:
                    break
                lines, lost = list(self.lines), self.lost
                self.lines.clear()
                self.backlog = self.lost = 0
            notice = ([f"{utc(int(time.time()))} WARNING {lost} lines before this one were lost"]
                      if lost else [])
            started = time.monotonic()
            unwritten = self.write(file, lines + notice)
            with self.changed:
                if unwritten:               # the notice, too, so what it tells of is lost again
                    self.lost += unwritten + lost - len(notice)
                if self.thread is me:
                    self.written += len(lines)
                    self.hangs = time.monotonic() - started > SLOW_SECONDS
                self.changed.notify_all()
        if file.fd is not None:
            os.close(file.fd)

    def write(self, file, lines):
        """Write lines, and return how many were lost; that this cannot be done is said once.

        Nothing in them forges a line or an escape, and no key appears.
        """
        lines = [UNSAFE.sub(lambda bad: ascii(bad[0])[1:-1], line) for line in lines]
        text = "".join(line + "\n" for line in lines)
        for key in self.keys:
            text = text.replace(key, "[API key]")
        data, done = b"\n" * file.torn + text.encode("utf-8", "replace"), 0
        try:
            open_again(file)
            while done < len(data):
                done += os.write(file.fd, data[done:])
            self.broken = False
        except OSError as error:
            if not self.broken:
                what = "opened" if file.fd is None else "written"
                complain(f"{file.path} cannot be {what}: {error.strerror}; going on without it")
            self.broken = True
        whole = data[:done].count(b"\n") - (file.torn and done > 0)
        if done:
            file.torn = data[done - 1:done] != b"\n"
        return len(lines) - whole


main_log, error_log, access_log = LogFile(), LogFile(), LogFile(gather=0.05)
UNWAITED = {"patience": 0}                  # as `extra`: who logs this goes on at once


def point_logs(config):
    """Let the logs go to the files that the settings name, from now on."""
    settings, keys = config.logging, config.keys + config.read_only_keys
    main_log.point(settings.log_file, keys, settings.log_level)
    error_log.point(settings.error_log, keys, "WARNING")
    access_log.point(settings.access_log, keys)
    log.handlers, log.propagate = [main_log, error_log], False
    log.setLevel(min(logging.getLevelName(settings.log_level), logging.WARNING))


# Settings: a YAML subset, a table, the loader

class ConfigError(Exception):
    """What is wrong in a configuration file, and in which line (0: in the file as a whole).

    `others` are further ConfigErrors of the same file. `code` is the exit status of the start
    that it stops: EX_CONFIG, after which systemd does not try again, or 1 if the fault may pass
    by itself.
    """

    def __init__(self, line, text, others=(), code=EX_CONFIG):
        super().__init__(text)
        self.line, self.text, self.others, self.code = line, text, others, code


# A scalar, and one in a list in brackets, whose plain form ends at the marks of such a list.
YAML_TOKEN, YAML_ITEM = (re.compile(rf"""
      "(?P<double>(?:[^"\\]|\\.)*)"
    | '(?P<single>(?:[^']|'')*)'
    | (?P<plain>(?:[^\s\-?:,\[\]{{}}#&*!|>'"%@`]|[{lead}-](?=\S))
                (?:[^\s:#{marks}]|:(?=\S)|(?<=\S)\#|[ ]+(?=[^\s#]))*)
""", re.VERBOSE) for lead, marks in (("?:", ""), (":", r",\[\]{}?")))
YAML_GAP, YAML_COMMENT = re.compile(" *"), re.compile(" +(?:#|$)")
YAML_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
YAML_ESCAPES = dict(zip('0abtnvfre "/\\N_LP', '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029'))
YAML_UNREADABLE = re.compile(
    "[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd"
    "\U00010000-\U0010ffff]")
YAML_WORDS = {word: value for words, value in (
    ("~ null Null NULL", None), ("true True TRUE yes Yes YES on On ON", True),
    ("false False FALSE no No NO off Off OFF", False)) for word in words.split()}
YAML_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
YAML_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?")
# What YAML 1.1 takes for a number, a date or a merge as well.
YAML_EXOTIC = re.compile(
    r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+"
    r"|[1-9][0-9_]*(?::[0-5]?[0-9])*|[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*"
    r"|[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.[0-9_]+(?:[eE][-+][0-9]+)?|\.(?:nan|NaN|NAN)"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}.*|<<|=")


def yaml_escape(escape, line):
    code = escape[1] or escape[2] or escape[3]
    if code and not 0xD800 <= int(code, 16) <= 0xDFFF and int(code, 16) <= 0x10FFFF:
        return chr(int(code, 16))
    if escape[4] in YAML_ESCAPES:
        return YAML_ESCAPES[escape[4]]
    raise ConfigError(line, "an escape that YAML does not know; write a backslash twice")


def yaml_scalar(text, at, line, token):
    """Read the scalar that begins at a place in `text`; return (value, where it ends)."""
    match = token.match(text, at)
    if not match:
        raise ConfigError(line, "not taken: anchors, tags, mappings in braces, nested lists, "
                                "values on several lines, or a text that needs quotes")
    if match["double"] is not None:
        value = YAML_ESCAPE.sub(lambda escape: yaml_escape(escape, line), match["double"])
        return value, match.end()
    if match["single"] is not None:
        return match["single"].replace("''", "'"), match.end()
    plain = match["plain"]
    if token is YAML_ITEM:
        plain = plain.rstrip(" ")
        if plain[0] == ":" or plain.endswith(":"):
            raise ConfigError(line, "a list in brackets holds scalars, separated by commas")
    end = at + len(plain)
    if YAML_INTEGER.fullmatch(plain) and len(plain) < 20:
        return int(plain), end
    if YAML_FLOAT.fullmatch(plain):
        return float(plain), end
    if YAML_EXOTIC.fullmatch(plain):
        raise ConfigError(line, "YAML reads this as an unusual number, a date or a merge; "
                                "put it in quotes if it is text")
    return YAML_WORDS.get(plain, plain), end


def yaml_list(text, line):
    """Read the list in brackets at the start of `text`; return (its values, where it ends)."""
    values, at = [], YAML_GAP.match(text, 1).end()
    while not text.startswith("]", at):
        value, at = yaml_scalar(text, at, line, YAML_ITEM)
        values.append(value)
        at = YAML_GAP.match(text, at).end()
        if text.startswith(",", at):
            at = YAML_GAP.match(text, at + 1).end()
        elif not text.startswith("]", at):
            raise ConfigError(line, "a list in brackets must end, with ']', in its line")
    return values, at + 1


def yaml_value(text, line, flow_list=True):
    """Read what stands behind 'key:' or '-': a scalar, or a list of scalars in brackets."""
    if text.startswith("#") or not text:
        return None
    if text[0] == "[" and flow_list:
        value, end = yaml_list(text, line)
    else:
        value, end = yaml_scalar(text, 0, line, YAML_TOKEN)
    if end < len(text) and not YAML_COMMENT.match(text, end):
        raise ConfigError(line, "unexpected text behind the value "
                                "(a quoted text ends at its quote; "
                                "'#' needs a space before it; ': ' needs quotes)")
    return value


def yaml_key(content, line):
    """Split 'key: rest' into (key, 'rest')."""
    match = re.match(
        r"""([A-Za-z_][\w.-]*|"[^"\\]{1,99}"|'[^']{1,99}') *:(?= |$)""", content, re.ASCII)
    if not match:
        raise ConfigError(line, "expected 'key: value' "
                                "(a key is a word, with a space after its colon)")
    key = match[1][1:-1] if match[1][0] in "\"'" else match[1]
    if key == match[1] and key in YAML_WORDS:
        raise ConfigError(line, "this key is a YAML boolean or null; put it in quotes")
    return key, content[match.end():].strip(" ")


def load_yaml(text):
    """Read a YAML document; return (its value, {path: line}).

    A path is a tuple of keys and of places in lists.

    Taken: nested mappings, block and flow lists of scalars, plain and quoted scalars on
    one line, comments. What is taken is read as YAML 1.1 (PyYAML's safe_load) reads it;
    everything else raises ConfigError with its line.
    """
    text = re.sub(r"\r\n?", "\n", text[1:] if text.startswith("\ufeff") else text)
    unreadable = YAML_UNREADABLE.search(
        re.sub(r"(?m)^[ \t]*#.*", lambda m: m[0].replace("\t", " "), text))
    if unreadable:
        what = ("a tab is not taken here; use spaces" if unreadable[0] == "\t"
                else "a control character is not taken here")
        raise ConfigError(text.count("\n", 0, unreadable.start()) + 1, what)
    document, where, marked = {}, {}, False
    levels = []                             # (indentation, dict or list, path) of what is open
    hole = (-1, document, None, ())         # the key that still waits for its value
    for number, line in enumerate(text.split("\n"), 1):
        content = line.strip(" ")
        indent = len(line) - len(line.lstrip(" "))
        if not content or content.startswith("#"):
            continue
        if re.fullmatch(r"---(?: +#.*)?", line.rstrip(" ")) and not where and not levels:
            if marked:
                raise ConfigError(number, "only one document is taken")
            marked = True
            continue
        if line.startswith(("---", "...", "%")) and re.match(r"(?:---|\.\.\.)(?: |$)|%", line):
            raise ConfigError(number, "document marks are taken as a first line only")
        item = content == "-" or content.startswith("- ")
        if hole and (indent > hole[0] or
                     (item and indent == hole[0] and isinstance(hole[1], dict))):
            holder = [] if item else {}
            hole[1][hole[2]] = holder
            levels.append((indent, holder, hole[3]))
            if len(levels) > 20:
                raise ConfigError(number, "nested too deeply")
        hole = None
        while levels and (levels[-1][0] > indent or
                          (levels[-1][0] == indent and not item
                           and isinstance(levels[-1][1], list))):
            levels.pop()
        if not levels or levels[-1][0] != indent:
            raise ConfigError(number, "the indentation fits no line above "
                                      "(values on several lines are not taken)")
        _, holder, path = levels[-1]
        if item != isinstance(holder, list):
            raise ConfigError(
                number, "a list item among keys" if item else "a key among list items")
        if item:
            where[path + (len(holder),)] = number
            holder.append(yaml_value(content[1:].strip(" "), number, flow_list=False))
            continue
        key, rest = yaml_key(content, number)
        if key in holder:
            raise ConfigError(number, f"the key '{key}' is there twice")
        where[path + (key,)] = number
        holder[key] = yaml_value(rest, number)
        if re.fullmatch(r"(?:#.*)?", rest):
            hole = (indent, holder, key, path + (key,))
    return document.get(None), where


def integer(low, high):
    def check(value):
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"must be an integer between {low} and {high}")
        return value
    return check


def cluster_mode(value):
    """Tell whether to look beyond this node; YAML reads a bare `off` as false."""
    if value is not False and value not in ("auto", "off"):
        raise ValueError("must be auto or off")
    return value == "auto"


def boolean(value):
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def string(value):
    if not isinstance(value, str):
        raise ValueError("must be text (put it in quotes)")
    return value


def absolute_path(value):
    if not string(value).startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path")
    return value


def path_or_empty(value):
    return absolute_path(value) if value != "" else ""


def address(value):
    try:
        return str(ipaddress.ip_address(string(value)))
    except ValueError:
        raise ValueError('must be an IP address, such as "0.0.0.0", "127.0.0.1" or "::"') from None


def listed(value):
    if not isinstance(value, list):
        raise ValueError("must be a list")
    return value


def network(text):
    """Read a network; an IPv4-mapped one as IPv4, as connections' addresses are."""
    found = ipaddress.ip_network(string(text), strict=False)
    mapped = getattr(found.network_address, "ipv4_mapped", None)        # of /96 or longer only
    return ipaddress.ip_network((mapped, found.prefixlen - 96)) if mapped else found


def networks(value):
    try:
        return tuple(map(network, listed(value)))
    except ValueError:
        raise ValueError("must be a list of IP addresses or networks, "
                         'such as ["127.0.0.1", "::1"]') from None


def api_key(value):
    """Check a key, which never becomes part of a message."""
    if string(value) == SAMPLE_KEY:
        raise ValueError("is still the sample value; set a key of your own, "
                         "such as from: openssl rand -hex 32")
    if value and not re.fullmatch(r"[!-~]{16,}", value):
        raise ValueError("must be at least 16 visible ASCII characters without spaces, "
                         "such as from: openssl rand -hex 32")
    return value


def api_keys(value):
    if "" in listed(value):
        raise ValueError("must hold no empty key")
    return [api_key(each) for each in value]


def metrics_access(value):
    if value not in ("open", "key"):
        raise ValueError("must be open or key")
    return value


def container_ids(value):
    if not all(type(each) is int and 100 <= each <= 999999 for each in listed(value)):
        raise ValueError("must be a list of container ids, such as [100, 101]")
    return frozenset(value)


def log_level(value):
    if string(value).upper() not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ValueError("must be DEBUG, INFO, WARNING, ERROR or CRITICAL")
    return value.upper()


SETTINGS = {                                # section -> key -> (default, check)
    "server": {
        "host": ("0.0.0.0", address),
        "port": (5000, integer(1, 65535)),
        "tls_certificate": ("", path_or_empty),
        "tls_key": ("", path_or_empty),
        "trusted_proxies": (["127.0.0.1", "::1"], networks),
        "max_connections": (256, integer(1, 10000)),
    },
    "authentication": {
        "enabled": (True, boolean),
        "api_key": ("", api_key),
        "api_keys": ([], api_keys),
        "read_only_keys": ([], api_keys),
        "metrics": ("open", metrics_access),
    },
    "rate_limiting": {
        "enabled": (True, boolean),
        "max_requests_per_minute": (120, integer(1, 100000)),
        "time_window_seconds": (60, integer(1, 86400)),
    },
    "logging": {
        "log_level": ("INFO", log_level),
        "log_file": ("/var/log/autoscaleapi.log", absolute_path),
        "access_log": ("/var/log/autoscaleapi_access.log", absolute_path),
        "error_log": ("/var/log/autoscaleapi_error.log", absolute_path),
    },
    "containers": {
        "protected": ([], container_ids),
        "allowed": ([], container_ids),
        "max_cores": (128, integer(1, 128)),
        "max_memory_mb": (1048576, integer(64, 1048576)),
    },
    "proxmox": {
        "pve_dir": ("/etc/pve", absolute_path),
        "cgroup_dir": ("/sys/fs/cgroup", absolute_path),
        "cluster": ("auto", cluster_mode),
        "max_commands": (0, integer(0, 1000)),
        "read_timeout_seconds": (15, integer(1, 86400)),
        "change_timeout_seconds": (60, integer(1, 86400)),
        "long_change_timeout_seconds": (3600, integer(1, 86400)),
    },
}


def unknown_keys(given, known, where, path):
    """Return ConfigErrors for the keys of a mapping that are not among the known ones."""
    return [ConfigError(where[path + (key,)], f"unknown key '{'.'.join(path + (key,))}'; "
                                              f"known here: {', '.join(known)}")
            for key in given if key not in known]


def read_section(section, given, where):
    """Check a file's section; return (its values, None for a wrong one; its ConfigErrors)."""
    settings, values = SETTINGS[section], SimpleNamespace()
    given = {} if given is None else given
    if not isinstance(given, dict):
        fault = ConfigError(where[(section,)], f"{section} must hold: " + ", ".join(settings))
        return SimpleNamespace(**dict.fromkeys(settings)), [fault]
    faults = unknown_keys(given, settings, where, (section,))
    for key, (default, check) in settings.items():
        try:
            setattr(values, key, check(given.get(key, default)))
        except ValueError as error:
            setattr(values, key, None)
            faults.append(ConfigError(where[section, key], f"{section}.{key} {error}"))
    return values, faults


def keys_in_force(login, credential, where):
    """Return (the valid API keys, those that may only read) of the `authentication` section.

    What is wrong with them raises ConfigError. Of a section in which something is wrong already
    (None) nothing more is said.
    """
    if None in (login.enabled, login.api_key, login.api_keys, login.read_only_keys):
        return [], []
    keys = [key for key in [login.api_key, *login.api_keys] if key]
    if credential and not keys:
        try:
            keys = [api_key(credential)]
        except ValueError as error:
            raise ConfigError(1, f"no key here, and the credential api_key {error}") from None
    if login.enabled and not keys:
        line = where.get(("authentication", "api_key")) or where.get(("authentication",)) or 1
        raise ConfigError(line, "authentication.api_key is missing, and no credential api_key was "
                                "passed; set one, such as from: openssl rand -hex 32")
    readers = login.read_only_keys
    if set(readers) & set(keys):
        raise ConfigError(where["authentication", "read_only_keys"],
                          "authentication.read_only_keys holds a key that "
                          "is also one that may change containers")
    return keys, readers


def load_settings(document, credential=None):
    """Turn a file's text into a namespace of sections, or raise ConfigError.

    That tells all that is wrong with keys and values, or the first thing that is no YAML.

    Beside the settings the namespace has `keys`, the API keys that are in force,
    `read_only_keys`, those that may only read, and `where`, {(section, key): line}; `tls` and
    `tls_ends` are None until read_tls has read the files. `credential` is the key that counts if
    the text has none that may change containers.
    """
    tree, where = load_yaml(document)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(1, "expected sections: " + ", ".join(SETTINGS))
    config = SimpleNamespace(where=where, tls=None, tls_ends=None)
    faults = unknown_keys(tree, SETTINGS, where, ())
    for section in SETTINGS:
        values, wrong = read_section(section, tree.get(section), where)
        setattr(config, section, values)
        faults += wrong
    try:
        config.keys, config.read_only_keys = keys_in_force(config.authentication, credential, where)
    except ConfigError as error:
        faults.append(error)
    if bool(config.server.tls_certificate) != bool(config.server.tls_key):
        given, missing = (
            ("certificate", "key") if config.server.tls_certificate else ("key", "certificate"))
        faults.append(ConfigError(where["server", f"tls_{given}"],
                                  f"server.tls_{given} needs server.tls_{missing} beside it"))
    if faults:
        first, *others = sorted(faults, key=lambda fault: fault.line)
        raise ConfigError(first.line, first.text, others)
    if not config.proxmox.max_commands:
        config.proxmox.max_commands = max(4, 2 * (os.cpu_count() or 1))
    return config


# Parameters

REQUIRED = object()                         # instead of a default


def is_interface_address(text):
    """Tell whether a text is `dhcp`, or an address with a prefix length that Proxmox takes.

    (PVE::JSONSchema, pve_verify_cidrv4 and pve_verify_cidrv6.)
    """
    if text == "dhcp":
        return True
    try:
        return bool(re.fullmatch(r"[0-9A-Fa-f:.]{2,45}/[0-9]{1,3}", text)
                    and ipaddress.ip_interface(text).network.prefixlen > 7)
    except ValueError:
        return False


def is_description(text):
    return len(text) <= 1024 and not re.search(
        r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", text)


class Parameter(namedtuple(
        "Parameter", "name kinds test rule schema default also note", defaults=[""])):
    """What a client may send under a name, or under one of the names in `also`.

    A value is taken if its type is one of `kinds` and test(value) agrees; `rule` says that in
    words, and `schema` as JSON Schema. Where nothing is sent it is `default`, unless that is
    REQUIRED. A `note` tells the unit, or what happens without it.
    """


def number_parameter(name, low, high, default=REQUIRED, also=(), note=""):
    return Parameter(
        name, (int,), range(low, high + 1).__contains__,
        f"must be an integer between {low} and {high}",
        {"type": "integer", "minimum": low, "maximum": high}, default, also, note)


def text_parameter(name, test, rule, default=None, also=(), **schema):
    return Parameter(name, (str,), test, rule, {"type": "string", **schema}, default, also)


def matches(pattern):
    return re.compile(pattern).fullmatch


def name_parameter(name, longest):
    """Take letters, digits, _ and -, in a form that no command takes for an option."""
    first, more = "[A-Za-z0-9_]", r"[A-Za-z0-9_\-]"
    return text_parameter(
        name, matches(f"{first}{more}{{0,{longest - 1}}}"),
        f"must be 1 to {longest} letters, digits or _ - (ASCII), and must not start with -",
        REQUIRED, pattern=f"^{first}{more}*$", minLength=1, maxLength=longest)


def flag_parameter(name, note):
    return Parameter(name, (bool,), lambda _: True, "must be true or false (a JSON boolean)",
                     {"type": "boolean"}, None, (), note)


VM_ID = number_parameter("vm_id", 100, 999999, also=("lxc_id", "container_id"))
ANY_VM_ID = VM_ID._replace(default=None)
NEW_VM_ID = number_parameter("new_vm_id", 100, 999999, also=("new_lxc_id",))
# A part of a name between dots; with - for each _, Proxmox takes it (PVE::JSONSchema, dns-name).
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_\-]*[A-Za-z0-9])?"
NEW_VM_NAME = text_parameter(
    "new_vm_name", matches(rf"(?=.{{1,63}}\Z){LABEL}(?:\.{LABEL})*"),
    "must be 1 to 63 letters, digits or _ . - (ASCII), of which each part between dots begins "
    "and ends with a letter or digit", REQUIRED, also=("new_lxc_name", "hostname"),
    pattern=rf"^{LABEL}(?:\.{LABEL})*$", minLength=1, maxLength=63)
CORES = number_parameter("cores", 1, 128)
MEMORY = number_parameter("memory", 64, 1048576, note="in MB")
# ext4's default bound, in GB: beyond it the volume grows, and its file system breaks.
DISK_SIZE = number_parameter("disk_size", 1, 16384, note="in GB, by which the disk grows")
SNAPSHOT_NAME = name_parameter("snapshot_name", 100)
NODE_NAME = name_parameter("node_name", 50)
START = flag_parameter(
    "start", "without it, the clone is started unless its static address would be there twice")
FULL = flag_parameter("full", "without it, a template is cloned linked, and all else in full")
STORAGE = text_parameter(
    "storage", matches(r"[A-Za-z][A-Za-z0-9._-]{1,99}"),
    "must be a storage id: a letter, then letters, digits, - _ or . (ASCII), 2 to 100 characters",
    pattern="^[A-Za-z][A-Za-z0-9._\\-]{1,99}$")
IP = text_parameter(
    "ip", is_interface_address,
    "must be dhcp, or an address with its prefix length (8 or more), such as 192.0.2.5/24")
DISK = text_parameter(
    "disk", matches(r"rootfs|mp(?:[0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"),
    "must be rootfs, or mp0 to mp255", "rootfs", pattern="^(rootfs|mp[0-9]{1,3})$")
CURRENT_SIZE = Parameter(
    "current_size", (int, float), lambda size: 0 <= size < 2 ** 53,
    "must be a number of GB, as the container's configuration tells it",
    {"type": "number", "minimum": 0}, None, ())
TIMEOUT = number_parameter("timeout", 1, 3600, default=60, note="in seconds")
DESCRIPTION = text_parameter(
    "description", is_description,
    "must be at most 1024 characters, without control characters but line ends", maxLength=1024)
OPERATION = text_parameter(
    "id", matches("[0-9A-Fa-f]{16}"), "must be 16 hexadecimal digits",
    pattern="^[0-9A-Fa-f]{16}$")


def parse_parameters(parameters, pairs):
    """Turn the (name, value) pairs that a client sent into {name: value} for all `parameters`.

    Each spelling of a name is taken, even several together if they say the same. A number may
    come as a string of ASCII digits, too.
    """
    spellings = {name: each for each in parameters for name in (each.name, *each.also)}
    values, seen = {}, {}
    for name, value in pairs:
        if name not in spellings:
            shown = f" '{name}'" if re.fullmatch(r"[A-Za-z_]{1,32}", name) else ""
            takes = ", ".join(spellings) or "none"
            raise Problem(400, f"Unknown parameter{shown}; this endpoint takes: {takes}")
        if name in seen:
            raise Problem(400, f"Invalid {name}: must be given once")
        parameter = seen[name] = spellings[name]
        if isinstance(value, str) and str not in parameter.kinds:
            value = decimal(value)
        if type(value) not in parameter.kinds or not parameter.test(value):
            raise Problem(400, f"Invalid {name}: {parameter.rule}")
        if values.setdefault(parameter.name, value) != value:
            other = next(before for before in seen if seen[before] is parameter)
            raise Problem(400, f"Invalid {name}: {other} and {name} must not differ")
    for parameter in parameters:
        if parameter.name not in values and parameter.default is REQUIRED:
            raise Problem(400, f"Missing {parameter.name}: {parameter.rule}")
        values.setdefault(parameter.name, parameter.default)
    return values


def parse_query(query):
    """Split a query into (name, value) pairs; Problem 400 for bad escapes or UTF-8, or too many."""
    try:
        if re.search(r"%(?![0-9A-Fa-f]{2})", query):
            raise ValueError("a % that is not followed by two hexadecimal digits")
        return parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY)
    except UnicodeDecodeError:
        why = "not percent-encoded UTF-8"
    except ValueError as error:
        why = str(error)
    raise Problem(400, f"Invalid query: {why}")


# Makes a reader of JSON that others wrote. An integer of more than 20 characters becomes None:
# int() takes time in the square of its digits.
json_decoder = partial(
    json.JSONDecoder, parse_int=lambda digits: int(digits) if len(digits) <= 20 else None)
JSON = json_decoder()
NOT_JSON = (ValueError, RecursionError)     # what its decode() raises; the latter if too deep


# What Proxmox and the kernel write

class Conf(namedtuple("Conf", "values current snapshots")):
    """A container's configuration.

    `values` is {key: text} with pending changes applied, `current` the same without them,
    `snapshots` {name: {key: text}}.
    """


CONF_NAME = re.compile(r"[1-9][0-9]{2,8}\.conf")
CONF_KEY = re.compile(r"[a-z][a-z_]*\d*")


def parse_config(document):
    """Read the text of `pct config` or of /etc/pve/lxc/ID.conf as a Conf.

    Pending changes are applied, as `pct config` shows them. The `#` lines of a section are its
    description, %-encoded, which may also stand there as a key, as older versions wrote it
    (PVE::LXC::Config, parse_pct_config).
    """
    current, pending, snapshots = {}, {}, {}
    section = current
    for line in document.split("\n"):
        key, colon, value = line.partition(":")
        if line.startswith("#") or (key == "description" and value.strip()):
            described = line[1:] if line.startswith("#") else value.strip()
            section.setdefault("#", []).append(unquote(described))
        elif colon and CONF_KEY.fullmatch(key) and value:
            section[key] = value.lstrip(" \t").rstrip()
        elif line.startswith("["):
            name = line.strip("[] \t\r")
            section = (pending if name.lower() == "pve:pending"
                       else {} if ":" in name
                       else snapshots.setdefault(name, {}))
    for each in (current, pending, *snapshots.values()):
        if "#" in each:
            each["description"] = "\n".join(each.pop("#"))
    deleted = {key.lstrip("!") for key in re.split(r"[\s,;]+", pending.pop("delete", ""))}
    values = {key: value for key, value in {**current, **pending}.items() if key not in deleted}
    return Conf(values, current, snapshots)


def container_name(vm_id, values):
    """Return a container's name as `pct list` shows it."""
    return values.get("hostname") or f"CT{vm_id}"


def allotted(values):
    """Return a container's cores (None for no limit), memory and swap in MB from its {key: text}.

    What is left out has the default by which `pct` reckons (PVE::LXC, vmstatus). What has a
    form that Proxmox does not write is None.
    """
    memory, swap = (values.get(key) or "0" for key in ("memory", "swap"))
    memory = "512" if memory == "0" else memory
    return number(values.get("cores")) or None, number(memory), number(swap)


def processors(values):
    """Return how many processors a container may use: cores, cpulimit, or all of this host's.

    0 is no limit; None stands for a form that Proxmox does not write.
    """
    cores, limit = (values.get(key) or "0" for key in ("cores", "cpulimit"))
    if cores != "0":
        return number(cores)
    limit = decimal(limit)
    return os.cpu_count() if limit == 0 else limit


def is_true(value):
    """Tell whether Proxmox takes a boolean for true (PVE::LXC::Config, check_type)."""
    return str(value).lower() in ("1", "on", "yes", "true")


def marks(values):
    """Return (lock or None, template, tags) from {key: text}, or from what `pct` tells.

    What is not there has Proxmox's default. Tags may be separated by what PVE::ParseUtils,
    split_list, takes.
    """
    tags = re.split(r"[,;\s\0]+", values["tags"]) if values.get("tags") else []
    return values.get("lock") or None, is_true(values.get("template")), list(filter(None, tags))


PRESSURES = ("cpu", "memory", "io")        # what something may wait for
STATUS_NUMBERS = frozenset((
    "cpus", "disk", "diskread", "diskwrite", "maxdisk", "maxmem", "maxswap", "mem", "netin",
    "netout", "pid", "swap", "uptime", "vmid", *(f"pressure{name}some" for name in PRESSURES)))


def parse_status(document):
    """Read `pct status ID --verbose` as {key: text}, or of STATUS_NUMBERS {key: number or None}.

    A name, a lock or a tag is text though it looks like a number.
    """
    values = {}
    for line in document.split("\n"):
        key, colon, value = line.partition(": ")
        if colon:
            values[key] = decimal(value.strip()) if key in STATUS_NUMBERS else value.strip()
    return values


class Node(namedtuple("Node", "name local online address known_hosts", defaults=[None])):
    """A Proxmox VE host of a cluster; `address` is an IP address, or None where nobody knows it.

    `known_hosts` is the path of the file with its SSH key, or None: before VE 8.2, and until
    ClusterFiles.with_known_hosts has looked.
    """


def on(node):
    """Return what a text says of where something is to be run: nothing for this node (None)."""
    return f" on node '{node.name}'" if node else ""


class Cluster(namedtuple("Cluster", "name quorate nodes")):
    """A cluster as this node sees it; `nodes` is {name: Node}, this one among them."""


def incomprehensible(name):
    """Make the Problem 503 for a file that is half or garbled.

    Such a file must not be taken for a host without cluster, quorum or guests.
    """
    return unavailable(f"Proxmox's file {name} cannot be understood", RETRY_SECONDS)


def parse_members(document):
    """Read /etc/pve/.members as (this node's name or None, its Cluster or None).

    A single host has neither `cluster` nor `nodelist` there (pve-cluster,
    cfs_create_memberlist_msg).
    """
    try:
        members = JSON.decode(document)
        own, cluster = members.get("nodename"), members.get("cluster")
        if not cluster:
            return own, None
        nodes = {name: Node(name, name == own, name == own or row.get("online") == 1, row.get("ip"))
                 for name, row in members["nodelist"].items()}
        return own, Cluster(cluster.get("name"), cluster.get("quorate") == 1, nodes)
    except (TypeError, KeyError, AttributeError, *NOT_JSON):
        raise incomprehensible(".members") from None


@lru_cache(maxsize=1)
def parse_vmlist(document):
    """Read /etc/pve/.vmlist as {id as text: {"node", "type": "lxc" or "qemu"}} of all nodes.

    Where there is no guest, it has no `ids` (pve-cluster, cfs_create_vmlist_msg).
    """
    try:
        found = JSON.decode(document)
        ids = dict(found.get("ids", {}) if "version" in found else found["ids"])
        if all(isinstance(row, dict) for row in ids.values()):
            return ids
    except (TypeError, KeyError, AttributeError, *NOT_JSON):
        pass
    raise incomprehensible(".vmlist")


def parse_broadcast(document):
    """Read /etc/pve/.rrd as {("vm" or "node", id or name): its fields, as texts}.

    Every node's pvestatd broadcasts them: of a container uptime, name, status, template, time; of
    a node uptime, level, time, load, processors, share, wait, memory in bytes; and more
    (pve-manager, PVE::Service::pvestatd, PVE::API2Tools). The file's keys are pve2.3-vm/ID and
    pve2-node/NAME, since VE 9 pve-vm-9.0/ID and pve-node-9.0/NAME.
    """
    rows, place = {}, {"vm": 4, "node": 2}              # of the time among the fields
    for kind, name, fields in re.findall(
            r"^pve[\d.]*-(vm|node)(?:-[\d.]+)?/([^:/]+):(.*)$", document or "", re.MULTILINE):
        fields = fields.split(":")
        when = number(fields[place[kind]]) if len(fields) > place[kind] else None
        rows.setdefault((kind, name), []).append((when or 0, fields))
    # For five minutes after an upgrade or a migration there are two (pve-cluster, status.c).
    return {which: max(found)[1] for which, found in rows.items()}


def broadcast_state(fields):
    """Return (status, uptime in seconds) by a container's broadcast; Nones if missing or old."""
    if not fields or len(fields) < 5:
        return None, None
    if abs(time.time() - (number(fields[4]) or 0)) > BROADCAST_SECONDS:
        return None, None
    return fields[2], number(fields[0])


SNAPSHOT_LINE = re.compile(
    r"( *)`-> (\S+)\s+"
    r"(?:(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\s+)?(.*)", re.ASCII)


def in_order(rows):
    return [{"name": name, "timestamp": None if taken is None else utc(int(taken)),
             "description": description,
             "parent": parent, "state": state or None}
            for name, taken, description, parent, state
            in sorted(rows, key=lambda row: (row[1] or 0, row[0]))]


def parse_snapshots(document):
    """Read `pct listsnapshot ID` as snapshots, dicts as in_order makes them, oldest first.

    The tree shows its levels by indentation, times in this host's zone, one line of each
    description, and no states (PVE::GuestHelpers, print_snapshot_tree).
    """
    rows, ancestors = [], []
    for line in document.split("\n"):
        match = SNAPSHOT_LINE.fullmatch(line)
        if not match or match[2] == "current":
            continue
        level = len(match[1])
        del ancestors[level:]
        taken = time.mktime((*map(int, match.groups()[2:8]), 0, 0, -1)) if match[3] else None
        description = match[9].rstrip()
        rows.append((match[2], taken, None if description == "no-description" else description,
                     ancestors[-1] if ancestors else None, None))
        ancestors.append(match[2])
    return in_order(rows)


def snapshots_of(conf):
    """Return the same list from a Conf, with whole descriptions, exact times and states.

    A snapshot has a state while it is taken or deleted, and for ever if that was broken off
    (PVE::AbstractConfig).
    """
    return in_order((name, number(values.get("snaptime"), digits=11) or None,
                     values.get("description"), values.get("parent"), values.get("snapstate"))
                    for name, values in conf.snapshots.items())


NET_DEV = re.compile(
    r"^ *veth(\d{3,9})i\d+: *(\d{1,20})(?: +\d{1,20}){7} +(\d{1,20})", re.MULTILINE)


def parse_net_dev(document):
    """Read /proc/net/dev as {container's id: (bytes in, bytes out)}, seen from inside it.

    The host's side of each of its interfaces is vethIDiN, and what that one sends comes in.
    """
    traffic = {}
    for vm_id, received, sent in NET_DEV.findall(document):
        came, went = traffic.get(int(vm_id), (0, 0))
        traffic[int(vm_id)] = came + int(sent), went + int(received)
    return traffic


PRESSURE = re.compile(r"some avg10=(?:([0-9]{1,3}\.[0-9]{2})|\S{1,9}) avg60=\S{1,9} avg300=\S{1,9} "
                      r"total=([0-9]{1,19})\n")


def parse_pressure(text):
    """Read cpu.pressure or the like as (percent of the last 10 s, seconds), or Nones.

    Something in the cgroup waited for so long. The kernel counts microseconds (its
    Documentation/accounting/psi.rst).
    """
    match = text and PRESSURE.match(text)
    if not match:
        return None, None
    return match[1] and float(match[1]), int(match[2]) / 1e6


def option(value, name):
    """Return an option's text in a property string (`local-lvm:vm-104-disk-0,size=8G`), or None."""
    match = re.search(rf"(?:^|,){name}=([^,]*)", value or "")
    return match and match[1]


def with_option(value, name, given):
    """Return a property string with one option set, or left out if `given` is None."""
    options = [each for each in value.split(",") if each.partition("=")[0] != name]
    return ",".join(options if given is None else [*options, f"{name}={given}"])


def plain_ip(text):
    """Write an address in the one form in which it can be compared."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text


def static_addresses(values):
    """Return [(bridge, VLAN tag, address without its prefix length)] of a container."""
    nets = [value for key, value in values.items() if re.fullmatch(r"net[0-9]{1,2}", key)]
    found = [(option(net, "bridge"), option(net, "tag"), option(net, name))
             for net in nets for name in ("ip", "ip6")]
    return [(bridge, tag, plain_ip(address.partition("/")[0])) for bridge, tag, address in found
            if address and address not in ("dhcp", "manual", "auto")]


def size_in_bytes(value):
    """Return the bytes of a size as Proxmox writes it (bytes, or with K, M, G, T), or None."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)(?:([KMGT])(?:iB)?)?", value or "", re.ASCII)
    return match and float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")


def size_in_gb(value):
    return in_unit(size_in_bytes(value), GIB)


def mount_point(disk, value):
    volume = option(value, "volume") or next(
        (each for each in value.split(",") if "=" not in each), "")
    size = None if volume.startswith("/") else size_in_gb(option(value, "size"))
    return {"disk": disk, "path": option(value, "mp"), "size_gb": size, "volume": volume}


def mount_points(values):
    """Return the mount points mp0 to mp255 of a container's {key: text}, by number.

    The option `volume` may go without its name, wherever it stands (PVE::LXC::Config, mp_desc).
    A folder or device of the host, whose path begins with /, has no size.
    """
    numbers = sorted(int(key[2:]) for key in values if DISK.test(key) and key != "rootfs")
    return [mount_point(f"mp{number}", values[f"mp{number}"]) for number in numbers]


def find_number(pattern, text):
    """Return the first group of a pattern in a text, as an integer, or None."""
    match = text and re.search(pattern, text, re.MULTILINE)
    return number(match[1]) if match else None


def only_number(text):
    """Return the number that is all of a cgroup's file, or None.

    A number counts with its line's end only, for half a number is none. A pattern would take
    most of the time of a scrape.
    """
    return number(text[:-1]) if text and text[-1] == "\n" else None


def row_number(key, text):
    """Return the number in the row `key N` of a cgroup's file, or None, by the same rules."""
    value, end, _ = f"\n{text}".partition(f"\n{key} ")[2].partition("\n")
    return number(value) if end else None


IO_DEVICE = re.compile(r"[0-9]+:[0-9]+\b")
IO_BYTES = re.compile(r" rbytes=([0-9]{1,19}) wbytes=([0-9]{1,19})\s")


def parse_io(text):
    """Read a cgroup's io.stat as (bytes read, bytes written) over all devices, or Nones.

    The file is empty until the first I/O, on ZFS often for ever; a device may have a name only.
    The kernel writes both numbers side by side (blk-cgroup.c, blkcg_print_one_stat).
    """
    if text is None or (text and not (text[-1] == "\n" and IO_DEVICE.match(text))):
        return None, None
    devices, came, went = IO_BYTES.findall(text), 0, 0
    if len(devices) != text.count(" rbytes="):
        return None, None
    for read, written in devices:
        came, went = came + int(read), went + int(written)
    return came, went


def is_init(status):
    """Tell whether /proc/PID/status is that of a process 1 in a namespace right below ours."""
    return find_number(r"^NSpid:\t\d+\t(\d+)$", status) == 1


def part_used(total, free):
    return {"total": total, "used": None if None in (total, free) else total - free}


# What pct fails with

# What pct says of a task that ended without a word: somebody has killed it, or the kernel, when
# memory ran out (PVE::RESTEnvironment, tee_worker).
TASK_KILLED = "got unexpected control message"

# What a resize prints when the volume has grown and its file system has not, or perhaps not. The
# configuration has the new size by then, and pct ends with 0 (PVE::API2::LXC, resize_vm;
# RBDPlugin, map_volume).
FILE_SYSTEM_STAYED = re.compile(
    r"Failed to update the container's filesystem|mount ?point not attached to a loop device"
    rf"|command 'losetup |can't map rbd volume|{TASK_KILLED}")

# pct's name -> ours, and its rule where pct's own text does not tell.
PCT_PARAMETERS = {
    "vmid": ("vm_id", None), "newid": ("new_vm_id", None), "size": ("disk_size", None),
    "hostname": ("new_vm_name", "Proxmox takes a DNS name: "
                                "labels of letters, digits and inner hyphens, joined by dots"),
    "snapname": ("snapshot_name", "Proxmox takes 2 to 40 characters: "
                                  "a letter, then letters, digits, _ and -"),
}

LASTING = "snapshot|snapshot-delete|rollback|create|destroyed"      # locks that outlive a lost task

OLD_PCT = "This pct does not know an option that is needed here; Proxmox VE 7.3 or later has it"
SNAPSHOT_GONE = "The snapshot is in the configuration but no longer on the storage"

# What pct and pvesh say when they fail, as their sources write it, by what a client is told.
# A pattern stands for the start of a line, with or without what PREFIX takes away; it may begin
# with the name of the command, such as "resize: ". A long line must not cost more than its
# length: no two repetitions with nothing fixed between them may take the same characters.
FAILURES = {
    (404, r"VM \2 does not exist on node '\1'"): [
        r"Configuration file 'nodes/([^/']+)/lxc/(\d+)\.conf' does not exist"],
    (404, r"Snapshot '\1' does not exist"): [r"snapshot '([^']*)' does not exist$"],
    (404, r"Node '\1' does not exist"): [
        r"hostname lookup '([^']*)' failed", r"no such cluster node '([^']*)'"],
    (400, r"Invalid snapshot_name: Proxmox reserves the name '\1'"): [
        r"unable to use snapshot name '([^']*)' \(reserved name\)"],
    (400, "Invalid storage: a linked clone stays on its template's; ask for a full one"): [
        r"parameter 'storage' not allowed for linked clones"],
    # The cluster: /etc/pve is read-only without quorum, and gone without its daemon.
    (503, "/etc/pve is read-only: the cluster has no quorum; see: pvecm status"): [
        # The last is said of a write in whose middle the quorum is lost.
        r"(?:unable|failed|clos)[^']*'/etc/pve/[^']*'[\w ]*[-:] "
        r"(?:Permission denied|Read-only|Operation not permitted)",
        r"failed to (?:remove|move) config file[^:]*: "
        r"(?:Permission denied|Read-only|Operation not permitted)"],
    (503, "Proxmox's cluster file system does not answer; see: systemctl status pve-cluster"): [
        r"(?:unable|failed|clos)[^']*'/etc/pve/[^']*'[\w ]*[-:] ",
        r"ipcc_send_rec\S* failed: ", r"Unable to load access control list",
        r"pve cluster filesystem not online",
        r"pve configuration filesystem \(pmxcfs\) not mounted"],
    (503, "The Proxmox cluster has no quorum, so nothing can be changed"): [
        r"cluster not ready - no quorum", r"no quorum!"],
    # Space: the line may name files, so what is short of it must be said at its end.
    (503, "The node has no room on its own disk for the log of a task"): [      # it did not begin
        r"unable to create (?:output )?file '/var/log/pve/tasks/[^']*' - "
        r"(?:No space left on device|Disk quota exceeded)$"],
    (409, "The storage has too little free space"): [
        r"(?:unable to|failed to|can't|clos|rename).*[-:] "
        r"(?:No space left on device|Disk quota exceeded)$",
        r"not enough free space \(\d+ < \d+\)"],
    # Locks
    (503, "The storage is busy with another Proxmox command; try again"): [
        r"(?:cfs-lock|error during cfs-locked) 'storage-[^']*' (?:error|operation): got lock ",
        r"'storage-[^']*'-locked command timed out",
        r"can't lock file '[^']*/pve-storage-[^'/]*' - got timeout"],
    (503, "Proxmox is busy with another command; try again"): [
        r"(?:cfs-lock|error during cfs-locked) '[^']*' (?:error|operation): got lock ",
        r"'[^']*'-locked command timed out"],
    (409, r"The container is locked by Proxmox (\1); try again when that has ended"): [
        r"clone: clone failed: CT is locked \(([\w-]+)\)",      # which of the two is not said
        rf"CT is locked \((?!(?:{LASTING})\))([\w-]+)\)"],
    (409, r"The container is locked by Proxmox (\1); try again when that has ended, or, "
          r"if no task of it runs, end it on its node with: pct unlock {vm_id}"): [
        rf"CT is locked \(({LASTING})\)"],
    (409, "A replication runs or needs this snapshot; try again after it"): [
        r"snapshot '[^']*' needed by replication job", r"Failed to obtain guest migration lock",
        r"can't lock file '[^']*/pve-migrate-\d+' - got timeout"],
    (409, "Another Proxmox command holds the container; try again when it has ended"): [
        r"can't lock file '[^']*' - (?:got timeout|can't acquire lock)"],
    (409, "The container is replicated; remove the replication job first"): [
        r"There is a replication job '"],
    # The container
    (409, r"The id \1 is taken"): [r"(?:CT|VM) (\d+) already exists"],
    (409, r"VM \1 is \2 running"): [r"(?:CT|VM) (\d+) (?:is )?(not|already) running"],
    (409, r"VM \1 is running"): [r"unable to destroy CT (\d+) - container is running"],
    (409, "The container is just starting or stopping; look at its state and try again"): [
        r"unable to get PID for CT \d", r"unable to rollback vm \d+: vm is running",
        r"container did not stop", r"unexpected state change",
        r"trying to [\w /]+: container not running",
        r"failed to open container \d+'s command socket", r"failed to open /proc/\d+ pid fd"],
    (409, "The container is protected (protection: 1); lift that in Proxmox first"): [
        r"can't [\w ]+ - protection mode enabled"],
    (409, "The container is under Proxmox HA; remove it there first"): [
        r"unable to remove CT \d+ - used in HA resources"],
    (503, "The node cannot start a process for a task now"): [r"unable to fork worker - "],
    (409, "The container is a template"): [r"you can't [A-Za-z' ]+ a template$"],
    (409, "The container has too many unused volumes; delete some in Proxmox"): [
        r"Too many unused volumes"],
    (409, "The container runs, and its storage can clone it from a snapshot only"): [
        r"Full clone of a running container is only possible from a snapshot",
        r"Cannot do full clones on a running container without snapshots"],
    (409, r"Proxmox cannot clone a container with a \2 mount (\1)"): [
        r"unable to clone mountpoint '(\w+)' \(type (\w+)\)"],
    (409, r"The volume '\1' cannot be cloned as a linked clone"): [
        r"Linked clone feature for '([^']*)' is not available"],
    # Snapshots
    (409, r"Snapshot '\1' exists already"): [r"snapshot name '([^']*)' already used"],
    (409, r"That snapshot is incomplete (\1); delete it"): [
        r"unable to rollback to incomplete snapshot \(snapstate = (\w+)\)"],
    (409, "Newer snapshots exist on the storage; it can go back to the newest one only: "
          "delete those first"): [r"can't rollback, '[^']*' is not most recent snapshot"],
    (409, SNAPSHOT_GONE): [
        r"can't rollback, snapshot '[^']*' does not exist on ",
        r"no such logical volume [^/\s]+/snap_"],
    (409, "The container's storage (or a bind mount) cannot take snapshots"): [
        r"snapshot feature is not available"],
    (409, "This kind of disk has no snapshots"): [
        r"can't (?:rollback |delete )?snapshot (?:for )?(?:this image format|'[^']*' volume)",
        r"snapshot (?:rollback |delete )?file/device '[^']*' is not possible",
        r"(?:volume )?snapshot (?:rollback |delete )?is not possible on \w+ (?:device|storage)",
        r"snapshot is working with qcow2 format only"],
    # Disks
    (409, "A disk cannot shrink"): [r"unable to shrink disk size"],
    (409, "The disk has this size already"): [r"disk is already at specified size"],
    (409, r"The disk belongs to container \1"): [
        r"can't resize mount point owned by another container \((\d+)\)"],
    (409, "This kind of disk cannot be grown by Proxmox"): [
        r"can't resize this image format", r"cannot resize subvolume",
        r"resize: unable to parse volume ID '", r"resize file/device '[^']*' is not possible",
        r"volume resize is not possible on \w+ device",
        r"can't resize volume: \w+ if snapshot exists"],
    (409, "The volume or snapshot is in use "
          "(a backup, a replication, a linked clone or a mount)"): [
        r"base volume '[^']*' is still in use by linked clones", r"volume deactivation failed: "],
    (409, "The container's volume is missing on its storage"): [
        r"Could not determine current size of volume '", r"volume '[^']*' does not exist$",
        r"no such logical volume [^/\s]+/(?:vm|base)-", r"volume \S+ is missing\b"],
    # Storages
    (409, "The storage cannot be used here"): [
        r"storage '[^']*' (?:does not exist$|is disabled|is not available on node )",
        r"storage '[^']*' does not (?:support|allow) ", r"content type 'rootdir' is not available",
        r"no such (?:volume group '|logical volume )", r"can't allocate space in \w+ storage",
        r"unable to use volume \S+ - content type", r"error: no iscsi support",
        r"connection check for storage '[^']*' failed - .*NT_STATUS_",
        r"mount error: .*(?:access|Permission) denied"],
    (503, "The storage is not reachable now"): [
        r"storage '[^']*' is not online", r"connection check for storage '[^']*' failed",
        r"mount error: ", r"unable to activate storage '"],
    (500, "The daemon must run as root"): [r"please run as root"],
    (500, OLD_PCT): [r"400 unable to parse option"],
}

# What the tools of the storages say. A task prints that on stdout, and at most its last line
# comes on stderr, too, so these are looked for in both. Names in it are quoted, or stand
# before the end that counts.
REASONS = {
    (409, "Proxmox HA has the container in its error state; disable and mend it there first"): [
        r"service '[^']*' in error state, must be disabled and fixed first"],
    (409, "The storage has too little free space"): [
        r"(?:rsync|qemu-img|ERROR): .*: (?:No space left on device|Disk quota exceeded)"
        r"(?: \(\d+\))?$",
        r"mk(?:e2)?fs[\w.]*: No space left on device while ", r"rbd: [^()]*: \((?:28|122)\) ",
        r'Volume group "[^"]*" has insufficient free space',
        r"Insufficient (?:free space|suitable allocatable extents)",
        r"Cannot create new thin volume, free space in thin pool \S+ reached threshold",
        r"cannot [\w ]+'[^']*': (?:out of space|size is greater than available space)"],
    (409, "Newer snapshots exist on the storage; it can go back to the newest one only: "
          "delete those first"): [r"cannot rollback to '[^']*': more recent snapshots"],
    (409, SNAPSHOT_GONE): [
        r"could not find any snapshots to destroy",
        r"cannot open '[^'@]*@[^']*': dataset does not exist",
        r'Failed to find logical volume "[^"/]*/snap_',
        r"Snapshot origin LV snap_\S+ not found in ",
        r"rbd: failed to remove snapshot: \(2\) "],
    (409, "The container's volume is missing on its storage"): [
        r"rbd: error opening image [^()]*: \(2\) ",
        r"cannot open '[^'@/]*/[^'@]*': dataset does not exist",
        r'Failed to find logical volume "'],
    (409, "The volume or snapshot is in use "
          "(a backup, a replication, a linked clone or a mount)"): [
        r"[Ll]ogical volume (?:\S+ )?(?:in use|is used by another device|contains a filesystem)",
        r"cannot [\w ]+'[^']*': (?:(?:pool or )?dataset is busy|target is busy)",
        r"cannot destroy snapshot [^\s@]+@[^\s:]+: (?:dataset is busy|snapshot is cloned)",
        r"cannot [\w ]+'[^']*': (?:snapshot|filesystem|volume) has (?:dependent clones|children)",
        r"umount: .*: target is busy\.?$", r"rbd: [^()]*: \((?:16|39)\) ",
        r"rbd: snapshot '[^']*' is protected",
        r"rbd: (?:error: )?image (?:still )?has (?:snapshots|watchers)",
        r"Removing all snapshots: \d+% complete\.\.\.failed"],
    (409, "The storage already has something of that name, which Proxmox does not list"): [
        r"rbd: [^()]*: \(17\) ", r"cannot create [\w ]*'[^']*': dataset already exists",
        r'Logical [Vv]olume "[^"]*" already exists in volume group',
        r"disk image '[^']*' already exists"],
    (503, "The storage is not reachable now"): [
        r"rbd: couldn't connect to the cluster"],
    (409, "The storage cannot be used here"): [
        r'Volume group "[^"]*" not found', r"rbd: error opening pool ",
        r"cannot (?:open|import) '[^'@/]*': no such pool"],
}

FAILURE_RULES, REASON_RULES = (
    [(pattern, status, told) for (status, told), patterns in table.items() for pattern in patterns]
    for table in (FAILURES, REASONS))

# What each layer of Proxmox puts before the reason, as in "clone failed: zfs error: …"
# (PVE::Cmd, run_command; PVE::Cluster, cfs_lock).
WORDS = r"[\w-]+(?: (?:'[^']*'|[\w/][\w./@-]*))*?"
PREFIX = re.compile(
    rf"TASK ERROR: +|{WORDS} (?:error|failed|operation): +"
    rf"|(?:error|can't|unable to|could not) {WORDS}: +"
    r"|(?:unable to|can't) \w+ CT \d+ - |could not activate storage '[^']*', ")
MAX_PREFIXES = 5            # that are taken away
MAX_LOOK = 32768            # characters of an output in which a reason is looked for, at its end
MAX_LOOK_LINES = 200        # and lines


def own_words(command, code, lines):
    """Return a command's last line, for one of which nothing is known."""
    if not lines:
        return f"{command} failed with exit status {code}"
    return f"{command} failed: {lines[-1][:MAX_DETAILS]}"


def last_lines(output):
    """Return the lines at the end of an output, without the empty ones."""
    lines = map(str.strip, output[-MAX_LOOK:].split("\n"))
    return list(filter(None, lines))[-MAX_LOOK_LINES:]


def unwrapped(text):
    """Yield `name: line`, then the line, then it without its first prefixes, one after another."""
    yield text
    text = text.partition(": ")[2]
    for _ in range(MAX_PREFIXES):
        yield text
        prefix = PREFIX.match(text)
        if not prefix:
            return
        text = text[prefix.end():]


def verdict(argv, stderr):
    """Find what the lines that pct printed on stderr mean: (status, error), or None.

    The last line that is known counts, and for it the first row that fits. Lines above the last
    are often warnings, so none of them may mean a 503: that promises that nothing was done.
    """
    vm_id = "".join(argv[2:3])
    for line in reversed(stderr):
        for text in unwrapped(f"{argv[1]}: {line}"):
            for pattern, status, told in FAILURE_RULES + REASON_RULES:
                match = re.match(pattern, text)
                if match and (status != 503 or line is stderr[-1]):
                    return status, match.expand(told).replace("{vm_id}", vm_id)
    return None


def reason(stdout):
    """Find what a task's output means: (status, error), or None; what failed first counts."""
    for line in stdout:
        for pattern, status, told in REASON_RULES:
            if re.match(pattern, line):
                return status, told
    return None


def explain_refusal(stderr):
    """Turn `400 Parameter verification failed.` and its `name: text` lines into (400, a sentence).

    The sentence has our names. What a container did not take while it runs is refused in the
    same form, and is no fault of the request (PVE::LXC::Config, vmconfig_hotplug_pending).
    """
    rules = []
    for name, said in re.findall(r"^([a-z][\w-]*): (.+)$", stderr, re.MULTILINE):
        applying = re.match(r"unable to (hotplug|apply pending change) (\w+) ?: *(.+)", said)
        if applying:
            whom = "the running container" if applying[1] == "hotplug" else "the container"
            return 409, f"Proxmox could not apply {applying[2]} to {whom}: {applying[3].strip()}"
        ours, rule = PCT_PARAMETERS.get(name, (name, None))
        rules.append(f"Invalid {ours}: {rule or said.strip()}")
    return 400, "; ".join(rules) or "pct refused a parameter"


def signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def explain_failure(argv, result):
    """Make the Problem to tell of a command that failed, from its Result."""
    said = "\n".join(filter(None, (result.stdout.strip(), result.stderr.strip())))[-MAX_DETAILS:]
    command = " ".join(argv[:3])
    if result.exit < 0:
        return Problem(500, f"{command} was ended by {signal_name(-result.exit)}", details=said)
    if result.overflow:
        error = f"{command} printed more than {MAX_OUTPUT // MIB} MiB"
        return Problem(500, error, details=said[:200])
    if re.search(r"^400 Parameter verification failed\.", result.stderr, re.MULTILINE):
        return Problem(*explain_refusal(result.stderr), details=said)
    stderr, stdout = last_lines(result.stderr), last_lines(result.stdout)
    found = verdict(argv, stderr) or reason(stdout)
    status, error = found or (500, own_words(command, result.exit, stderr or stdout))
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else None
    return Problem(status, error, headers, details=said)


# Reading: files under /etc/pve and /proc, and cgroups

CGROUP_FILES = (
    "cpu.stat", "memory.current", "memory.stat", "memory.swap.current", "memory.events",
    "io.stat", "pids.current", *(f"{name}.pressure" for name in PRESSURES))
OPEN_TO_READ = os.O_RDONLY | os.O_CLOEXEC

# ENODEV is said of a cgroup that has just gone, EOPNOTSUPP of a pressure file where the kernel
# measures none: the file is there even then (systemd, is_pressure_supported).
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.ENODEV, errno.EOPNOTSUPP)


def read_text(path, folder=None, anew=False):
    """Return a small file's text, None if it is not there; OSError if it cannot be read.

    Far cheaper than open() where a thousand are read. With the descriptor of an open folder, the
    path begins there.

    What pmxcfs makes itself, it makes when it is asked for the file's attributes, which the kernel
    keeps for a second: until then, a read finds the text of before. But after a read the kernel
    asks for them once more (pve-cluster, cfs_plug_func_getattr; seen with pmxcfs 9.1.6): `anew`.
    """
    try:
        fd = os.open(path, OPEN_TO_READ, dir_fd=folder)
        try:
            if anew:
                os.read(fd, 1)
                os.fstat(fd)                # then all at once: others may have it made meanwhile
                return os.pread(fd, 1 << 20, 0).decode("utf-8", "replace")
            data = chunk = os.read(fd, 65536)
            while len(chunk) > 2000:        # the kernel's own files come a page at a time
                chunk = os.read(fd, 65536)
                data += chunk
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        error.filename = path               # os.read does not say which
        raise
    return data.decode("utf-8", "replace")


@contextmanager
def opened(folder):
    """Hold a folder open and yield its descriptor, so that it is found once for all its files."""
    fd = os.open(folder, OPEN_TO_READ | os.O_DIRECTORY)
    try:
        yield fd
    except OSError as error:
        error.filename = os.path.join(folder, error.filename)
        raise
    finally:
        os.close(fd)


def is_there(path):
    """Tell whether a path exists; OSError if that cannot be seen."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in NOT_THERE:
            return False
        raise
    return True


def names_in(folder):
    """Return the names in a folder, none if it is not there; OSError if it cannot be read."""
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in NOT_THERE:
            return []
        raise


def space(path):
    """Return (bytes in use, bytes) of the file system at a path, or Nones."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None, None
    return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_blocks * found.f_frsize


def read_node():
    """Return what `pvesh get /nodes/NODE/status` tells of this node, without a process.

    It reckons as PVE::API2::Nodes and PVE::ProcFSTools do. Memory is used as far as the kernel
    does not call it available, which is so since libpve-common-perl 8.3.1; before, pvesh
    called some of the kernel's own caches used as well. What is not there is None.
    """
    stat, load, sizes, uptime = (
        read_text(f"{PROC}/{name}") or "" for name in ("stat", "loadavg", "meminfo", "uptime"))
    sizes = {name: int(size) * 1024
             for name, size in re.findall(r"^(\w+): +(\d{1,15}) kB$", sizes, re.MULTILINE)}
    load, up = (re.match(r"(\d+\.\d+) (\d+\.\d+) (\d+\.\d+) ", load),
                re.match(r"(\d{1,15})\.", uptime))
    version = re.search(
        r"^sub version \{\s+return '([^']+)';", read_text(PVECFG) or "", re.MULTILINE)
    disk = os.statvfs("/")
    return {
        "cpuinfo": {"cpus": len(re.findall(r"^cpu\d+ ", stat, re.MULTILINE)) or None},
        "loadavg": load and load.groups(),
        "memory": part_used(sizes.get("MemTotal"), sizes.get("MemAvailable")),
        "swap": part_used(sizes.get("SwapTotal"), sizes.get("SwapFree")),
        "rootfs": part_used(disk.f_blocks * disk.f_frsize, disk.f_bfree * disk.f_frsize),
        "uptime": up and int(up[1]), "pveversion": version and f"pve-manager/{version[1]}",
    }


def process_uptime(pid):
    """Return the seconds since a container's init, process `pid`, started, or None."""
    stat = pid and read_text(f"/proc/{pid}/stat")
    if not stat:
        return None
    started = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return max(0, int(float(read_text("/proc/uptime").split()[0]) - started))


def read_traffic():
    """Return {id: (bytes in, bytes out)} of the containers that run here and have an interface."""
    return parse_net_dev(read_text("/proc/net/dev") or "")


class ClusterFiles:
    """What /etc/pve says, the same on every node: Proxmox's cluster file system (pmxcfs).

    Any of these reads may hang, for it is a FUSE file system: who must not wait for ever lets
    Files (below) do it. A `node` is the Node whose containers are meant, or None for this one.
    """

    def __init__(self, folder, clustered):
        self.folder, self.clustered = folder, clustered
        self.lxc = f"{folder}/lxc"          # the folder of this node's containers
        self.seen = set()                   # ids of containers that were found somewhere

    def members(self):
        """Return (this node's name or None, its Cluster or None).

        Until corosync runs, .members is that of a single host (pmxcfs, status.c). Then the other
        nodes are those of which there are folders; they are offline, and there is no quorum.
        """
        document = read_text(f"{self.folder}/.members")
        own, cluster = (None, None) if document is None else parse_members(document)
        if not self.clustered:
            return own, None
        if not cluster and is_there(f"{self.folder}/corosync.conf"):
            nodes = {name: Node(name, name == own, name == own, None)
                     for name in names_in(f"{self.folder}/nodes")}
            cluster = Cluster(None, False, nodes)
        return own, cluster

    def find(self, vm_id):
        """Return the Node where a container lives; Problem 404 if the cluster's list has no such.

        None stands for this node, or for one that is not known: whoever reads the file here will
        see. Its file here is looked for first: no id is on two nodes, and the list may be long.
        """
        if is_there(self.conf_path(vm_id)):
            self.seen.add(vm_id)
            return None
        self.check_mounted()
        document, (_, cluster) = read_text(f"{self.folder}/.vmlist", anew=True), self.members()
        if document is None:
            return None
        ids = parse_vmlist(document)
        guest = ids.get(str(vm_id))
        if guest and guest.get("type") != "lxc":
            raise Problem(404, f"VM {vm_id} is a virtual machine, not a container")
        if cluster and ids and not guest:
            raise Problem(404, f"VM {vm_id} does not exist on any node of the cluster")
        if guest:
            self.seen.add(vm_id)
        if not cluster or not guest:
            return None
        name = guest.get("node")
        # Of a node that has left, files may stay.
        node = cluster.nodes.get(name, Node(name, False, False, None))
        return None if node.local else self.with_known_hosts(node)

    def check_mounted(self):
        """Raise Problem 503 where pve_dir is an empty folder.

        Once mounted, pmxcfs always has the link lxc (pmxcfs.c).
        """
        if not os.path.lexists(self.lxc) and is_there(self.folder):
            raise unavailable(f"Proxmox's cluster file system is not mounted at {self.folder}; "
                              "see: systemctl status pve-cluster", RETRY_SECONDS)

    def with_known_hosts(self, node):
        """Return a Node with the path of the file that has its SSH key, if there is one."""
        path = f"{self.folder}/nodes/{node.name}/ssh_known_hosts"
        return node._replace(known_hosts=path if is_there(path) else None)

    def changeable(self, vm_id):
        """Return the Node where a container can be changed; Problem 404, or 503 without quorum."""
        node, (_, cluster) = self.find(vm_id), self.members()
        if cluster and not cluster.quorate:
            raise unavailable("The Proxmox cluster has no quorum, so nothing can be changed; "
                              "see: pvecm status", RETRY_SECONDS)
        return node

    def text(self, vm_id):
        """Return (the Node where a container lives, the text of its configuration).

        If the folder of its node is missing, the text is None; if only the file is, it raises
        Problem 404.
        """
        node = self.find(vm_id)
        try:
            return node, self.texts([vm_id], node)[vm_id]
        except Problem:
            if self.find(vm_id) == node:
                raise
        return self.text(vm_id)             # it has moved meanwhile

    def texts(self, vm_ids, node):
        """Return {id: text of its configuration on a node, or None}.

        The first must be a container there: Problem 404 if it is known that it is not. Any other
        is an id that a clone is to get: Problem 409 if a container or a virtual machine of any
        node is known to have it.
        """
        texts = {vm_id: read_text(self.conf_path(vm_id, node)) for vm_id in vm_ids}
        if texts[vm_ids[0]] is None and is_there(os.path.dirname(self.conf_path(vm_ids[0], node))):
            name = node.name if node else self.members()[0] or socket.gethostname()
            raise Problem(404, f"VM {vm_ids[0]} does not exist on node '{name}'")
        for vm_id in vm_ids[1:]:
            document = read_text(f"{self.folder}/.vmlist", anew=True)
            listed = document is not None and str(vm_id) in parse_vmlist(document)
            if listed or is_there(self.conf_path(vm_id)):       # it may not be listed yet
                raise Problem(409, f"The id {vm_id} is taken")
        return texts

    def documents(self, node=None):
        """Yield (id, text of its configuration) of all containers of a node, in the ids' order."""
        path = os.path.dirname(self.conf_path(0, node))     # which is the same for every id
        vm_ids = sorted(int(name[:-5]) for name in names_in(path) if CONF_NAME.fullmatch(name))
        with suppress(FileNotFoundError), opened(path) as folder:       # which may have gone
            for vm_id in vm_ids:
                document = read_text(f"{vm_id}.conf", folder)
                if document is not None:    # else the file has gone
                    yield vm_id, document

    def confs(self, node):
        """Return {id: Conf} of all containers of a node whose files are there."""
        return {vm_id: parse_config(document) for vm_id, document in self.documents(node)}

    def all_confs(self):
        """Yield (node, id, Conf) of all containers of all nodes whose files are there."""
        for node in [None, *self.others()]:
            for vm_id, conf in self.confs(node).items():
                yield node, vm_id, conf

    def conf_path(self, vm_id, node=None):
        folder = f"{self.folder}/nodes/{node.name}/lxc" if node else self.lxc
        return f"{folder}/{vm_id}.conf"

    def others(self):
        """Return the other Nodes of the cluster, if there is one."""
        _, cluster = self.members()
        return [node for node in cluster.nodes.values() if not node.local] if cluster else []

    def address_holders(self, but):
        """Return {(bridge, VLAN tag, address): id} of the static addresses of all containers.

        Templates are left out, and so is the container `but`.
        """
        return {address: vm_id
                for _, vm_id, conf in self.all_confs()
                if vm_id != but and not is_true(conf.current.get("template"))
                for address in static_addresses(conf.current)}

    def broadcast(self):
        """Return what each node last told the others of itself and its containers."""
        return parse_broadcast(read_text(f"{self.folder}/.rrd"))

    def temporary_snapshots(self):
        """Return {name of a temporary snapshot: the command that removes it}."""
        self.check_mounted()
        return {name: f"pct delsnapshot {vm_id} {name}" + (f" ({on(node).strip()})" if node else "")
                for node, vm_id, conf in self.all_confs()
                for name in conf.snapshots if name.startswith(TEMPORARY_SNAPSHOT)}


class Usage(namedtuple("Usage", [
        "cpu", "memory", "shared", "swap", "disk_read", "disk_write", "oom_kills", "pids",
        *(f"{kind}_{name}" for name in PRESSURES for kind in ("pressure", "waited"))])):
    """What a running container uses or has used; None where nobody tells.

    Processor time is in seconds, memory and disk in bytes; for each of PRESSURES,
    `pressure_NAME` and `waited_NAME` are what parse_pressure reads.
    """


class Cgroups:
    """What the cgroups (version 2) of this host's containers say, and /proc of what runs there."""

    def __init__(self, folder):
        self.folder, self.lxc = folder, f"{folder}/lxc"         # it holds one for each

    def are_there(self):
        """Tell whether control groups are there in version 2.

        Version 1 has a folder for each controller.
        """
        return is_there(self.folder) and not is_there(f"{self.folder}/memory")

    def runs(self, vm_id):
        """Tell whether a container runs: its cgroup is there, and some process in it.

        One that has stopped may leave an empty cgroup until its next start (pve-container,
        lxc-pve-prestart-hook, cleanup_cgroups).
        """
        pids = only_number(read_text(f"{self.lxc}/{vm_id}/pids.current"))
        return is_there(f"{self.lxc}/{vm_id}") if pids is None else pids > 0

    def files(self, vm_ids):
        """Return those of CGROUP_FILES that this kernel has, as the first few containers show.

        Siblings have the same ones: the kernel makes them for what their parent's
        cgroup.subtree_control names. But who writes 0 to a cgroup's cgroup.pressure hides its
        *.pressure (both in its Documentation/admin-guide/cgroup-v2.rst).
        """
        there = set()
        for vm_id in vm_ids[:8]:
            there.update(names_in(f"{self.lxc}/{vm_id}"))
            if there.issuperset(CGROUP_FILES):
                break
        return [name for name in CGROUP_FILES if name in there or "cpu.stat" not in there]

    def usages(self, vm_ids):
        """Return {id: Usage} of those of these containers that run."""
        there = set(names_in(self.lxc))
        vm_ids, usages = [vm_id for vm_id in vm_ids if str(vm_id) in there], {}
        names = self.files(vm_ids)
        with suppress(FileNotFoundError), opened(self.lxc) as folder:
            usages = {vm_id: self.usage(f"{vm_id}/", names, folder) for vm_id in vm_ids}
        return {vm_id: usage for vm_id, usage in usages.items() if usage}

    def usage(self, path, names=CGROUP_FILES, folder=None):
        """Return the Usage of a container by the files in its cgroup that have these names.

        Its path ends with a slash, and begins at the folder if one is open. The Usage is None
        if the container does not run.
        """
        text = {name: read_text(path + name, folder) for name in names}.get
        cpu, memory, stat = text("cpu.stat"), text("memory.current"), text("memory.stat")
        pids = only_number(text("pids.current"))
        if pids == 0 or (cpu is None and memory is None):
            return None
        used, cached = only_number(memory), row_number("file", stat)
        microseconds = row_number("usage_usec", cpu)
        waits = (each for name in PRESSURES for each in parse_pressure(text(f"{name}.pressure")))
        return Usage(
            microseconds and microseconds / 1e6,
            None if None in (used, cached) else max(0, used - cached),      # as pct counts it
            row_number("shmem", stat), only_number(text("memory.swap.current")),
            *parse_io(text("io.stat")), row_number("oom_kill", text("memory.events")),
            pids, *waits)

    def init_pid(self, vm_id):
        """Return the process that is a running container's init, or None.

        A systemd moves itself into init.scope. Any other init stays beside its children, of
        which it is the one that is process 1 inside: the last number of NSpid in proc(5).
        """
        folder = f"{self.lxc}/{vm_id}/ns"
        systemd = find_number(r"^(\d+)", read_text(f"{folder}/init.scope/cgroup.procs"))
        if systemd:
            return systemd
        pids = re.findall(r"^\d+$", read_text(f"{folder}/cgroup.procs") or "", re.MULTILINE)
        inits = (int(pid) for pid in pids if is_init(read_text(f"/proc/{pid}/status")))
        return next(inits, None)


# Waiting

class Semaphore:
    """A fair semaphore: at most `width` hold it at once; others wait in the order they came."""

    def __init__(self, width):
        self.free, self.queue, self.lock = width, deque(), threading.Lock()

    @contextmanager
    def held(self, seconds):
        """Hold the semaphore; TimeoutError if it is not had within so many seconds."""
        ticket = threading.Event()
        with self.lock:
            if self.free:
                self.free -= 1
                ticket.set()
            else:
                self.queue.append(ticket)
        if not ticket.wait(seconds):
            with self.lock:
                if not ticket.is_set():     # else it was handed over at the last moment
                    self.queue.remove(ticket)
                    raise TimeoutError
        try:
            yield
        finally:
            with self.lock:
                if self.queue:
                    self.queue.popleft().set()
                else:
                    self.free += 1


class Workers:
    """Does each piece of work in a thread; one that is idle is used again."""

    def __init__(self):
        self.lock, self.idle = threading.Lock(), []     # a queue for each idle thread

    def start(self, work, *arguments, future=None):
        """Begin work(*arguments) in another thread; `future` gets its result, if there is one.

        It raises Problem 503 if no thread is left.
        """
        with self.lock:
            idle = self.idle.pop() if self.idle else None
        inbox = idle or SimpleQueue()
        inbox.put((future, work, arguments))
        if idle:
            return
        try:
            threading.Thread(target=self.serve, args=(inbox,), daemon=True).start()
        except RuntimeError:
            raise unavailable(
                "The host has no thread left; try again later", RETRY_SECONDS) from None

    def serve(self, inbox):
        """Do one job after the other, until none has come for WORKER_SECONDS."""
        while True:
            try:
                future, work, arguments = inbox.get(timeout=WORKER_SECONDS)
            except Empty:
                with self.lock:
                    if inbox in self.idle:
                        self.idle.remove(inbox)
                        return
                continue                    # a job was given at the last moment
            result, error = None, None
            try:
                result = work(*arguments)
            except BaseException as raised:
                error = raised
                if not future:              # before it is idle, for other work would wait for this
                    log.error("internal error in %s", work, exc_info=error)
            with self.lock:
                staying = len(self.idle) < MAX_IDLE
                if staying:
                    self.idle.append(inbox)
            if future:
                future.set_exception(error) if error else future.set_result(result)
            del future, work, arguments, result, error  # or they would stay until the next job
            if not staying:
                return


class SingleFlight:
    """One call answers all who ask the same question at the same time.

    All who ask before a call begins share it, and who comes later waits for the next: one at
    a time, and nothing is told from before it was asked. The calls of different questions run
    at once, in a thread each.
    """

    def __init__(self, workers):
        self.workers, self.lock, self.flying, self.next = workers, threading.Lock(), set(), {}

    def join(self, question, call):
        """Return the Future of call(), which answers a question.

        It raises Problem 503 if too many are being answered.
        """
        with self.lock:
            future = self.next.get(question)
            if future:
                return future
            if question not in self.flying and len(self.flying) >= MAX_FLIGHTS:
                raise unavailable("Too many questions are being answered; try again later", 1)
            future = self.next[question] = Future()
            if question in self.flying:
                return future               # it begins when the one before has ended
            self.flying.add(question)
        try:
            self.workers.start(self.fly, question, call)
        except Problem as problem:          # no thread is left
            with self.lock:
                self.flying.discard(question)
                self.next.pop(question).set_exception(problem)
        return future

    def fly(self, question, call):
        while True:
            with self.lock:
                future = self.next.pop(question, None)
                if not future:
                    self.flying.discard(question)
                    return
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


class Files:
    """Reads what may hang, and waits for none of it longer than FILE_SECONDS.

    /etc/pve is a FUSE file system, and a container's disk may be somewhere in the network.
    A read that hangs cannot be ended, so it is left alone in its thread. While it hangs, the
    same is not begun again, or one container's file or disk would soon stand for all; while
    MAX_HUNG of them hang, no further one is begun.
    """

    def __init__(self, workers):
        self.workers, self.hung = workers, set()    # what is being read and hangs

    def read(self, function, *arguments):
        """Return function(*arguments); Problem 503 if it hangs, or cannot read what is there."""
        question = (function, *arguments)
        if question in self.hung or len(self.hung) >= MAX_HUNG:
            raise hanging()
        future = Future()
        self.workers.start(function, *arguments, future=future)
        try:
            error = future.exception(FILE_SECONDS)
        except FutureTimeout:
            self.hung.add(question)
            future.add_done_callback(lambda _: self.hung.discard(question))
            raise hanging() from None
        if isinstance(error, OSError):
            raise unavailable(f"{error.filename or 'A file'} cannot be read: {error.strerror}",
                              RETRY_SECONDS)
        return future.result()


# Limits and metrics

def networks_of(address):
    """Return an address's networks, the narrowest first, as (the address's length, first bytes)."""
    if ":" in address:
        packed, lengths = socket.inet_pton(socket.AF_INET6, address), (8, 6, 4, 0)
    else:
        packed, lengths = socket.inet_pton(socket.AF_INET, address), (4, 3, 2, 0)
    return [(len(packed), packed[:length]) for length in lengths]


class RateLimiter:
    """Sliding window: at most `limit` requests of a client in any `window` seconds.

    A client is an IPv4 address or an IPv6 /64: one customer has that many addresses. Nobody
    is forgotten before a window has passed since the last counted request, so no crowd of
    others makes a refused client free again. Memory stays bounded since a newcomer is counted
    together with its network while there is no room: /24 or /48 beyond MAX_CLIENTS, /16 or
    /32 beyond one and a half of them, and all the others as one beyond twice as many. Who is
    counted alone again, when there is room, has made all the requests of that network so far.
    """

    def __init__(self, limit, window, clock=time.monotonic):
        self.limit, self.window, self.clock = limit, window, clock
        self.lock = threading.Lock()
        self.clients = OrderedDict()        # times of counted requests, who counted last at the end

    def admit(self, client):
        """Count a request; return (admitted, how many more would be, seconds).

        The seconds are those until the oldest counted request leaves the window.
        """
        with self.lock:
            now = self.clock()
            self.forget(now)
            key, stamps = self.counted_as(client)
            while stamps and stamps[0] <= now - self.window:
                stamps.popleft()
            admitted = len(stamps) < self.limit
            if admitted:
                stamps.append(now)
                self.clients[key] = stamps
                self.clients.move_to_end(key)
            return admitted, self.limit - len(stamps), stamps[0] + self.window - now

    def forget(self, now):
        """Drop the clients of whom no request counts any more; they stand first."""
        while self.clients:
            client, stamps = next(iter(self.clients.items()))
            if stamps[-1] > now - self.window:
                return
            del self.clients[client]

    def counted_as(self, client):
        """Return (the network that an address is counted as, the times of its requests).

        It is the narrowest that is known, or for which there is room.
        """
        networks, room = networks_of(client), MAX_CLIENTS
        for network in networks:
            if network in self.clients:
                return network, self.clients[network]
            if len(self.clients) < room:
                break
            room += MAX_CLIENTS // 2
        return network, deque(next(
            (self.clients[wider] for wider in networks if wider in self.clients), ()))


def plain_address(text):
    """Return an address without zone, an IPv4-mapped one as IPv4; ValueError if it is none."""
    found = ipaddress.ip_address(text.partition("%")[0])
    return getattr(found, "ipv4_mapped", None) or found


HOP = re.compile(r"\[([^\]]{1,100})\](?::[0-9]{1,5})?|([0-9.]{1,15}):[0-9]{1,5}|(.{1,100})")


def hop_address(text):
    """Read an address as proxies write it: some add the port, some put IPv6 in brackets."""
    match = HOP.fullmatch(text.strip(" \t"))
    return plain_address(match[match.lastindex] if match else "")


def client_of(headers, address, trusted):
    """Return (the client's address, local) from a request's headers and the other end's address.

    `local` says whether it is never limited. Only a proxy in `trusted` may speak for others: by
    the rightmost address in X-Forwarded-For that is not a trusted proxy itself, or else by
    X-Real-IP. Whoever comes through a proxy is no local program.
    """
    said = [headers[name] for name in ("x-real-ip", "x-forwarded-for") if name in headers]
    if not said:
        return address, address.startswith("127.") or address == "::1"
    peer = plain_address(address)
    if not any(peer in network for network in trusted):
        return address, peer.is_loopback
    client = peer
    for hop in reversed(",".join(filter(None, said)).rsplit(",", MAX_HOPS)[-MAX_HOPS:]):
        try:
            client = hop_address(hop)
        except ValueError:
            break
        if not any(client in network for network in trusted):
            break
    return str(client), False


CONTAINER = "lxc_autoscale_container_"       # how the names of containers' metrics begin
CONTAINER_USAGE = {                         # field of Usage: the rest of a metric's name
    "cpu": "cpu_seconds_total", "memory": "memory_usage_bytes", "shared": "memory_shared_bytes",
    "swap": "swap_usage_bytes", "disk_read": "disk_read_bytes_total",
    "disk_write": "disk_write_bytes_total", "oom_kills": "oom_kills_total", "pids": "pids",
    **{f"waited_{name}": f"pressure_{name}_waiting_seconds_total" for name in PRESSURES},
}


class Family(namedtuple("Family", "kind labels help buckets", defaults=[()])):
    """A metric: its kind, its labels' names, what it tells, and a histogram's upper bounds.

    The kind is counter, gauge or histogram.
    """


REQUEST_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
COMMAND_BUCKETS = (0.3, 0.6, 1, 2, 5, 10, 15, 30, 60, 300, 900, 3600)
ONE = ("container_id",)
FAMILIES = {
    "lxc_autoscale_api_build_info": Family(
        "gauge", ("version", "python_version"), "The daemon's version; always 1."),
    "lxc_autoscale_api_requests_total": Family(
        "counter", ("method", "endpoint", "status"), "HTTP requests answered."),
    "lxc_autoscale_api_request_duration_seconds": Family(
        "histogram", ("method", "endpoint"), "Time from a request's head to its answer.",
        REQUEST_BUCKETS),
    "lxc_autoscale_api_requests_in_progress": Family(
        "gauge", (), "HTTP requests that are being answered."),
    "lxc_autoscale_api_rate_limited_total": Family(
        "counter", (), "Requests refused because of the rate limit."),
    "lxc_autoscale_api_auth_failures_total": Family(
        "counter", (), "Requests refused without a valid API key."),
    "lxc_autoscale_api_connections_refused_total": Family(
        "counter", (), "Connections refused: too many open, no thread left, or a stop."),
    "lxc_autoscale_api_commands_total": Family(
        "counter", ("command", "result"), "Commands run: ok, failed, timeout or not_started."),
    "lxc_autoscale_api_command_duration_seconds": Family(
        "histogram", ("command",), "Time that commands took.", COMMAND_BUCKETS),
    "lxc_autoscale_api_commands_in_progress": Family(
        "gauge", (), "Slots for commands that are taken."),
    "lxc_autoscale_api_commands_waiting": Family("gauge", (), "Commands that wait for a slot."),
    "lxc_autoscale_scaling_actions_total": Family(
        "counter", ("container_id", "resource", "action"), "Scaling actions done."),
    "lxc_autoscale_scaling_failures_total": Family(
        "counter", ("container_id", "resource", "reason"), "Scaling actions failed."),
    "lxc_autoscale_container_info": Family(
        "gauge", ("container_id", "name"), "A container and its hostname; always 1."),
    "lxc_autoscale_container_up": Family(
        "gauge", ONE, "Whether the container runs; absent for a template, which cannot."),
    "lxc_autoscale_container_locked": Family(
        "gauge", ("container_id", "lock"), "1 while Proxmox holds the container locked."),
    "lxc_autoscale_container_cpu_cores": Family(
        "gauge", ONE, "CPU cores allotted; absent where there is no limit."),
    "lxc_autoscale_container_memory_mb": Family("gauge", ONE, "Memory allotted, in MB."),
    "lxc_autoscale_container_memory_limit_bytes": Family("gauge", ONE, "Memory allotted."),
    "lxc_autoscale_container_memory_usage_bytes": Family(
        "gauge", ONE, "Memory used, without the page cache."),
    "lxc_autoscale_container_cpu_seconds_total": Family(
        "counter", ONE, "Processor time used since the container's start."),
    "lxc_autoscale_container_disk_read_bytes_total": Family(
        "counter", ONE, "Bytes read from block devices."),
    "lxc_autoscale_container_disk_write_bytes_total": Family(
        "counter", ONE, "Bytes written to block devices."),
    "lxc_autoscale_container_oom_kills_total": Family(
        "counter", ONE, "Processes killed for want of memory."),
    "lxc_autoscale_container_pids": Family("gauge", ONE, "Processes and threads."),
    "lxc_autoscale_container_network_receive_bytes_total": Family(
        "counter", ONE, "Bytes that the container has received."),
    "lxc_autoscale_container_network_transmit_bytes_total": Family(
        "counter", ONE, "Bytes that the container has sent."),
    "lxc_autoscale_container_swap_usage_bytes": Family("gauge", ONE, "Swap used."),
    "lxc_autoscale_container_memory_shared_bytes": Family(
        "gauge", ONE, "Memory in tmpfs and shared memory, which only the limit counts."),
    **{f"lxc_autoscale_container_pressure_{name}_waiting_seconds_total": Family(
        "counter", ONE, f"Time in which some process waited for {what}.")
       for name, what in (("cpu", "a processor"), ("memory", "memory"), ("io", "a disk"))},
    "process_cpu_seconds_total": Family(
        "counter", (), "Total user and system CPU time spent in seconds."),
    "process_open_fds": Family("gauge", (), "Number of open file descriptors."),
    "process_max_fds": Family("gauge", (), "Maximum number of open file descriptors."),
    "process_virtual_memory_bytes": Family("gauge", (), "Virtual memory size in bytes."),
    "process_resident_memory_bytes": Family("gauge", (), "Resident memory size in bytes."),
    "process_start_time_seconds": Family(
        "gauge", (), "Start time of the process since unix epoch in seconds."),
}


LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@lru_cache(maxsize=1024)
def braced(names, values):
    """Write labels as they stand behind a metric's name, such as `{container_id="104"}`."""
    pairs = ",".join(
        f'{name}="{text.translate(LABEL_ESCAPES)}"' for name, text in zip(names, values))
    return "{" + pairs + "}" if pairs else ""


def histogram(name, buckets, labels, counts):
    if not are_numbers(counts):
        return []
    lines, total, others = [], 0, labels[1:-1] + "," if labels else ""
    for bound, count in zip([*buckets, "+Inf"], counts):
        total += count
        lines.append(f'{name}_bucket{{{others}le="{bound}"}} {total}')
    return [*lines, f"{name}_sum{labels} {counts[-1]}", f"{name}_count{labels} {total}"]


def exposition(name, family, series):
    """Write a family's series {labels in braces: value} as lines.

    A value that is no number is left out: Prometheus would refuse the whole scrape for it.
    """
    if family.kind == "histogram":
        return [line for labels, counts in series.items()
                for line in histogram(name, family.buckets, labels, counts)]
    if not are_numbers(series.values()):
        series = {labels: value for labels, value in series.items() if are_numbers([value])}
    return [f"{name}{labels} {value}" for labels, value in series.items()]


FAILURE_LABELS = {400: "refused", 404: "not_found", 409: "conflict", 503: "unavailable"}


class Metrics:
    """Counters and histograms of this process, and their text exposition (format 0.0.4).

    `series` is {a family's name: {its labels' values, as a tuple: value}}.
    """

    def __init__(self):
        self.lock, self.series = threading.Lock(), {name: {} for name in FAMILIES}
        self.add("lxc_autoscale_api_build_info", VERSION, ".".join(map(str, sys.version_info[:3])))
        for name in ("rate_limited_total", "auth_failures_total", "connections_refused_total"):
            self.series["lxc_autoscale_api_" + name][()] = 0

    def add(self, name, *labels, value=None):
        """Count one more; for a histogram, count `value` in its bucket.

        A histogram keeps a list: the buckets' own counts, one for what is above all, and the sum.
        """
        buckets, series = FAMILIES[name].buckets, self.series[name]
        with self.lock:
            if value is None:
                series[labels] = series.get(labels, 0) + 1
                return
            counts = series.setdefault(labels, [0] * (len(buckets) + 1) + [0.0])
            counts[bisect_left(buckets, value)] += 1
            counts[-1] += value

    def count_scaling(self, change, known):
        """Count the end of a Change that scales; `known` are ids that some container has had.

        An id that no container has would make series without end.
        """
        (resource_name, action), problem = change.route.scaling, change.problem
        if not problem:
            self.add("lxc_autoscale_scaling_actions_total",
                     str(change.vm_id), resource_name, action)
            return
        container = str(change.vm_id) if change.vm_id in known else "unknown"
        self.add("lxc_autoscale_scaling_failures_total", container, resource_name,
                 FAILURE_LABELS.get(problem.status, "failed"))

    def render(self, gauges):
        """Write the exposition; `gauges`, {name: {labels in braces: value}}, were read just now."""
        with self.lock:
            series = {name: {braced(FAMILIES[name].labels, labels): copy(value)
                             for labels, value in each.items()}
                      for name, each in self.series.items()}
        lines = []
        for name, family in FAMILIES.items():
            samples = exposition(
                name, family, gauges.get(name) or dict(sorted(series[name].items())))
            if samples:
                lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}", *samples]
        return "\n".join(lines) + "\n"


def process_metrics():
    """Read the process_* families from /proc, as Prometheus's own clients do."""
    # The first of these is field 3 of proc(5).
    fields = read_text("/proc/self/stat").rpartition(")")[2].split()
    boot, tick = (
        int(re.search(r"^btime (\d+)", read_text("/proc/stat"), re.MULTILINE)[1]),
        os.sysconf("SC_CLK_TCK"))
    values = {
        "cpu_seconds_total": (int(fields[11]) + int(fields[12])) / tick,
        "open_fds": len(os.listdir("/proc/self/fd")) - 1,
        "max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "virtual_memory_bytes": int(fields[20]),
        "resident_memory_bytes": int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        "start_time_seconds": boot + int(fields[19]) / tick,
    }
    return {"process_" + name: {"": value} for name, value in values.items()}


# Processes

class Result(namedtuple("Result", "exit stdout stderr overflow")):
    """A command that ended.

    `exit` is its status, or minus the number of the signal that ended it, `overflow` that it
    was a read and its output was cut off at MAX_OUTPUT.
    """


# What a node runs for us. Its pct must print into files there, for pct takes a broken stdout for an
# interrupt, and sshd's pipe breaks with the connection; so it is not begun without 256 blocks of
# room. The files lose their names before it begins, so that nothing is left.
REMOTE = (
    "export LC_ALL=C.UTF-8 LANG=C.UTF-8; umask 022; file=/run/lxc_autoscale_api.$$; "
    'pct=$(command -v pct); [ -z "$pct" ] || [ -s "$pct" ] || '
    "{ echo $pct is empty >&2; exit 1; }; "                 # or the shell calls that a success
    "[ $(stat -fc %a /run/) -gt 256 ] || { echo /run is full >&2; exit 1; }; "
    "exec 3>$file.out 4>$file.err && rm $file.out $file.err || exit 1; "
    "unset code; trap 'exit ${code:+3}' EXIT; "     # if it cannot fork after this, not with 2
    '"$@" </dev/null >&3 2>&4 3>&- 4>&-; code=$?; '
    # What hangs in the kernel is not gone, though `timeout` is: it is waited for.
    "[ $code != 137 ] || while pgrep -s 0 -r D >/dev/null 2>&1; do sleep 0.2; done; "
    # So much of both and no more, for something may still print.
    "size=$(stat -Lc %s /dev/fd/3 /dev/fd/4) && set -- $size && "
    "{ [ $1 = 0 ] || head -c $1 /dev/fd/3; } && { [ $2 = 0 ] || head -c $2 /dev/fd/4; } && "
    "echo && echo $code $size"
)


def over_ssh(node, argv, seconds):
    """Turn an argument list for another Node into one to run here.

    It may run for at most so many seconds, if given. Proxmox's own tools reach each other
    this way, too (PVE::SSHInfo).
    """
    options = ["BatchMode=yes", f"HostKeyAlias={node.name}", "ConnectTimeout=3",
               "ServerAliveInterval=10", "ServerAliveCountMax=3",
               "ControlMaster=auto", f"ControlPath={RUN_DIR}/%C", "ControlPersist=300"]
    if node.known_hosts:
        options += [f"UserKnownHostsFile={node.known_hosts}", "GlobalKnownHostsFile=none"]
    if seconds:                             # here only ssh could be ended
        argv = ["timeout", "-s", "KILL", str(seconds), *argv]
    return ["ssh", "-e", "none", *(each for option in options for each in ("-o", option)),
            f"root@{node.address}", "--",
            shlex.join(["sh", "-c", REMOTE, "sh", *argv])]


def parse_reply(printed):
    """Split what REMOTE printed into (exit, stdout, stderr); None if some of it is missing.

    Of more than MAX_OUTPUT bytes, `printed` is the end only.
    """
    end = re.search(rb"\n(\d{1,15}) (\d{1,15}) (\d{1,15})\n\Z", printed)
    if not end:
        return None
    code, out, err = map(int, end.groups())
    if end.start() < out + err and len(printed) < MAX_OUTPUT:
        return None
    middle = max(0, end.start() - err)
    return code, printed[max(0, middle - out):middle], printed[middle:end.start()]


def ssh_failed(node, argv, begun, details):
    """Make the Problem for an ssh that ended without a word of its command's end.

    A change that had `begun` may run there still.
    """
    if begun:
        problem = Lost(504, f"The connection to node '{node.name}' was lost during "
                            f"{' '.join(argv[:3])}, which goes on if the node does. "
                            "Ask for the container's state before trying again")
    else:
        problem = unavailable(f"Node '{node.name}' cannot run commands over SSH; "
                              "to see why, on this host: "
                              f"pvesh get /nodes/{node.name}/version", RETRY_SECONDS, NotBegun)
    if details:
        problem.add_details(details[-MAX_DETAILS:])
    return problem


def ended(process, seconds):
    """Wait for a process's end, and tell whether it came within so many seconds, if given."""
    if not seconds:
        process.wait()
        return True
    deadline = time.monotonic() + seconds
    with suppress(OSError):                 # no descriptor may be left
        pidfd = os.pidfd_open(process.pid)  # the kernel wakes us; Popen.wait looks every 50 ms
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(seconds * 1000)
        os.close(pidfd)
    try:
        process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def failure(argv, result):
    """Log a command that failed, and return its Problem."""
    problem = explain_failure(argv, result)
    log.warning("failed: %s: exit %d: %s",
                shlex.join(argv), result.exit, problem.fields["details"])
    return problem


# What root's shell has after a login, as far as it does not speak of a terminal.
ROOT = {"HOME": "/root", "LOGNAME": "root", "SHELL": "/bin/bash", "USER": "root"}


def environment():
    """Return the environment of every command: root's, and of the daemon's own only PATH and TZ.

    What systemd tells its services (systemd.exec(5): the notification socket, the watchdog,
    where credentials are, …) is not for pct, storage tools and hook scripts. PATH says where
    they are, and in TZ's time zone `pct listsnapshot` prints what the daemon reads.
    """
    own = {name: os.environ[name] for name in ("PATH", "TZ") if name in os.environ}
    return {**ROOT, **own, "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"}


class Slots:
    """The slots of a node, in which commands run; long changes leave some of them to others.

    Of another node it is kept, too, when it was last tried, and the Problem of that, if any.
    """

    def __init__(self, width):
        self.width, self.semaphore = width, Semaphore(width)
        self.long = Semaphore(max(1, width - max(1, width // 4)))
        self.lock, self.tried, self.problem = threading.Lock(), -math.inf, None


class Commands:
    """Starts every process, each without a shell and with nothing on stdin.

    A node has `width` slots for commands: a read takes one for its command, a change one for all
    its commands, and a probe needs none.

    `node` is the Node where a command runs, or None for this one; on others MAX_SESSIONS is a
    bound, too. Each has a session of its own: what kills the daemon's group leaves it alone (and
    so does a stop of the unit, by its KillMode=process). Each has the umask of root's shell,
    whatever the daemon's own is: with 0077 a clone's folder is closed to its unprivileged
    container, which then never starts.
    """

    def __init__(self, width, read_seconds, workers, metrics):
        self.read_seconds, self.workers, self.metrics = read_seconds, workers, metrics
        self.environment = environment()
        self.lock, self.hung = threading.Lock(), {}
        self.own, self.nodes = Slots(width), {}         # of this node, and of others by name

    def gauges(self):
        known = [self.own, *self.nodes.values()]
        return {"lxc_autoscale_api_commands_in_progress": {"": sum(
                    each.width - each.semaphore.free for each in known)},
                "lxc_autoscale_api_commands_waiting": {"": sum(
                    len(semaphore.queue) for each in known
                    for semaphore in (each.semaphore, each.long))}}

    @contextmanager
    def slot(self, node, since=None, long=False):
        """Hold a slot to run commands on a node, which answers; Problem 503 if none is free."""
        deadline = time.monotonic() + SLOT_SECONDS
        slots = self.reachable(node, since) if node else self.own
        with ExitStack() as slot:
            try:
                for semaphore in (slots.long, slots.semaphore) if long else (slots.semaphore,):
                    slot.enter_context(semaphore.held(max(0, deadline - time.monotonic())))
            except TimeoutError:
                raise unavailable(f"Too many commands run{on(node) or ' on this host'}; "
                                  "try again later", SLOT_SECONDS) from None
            if node and slots.tried < time.monotonic() - 1:     # it may have gone meanwhile
                self.reachable(node, time.monotonic())
            yield slot

    def reachable(self, node, since):
        """Return the Slots of another node that answers; Problem 503 if it does not.

        To try it opens the connection that its commands share: so a change is not begun over one
        that is dead, and nobody waits for long for a node that is. A result found after `since`,
        by any thread, is reused for one second. A read (None) reuses for one second, too, that
        the node did not answer.
        """
        if not (node.online and node.address):
            raise unavailable(f"Node '{node.name}' is offline; "
                              "to see why, on this host: pvecm status", RETRY_SECONDS)
        with self.lock:
            slots = self.nodes.setdefault(node.name, Slots(min(self.own.width, MAX_SESSIONS)))
        asked = since or time.monotonic()   # what is found while we wait for it, counts
        with slots.lock:
            known = slots.tried >= time.monotonic() - 1 and (
                slots.tried >= asked or (slots.problem and not since))
            if not known:
                slots.problem = None
                try:
                    self.run(node, ["true"], seconds=REACH_SECONDS)
                except Problem as problem:
                    silent = ssh_failed(node, (), False, f"no answer within {REACH_SECONDS} s")
                    slots.problem = silent if problem.status == 504 else problem.again()
                slots.tried = time.monotonic()
            if slots.problem:
                raise slots.problem.again()
        return slots

    def read(self, node, *argv, check=False):
        """Run a command that changes nothing, in a slot of its own; return its Result."""
        with self.slot(node) as slot:
            return self.run(node, argv, slot, check)

    def run(self, node, argv, slot=None, check=False, seconds=None, changes=False):
        """Run a command, in the slot that the caller holds; return its Result, or raise Problem.

        One that `changes` something is never killed: the Problem is NotBegun if it was not begun,
        and Lost if nobody knows its end. Any other is killed with its whole group past so many
        seconds (None: read_seconds), and `slot` is kept while it cannot be ended. With `check`,
        it is a Problem, too, if the command failed or its output was cut off.
        """
        argv = [*map(str, argv)]
        seconds = None if changes else seconds or self.read_seconds
        if not changes and (node, *argv) in self.hung:
            raise self.still_hung(node, argv)
        label = " ".join(argv[:2] if argv[0] in ("pct", "pvesh") else argv[:1])
        started = time.monotonic()
        try:
            code, out, err, in_time = self.execute(node, argv, seconds, slot)
        except NotBegun:
            self.metrics.add("lxc_autoscale_api_commands_total", label, "not_started")
            raise
        took = time.monotonic() - started
        full = not changes and max(len(out), len(err)) >= MAX_OUTPUT
        reply = parse_reply(out) if node and in_time and not full else None
        code, out, err = reply or (code, out, err)
        if reply and 128 < code < 128 + signal.NSIG:
            code = 128 - code               # so a shell tells of a signal
        if node and seconds and took > seconds and code == -signal.SIGKILL:
            in_time = False                 # `timeout` there was a little faster than we
        how = "it cannot be ended" if code is None else f"exit {code}"
        log.info("ran %s%s: %s in %.3f s", shlex.join(argv), on(node), how, took)
        counted_as = "timeout" if not in_time else "ok" if code == 0 else "failed"
        self.metrics.add("lxc_autoscale_api_commands_total", label, counted_as)
        self.metrics.add("lxc_autoscale_api_command_duration_seconds", label, value=took)
        if code is None:
            raise self.still_hung(node, argv)
        if not in_time:
            raise Problem(
                504, f"{' '.join(argv[:3])}{on(node)} did not finish in {seconds} s and was ended")
        result = Result(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), full)
        if node and not (reply or full):
            begun = changes and code not in (1, 2)          # REMOTE ends so if it cannot begin
            raise ssh_failed(node, argv, begun, result.stderr.strip())
        if node and code == 127:            # as the shell there says it
            raise unavailable(f"{argv[0]} is not installed on node '{node.name}', "
                              "or not on its PATH", 60, NotBegun)
        if check and (code or full):
            raise failure(argv, result)
        return result

    def execute(self, node, argv, seconds, slot):
        """Start a process and wait for it; return (exit status, stdout, stderr, whether in time).

        Past so many seconds, if given, it is killed; its status is None if even so it does not end.
        What it prints, of which at most the last MAX_OUTPUT bytes are returned, goes into files in
        memory and no pipes: `pct` takes a broken stdout for an interrupt and kills its worker, and
        a pipe's end may be held open by some grandchild for ever.
        """
        with ExitStack() as files:
            try:
                stdout, stderr = outputs = [files.enter_context(open(
                    os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING),
                    "rb", buffering=0)) for _ in range(2)]
            except OSError as error:
                raise unavailable(f"The host has no room for a command's output: {error.strerror}",
                                  RETRY_SECONDS, NotBegun) from None
            if seconds:                     # a change may print what it likes
                for file in outputs:        # a write past the size fails with EPERM
                    os.ftruncate(file.fileno(), MAX_OUTPUT)
                    fcntl.fcntl(file.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
            command = over_ssh(node, argv, seconds) if node else argv
            try:
                if node:
                    os.makedirs(RUN_DIR, 0o700, exist_ok=True)
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                    start_new_session=True, cwd="/", umask=0o022, env=self.environment)
            except OSError as error:
                what = ("is not installed, or not on the daemon's PATH"
                        if isinstance(error, FileNotFoundError)
                        else f"cannot be started: {error.strerror}")
                raise unavailable(f"{command[0]} {what}", 60, NotBegun) from None
            in_time = ended(process, seconds)
            gone = in_time or self.kill(process, (node, *argv), slot)
            printed = []
            for file in outputs:
                size = file.tell()
                kept = min(size, MAX_OUTPUT)
                printed.append(os.pread(file.fileno(), kept, size - kept))
        return process.returncode if gone else None, *printed, in_time

    def kill(self, process, question, slot):
        """Kill a command's whole group, and tell whether it has ended.

        A process that hangs in the kernel does not end. It is left alone, its slots stay
        taken until it is gone, and the same is not asked again before. On another node it was
        killed there, and our ssh ends when it has gone.
        """
        node = question[0]
        if not (node and slot):
            os.killpg(process.pid, signal.SIGKILL)
        if ended(process, KILL_SECONDS):
            return True
        kept = slot.pop_all() if slot else ExitStack()
        self.hung[question] = process.pid
        kept.callback(self.hung.pop, question, None)

        def bury():
            with kept:
                process.wait()
        try:
            self.workers.start(bury)
        except Problem:                     # no thread is left to wait for its end
            kept.close()
        return False

    def still_hung(self, node, argv):
        return Problem(504, f"{' '.join(argv[:3])}{on(node)} hangs and cannot be ended "
                            f"(process {self.hung.get((node, *argv), 'gone now')}); "
                            "the storage or /etc/pve behind it does not answer")


# The host

def cpu_meter(clock):
    """Begin to measure; return a function that tells in percent how busy processors were since.

    clock() returns (busy, total), or None where nobody tells, and the function does so, too. If
    `total` is the time of one processor, their number is its argument. At least 0.1 s is
    measured, and the time that a command takes meanwhile counts into it.
    """
    begun, before = time.monotonic(), clock()

    def share(processors=1):
        if not before or not processors:
            return None
        time.sleep(max(0, begun + 0.1 - time.monotonic()))
        after = clock()
        return after and round(
            max(0, after[0] - before[0]) / max(1e-6, after[1] - before[1]) / processors * 100, 2)
    return share


def listed_container(vm_id, node, name, status, cores, memory, uptime, onboot, marked):
    lock, template, tags = marked
    return {"vm_id": vm_id, "lxc_id": vm_id, "node": node, "name": name, "status": status,
            "cores": cores, "memory": memory, "uptime": uptime,
            "lock": lock, "template": template, "onboot": onboot, "tags": tags}


def described_by(vm_id, document):
    """Return what /metrics says of a container by its configuration.

    That is: its labels in braces, whether it is a template, [(family, labels, value)].
    """
    values, own_id = parse_config(document).current, str(vm_id)
    (cores, memory, _), (lock, template, _) = allotted(values), marks(values)
    samples = [("info", (own_id, container_name(vm_id, values)), 1),
               ("locked", (own_id, lock), lock and 1),
               ("cpu_cores", (own_id,), cores), ("memory_mb", (own_id,), memory),
               ("memory_limit_bytes", (own_id,), memory and memory * MIB)]
    return braced(ONE, (own_id,)), template, [
        (CONTAINER + family, braced(FAMILIES[CONTAINER + family].labels, labels), value)
        for family, labels, value in samples if value is not None]


class Proxmox:
    """What the API needs from the host and, if `clustered`, its cluster.

    Ids are integers; what fails is a Problem.

    A `node` is the Node of the cluster where something is asked for, or None for this one.
    """

    def __init__(self, commands, files, pve_dir, cgroup_dir, clustered):
        self.commands, self.files = commands, files
        self.disks = Files(files.workers)   # apart: a storage that hangs must not stop the rest
        self.pve, self.cgroups = ClusterFiles(pve_dir, clustered), Cgroups(cgroup_dir)
        self.probing, self.probed = threading.Lock(), (-math.inf, False, "")
        self.described = {}                 # by id, what the last scrape read in the configurations

    def config(self, vm_id, max_cores, max_memory):
        """Return what is allotted, and what may be: within the bounds, and what its node has."""
        node, document = self.files.read(self.pve.text, vm_id)
        if document is None:                # pct tells why
            document = self.ask(node, "pct", "config", vm_id)
        # Of a disk that is to be changed at the next start, the size is the one that it has now.
        values, disks, _ = parse_config(document)
        size = size_in_gb(option(disks.get("rootfs"), "size"))
        cores, megabytes, swap = allotted(values)
        cpus, memory = self.capacity(node)
        return {
            "vm_id": vm_id, "lxc_id": vm_id,
            "cores": cores, "memory_mb": megabytes, "swap_mb": swap,
            "disk_gb": size, "hostname": values.get("hostname"),
            "limits": {
                "cores": {"min": CORES.schema["minimum"], "max": min(max_cores, cpus)},
                "memory_mb": {"min": MEMORY.schema["minimum"], "max": min(max_memory, memory)},
                "disk_gb": {"min": size},
            },
            "mountpoints": mount_points(disks),
        }

    def capacity(self, node):
        """Return (processors, memory in MB) of a node, each infinite where nobody tells."""
        if not node:
            return (os.cpu_count() or math.inf,
                    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB)
        fields = self.files.read(self.pve.broadcast).get(("node", node.name), [])
        cpus, memory = (number(field) for field in (fields + [""] * 8)[4:8:3])
        return cpus or math.inf, memory // MIB if memory else math.inf

    def status(self, vm_id):
        return self.on_its_node(vm_id, lambda node: self.status_at(node, vm_id))

    def status_at(self, node, vm_id):
        """Return a container's state, from its file and cgroup, else from `pct status`."""
        cpu_usage = cpu_meter(lambda: self.cpu_clock(node, vm_id))
        values = None if node else self.files.read(self.read_status, vm_id)
        values = values or parse_status(self.ask(node, "pct", "status", vm_id, "--verbose"))
        if not node and values.get("pid") and "disk" not in values:
            values["disk"], whole = self.disk_space(values["pid"])
            # A subvol without quota, or a folder of the host, has no size of its own.
            values["maxdisk"] = values["maxdisk"] or whole
        get, stopped = values.get, values.get("status") == "stopped"
        lock, template, tags = marks(values)
        pressure = {name: get(f"pressure{name}some") for name in PRESSURES}
        return {
            "vm_id": vm_id, "lxc_id": vm_id, "node": node.name if node else self.node_name(),
            "name": get("name"), "status": get("status"),
            "lock": lock, "template": template, "tags": tags,
            "cpu": get("cpus"), "cpu_usage": 0 if stopped else cpu_usage(get("cpus")),
            "memory": in_unit(get("maxmem"), MIB), "memory_used": in_unit(get("mem"), MIB),
            "memory_shared": 0 if stopped else in_unit(get("shared"), MIB),     # pct does not tell
            "swap": in_unit(get("maxswap"), MIB), "swap_used": in_unit(get("swap"), MIB),
            "pressure": None if set(pressure.values()) == {None} else pressure,
            "disk": in_unit(get("maxdisk"), GIB),
            # Of a stopped one pct says 0, and does not know.
            "disk_used": None if stopped else in_unit(get("disk"), GIB),
            "uptime": get("uptime"), "network_in": get("netin"), "network_out": get("netout"),
            "disk_read": get("diskread"), "disk_write": get("diskwrite"),
        }

    def read_status(self, vm_id):
        """Return the keys of `pct status --verbose`, and `shared`, without a process.

        None where the files are not there.
        """
        document = self.pve.texts([vm_id], None)[vm_id]
        up = self.cgroups.runs(vm_id)
        usage = self.cgroups.usage(f"{self.cgroups.lxc}/{vm_id}/") if up else None
        if document is None or not self.cgroups.are_there() or (up and usage is None):
            return None
        values, pid = parse_config(document).current, self.cgroups.init_pid(vm_id)
        _, memory, swap = allotted(values)
        size = size_in_gb(option(values.get("rootfs"), "size"))
        found = {
            "name": container_name(vm_id, values), "status": "running" if up else "stopped",
            "cpus": processors(values), "maxmem": memory and memory * MIB,
            "maxswap": swap if swap is None else swap * MIB, "maxdisk": size and size * GIB,
            **{key: values.get(key) for key in ("lock", "template", "tags")},
        }
        if not up:
            return {**found, **dict.fromkeys(
                ("mem", "swap", "uptime", "netin", "netout", "diskread", "diskwrite"), 0)}
        netin, netout = read_traffic().get(vm_id, (None, None))
        return {**found, "mem": usage.memory, "shared": usage.shared, "swap": usage.swap,
                "pid": pid, "uptime": process_uptime(pid),
                **{f"pressure{name}some": getattr(usage, f"pressure_{name}")
                   for name in PRESSURES},
                "netin": netin, "netout": netout,
                "diskread": usage.disk_read, "diskwrite": usage.disk_write}

    def disk_space(self, pid):
        """Return (bytes in use, bytes) of a root disk, seen through the init there, or Nones."""
        try:
            return self.disks.read(space, f"/proc/{pid}/root")
        except Problem:
            return None, None

    def cpu_clock(self, node, vm_id):
        """Return (processor time used, time) in seconds by a container's cgroup (v2), or None."""
        stat = self.text_at(node, f"{self.cgroups.lxc}/{vm_id}/cpu.stat")
        used = row_number("usage_usec", stat)
        return None if used is None else (used / 1e6, time.monotonic())

    def list(self):
        """Return all containers, from their files and states, else, of this node, from pvesh."""
        own = self.node_name()
        rows, complete = self.files.read(self.read_list, own)
        found = []
        if not complete:
            found = [listed_container(int(row["vmid"]), own,
                                      str(row.get("name") or f"CT{row['vmid']}"),
                                      row.get("status"), decimal(str(row.get("cpus"))),
                                      in_unit(row.get("maxmem"), MIB), row.get("uptime"),
                                      None, marks(row))
                     for row in self.ask_json(None, f"/nodes/{own}/lxc")]
        return sorted(found + rows, key=lambda row: row["vm_id"])

    def read_list(self, own):
        """Return (the containers whose files are there, whether this node's are among them)."""
        nodes, found = self.pve.others(), []
        broadcast = self.pve.broadcast() if nodes else {}
        self.pve.check_mounted()
        complete = is_there(self.pve.lxc) and self.cgroups.are_there()
        if complete:
            nodes.append(None)
        for node in nodes:
            for vm_id, (_, values, _) in self.pve.confs(node).items():
                status, uptime = self.state(node, vm_id, broadcast)
                cores, memory, _ = allotted(values)
                found.append(listed_container(
                    vm_id, node.name if node else own, container_name(vm_id, values), status,
                    cores, memory, uptime, is_true(values.get("onboot")), marks(values)))
        return found, complete

    def state(self, node, vm_id, broadcast):
        """Return (status, uptime in seconds) by a container's cgroup or broadcast, or Nones."""
        if node:
            fields = broadcast.get(("vm", str(vm_id))) if node.online else None
            return broadcast_state(fields)
        if not self.cgroups.runs(vm_id):
            return "stopped", 0
        return "running", process_uptime(self.cgroups.init_pid(vm_id))

    def gauges(self):
        """Return the container families at this moment, without a process.

        What the files do not say is left out. What the last scrape knew of a configuration
        is reused if its text is the same; its inode and times would not tell, for pmxcfs counts
        whole seconds (cfs-plug-memdb.c).
        """
        families = {name: {} for name in FAMILIES if name.startswith(CONTAINER)}
        self.pve.check_mounted()
        has_cgroups, traffic, described = self.cgroups.are_there(), read_traffic(), {}
        for vm_id, document in self.pve.documents():
            known = self.described.get(vm_id)
            if not known or known[0] != document:
                known = document, *described_by(vm_id, document)
            described[vm_id] = known
        self.described, usages = described, self.cgroups.usages(described)
        up, received, sent = (families[CONTAINER + name] for name in (
            "up", "network_receive_bytes_total", "network_transmit_bytes_total"))
        for vm_id, (_, one, template, samples) in described.items():
            if has_cgroups and not template:
                up[one] = 1 if vm_id in usages else 0
            if vm_id in traffic:
                received[one], sent[one] = traffic[vm_id]
            for name, labels, value in samples:
                families[name][labels] = value
        ones = [described[vm_id][1] for vm_id in usages]
        for field, values in zip(Usage._fields, zip(*usages.values())):
            if field in CONTAINER_USAGE:
                families[CONTAINER + CONTAINER_USAGE[field]] = {
                    one: value for one, value in zip(ones, values) if value is not None}
        return families

    def snapshots(self, vm_id):
        _, document = self.files.read(self.pve.text, vm_id)
        if document is not None:
            return snapshots_of(parse_config(document))
        return parse_snapshots(self.on_its_node(
            vm_id, lambda node: self.ask(node, "pct", "listsnapshot", vm_id)))

    def node_status(self, name):
        """Return a node's load: of this node from /proc, of any other from its pvesh.

        The processors are measured before pvesh is started, which would count as load itself.
        """
        own, cluster = self.files.read(self.pve.members)
        known = cluster.nodes if cluster else {own: None} if own else {}
        if known and name not in known:
            raise Problem(
                404, f"Node '{name}' does not exist; known here: {', '.join(sorted(known))}")
        node = known.get(name)
        node = (None if node is None or node.local
                else self.files.read(self.pve.with_known_hosts, node))
        here = not node and (known or name == self.node_name())
        cpu_usage = cpu_meter(lambda: self.node_cpu_clock(node) if node or here else None)()
        data = self.files.read(read_node) if here else self.ask_json(node, f"/nodes/{name}/status")
        memory, swap, disk = (data.get(key) or {} for key in ("memory", "swap", "rootfs"))
        total, used = memory.get("total"), memory.get("used")
        version = re.match(r"[^/]*/([^/]+)", data.get("pveversion") or "")
        return {
            "node": name, "cpu_usage": cpu_usage,
            "cpu_count": (data.get("cpuinfo") or {}).get("cpus"),
            "load_average": ([float(each) for each in data["loadavg"]]
                             if data.get("loadavg") else None),
            "memory_usage": round(used / total * 100, 2) if total and used is not None else None,
            "memory_total": in_unit(total, MIB), "memory_used": in_unit(used, MIB),
            "swap_total": in_unit(swap.get("total"), MIB),
            "swap_used": in_unit(swap.get("used"), MIB),
            "disk_total": in_unit(disk.get("total"), GIB),
            "disk_used": in_unit(disk.get("used"), GIB),
            "uptime": data.get("uptime"), "version": version and version[1],
        }

    def node_cpu_clock(self, node):
        """Return (busy, total) of all processors of a node since its start, in ticks, or None."""
        ticks = re.match(r"cpu +((?:\d{1,20} ){7}\d{1,20})",
                         self.text_at(node, f"{PROC}/stat") or "")
        ticks = ticks and [int(each) for each in ticks[1].split()]
        return ticks and (sum(ticks) - ticks[3] - ticks[4], sum(ticks))

    def node_name(self):
        """Return this node's name, which is its host name without a domain."""
        return self.files.read(self.pve.members)[0] or socket.gethostname().split(".")[0]

    def cluster_status(self):
        """Return the cluster's nodes and quorum: from .members, or of a single host, from pvesh."""
        _, cluster = self.files.read(self.pve.members)
        if cluster:
            return {"cluster": cluster.name, "quorate": cluster.quorate, "nodes": [
                {"name": node.name, "online": node.online,
                 "local": node.local, "address": node.address}
                for _, node in sorted(cluster.nodes.items())]}
        rows = self.ask_json(None, "/cluster/status")
        found = next((row for row in rows if row.get("type") == "cluster"), None)
        return {
            "cluster": found and found.get("name"),
            # A single host has no quorum to lose.
            "quorate": bool(found.get("quorate")) if found else True,
            "nodes": [{"name": row.get("name"), "online": bool(row.get("online")),
                       "local": bool(row.get("local")), "address": row.get("ip")}
                      for row in rows if row.get("type") == "node"],
        }

    def health(self):
        """Return (whether `pct` works, what it said), at most PROBE_SECONDS old.

        Nobody asks this twice at once.
        """
        with self.probing:
            if self.must_probe():
                self.probed = self.probe()
            return self.probed[1:]

    def must_probe(self):
        return time.monotonic() - self.probed[0] > PROBE_SECONDS

    def probe(self):
        """Run `pct list`, without a slot: long changes must not look like a fault."""
        started = time.monotonic()
        try:
            self.commands.run(None, ["pct", "list"], check=True)
            ok, detail = True, f"pct list answered in {time.monotonic() - started:.2f} s"
        except Problem as problem:
            ok, detail = False, problem.error
        return time.monotonic(), ok, detail

    def ask(self, node, *argv):
        return self.commands.read(node, *argv, check=True).stdout

    def ask_json(self, node, path):
        try:
            return JSON.decode(self.ask(node, "pvesh", "get", path, "--output-format", "json"))
        except NOT_JSON:
            raise Problem(500, f"pvesh get {path} printed no JSON") from None

    def on_its_node(self, vm_id, run):
        """Return run(node) for a container's node; it is run again if that has moved meanwhile."""
        node = self.files.read(self.pve.find, vm_id)
        try:
            return run(node)
        except Problem as problem:
            now = self.files.read(self.pve.find, vm_id) if problem.status == 404 else node
            if now == node:
                raise
        return run(now)

    def text_at(self, node, path):
        """Return a small file's text on any node, or None if it is not there.

        Of another node it is None, too, if it cannot be read.
        """
        if not node:
            return self.files.read(read_text, path)
        result = self.commands.read(node, "cat", path)
        return result.stdout if result.exit == 0 else None


# Changing

LONG_TIMEOUT = "long_change_timeout_seconds"            # of changes that may take hours
CLIENT_LEFT = 499           # in log and metrics, as nginx has it: there was nobody to answer

# The lock that a command sets, and what is done after `pct unlock`.
OWN_LOCKS = {
    "snapshot": ("snapshot", " && pct delsnapshot {vm_id} {name}"),
    "delsnapshot": ("snapshot-delete", " && pct delsnapshot {vm_id} {name}"),
    "rollback": ("rollback", " && pct rollback {vm_id} {name}{start}"),
    "clone": ("disk", ""),
    "destroy": ("destroyed", " && pct destroy {vm_id}"),
}
POWER = ("start", "stop", "shutdown", "reboot")

# What a command refuses before it begins, as the caller is told it, whatever else happens to
# the container. All else may be said in the middle of its work.
AT_ONCE = re.compile(
    r"\w+: The container is (?:locked by Proxmox|protected|under Proxmox HA|replicated)"
    r"|(?:delsnapshot|rollback): A replication runs or needs this snapshot"
    r"|(?!delsnapshot)\w+: The container is a template"     # that one sets its lock before it looks
    rf"|\w+: {OLD_PCT}|resize: (?:The disk has this size already|A disk cannot shrink)"
    r"|\w+: The id \d+ is taken|\w+: Snapshot '[^']*' exists already"
    r"|destroy: Another Proxmox command holds the container"
    rf"|(?:{'|'.join(POWER)}): (?:VM \d+ is (?:not|already) running|Proxmox HA has the container)")

# What a resize or a set says, perhaps after the volume has grown or the running container has the
# value already, of the file in which that is to be noted (PVE::API2::LXC, resize_vm:
# volume_resize, then write_config; PVE::API2::LXC::Config, update_vm: update_pct_config, then
# write_config): so the file does not tell that nothing was done.
CONFIG_UNWRITTEN = re.compile(rf"'/etc/pve/[^']*\.conf(?:\.tmp\b|')|{TASK_KILLED}")

# What a resize says when its storage's lock was held for too long by itself: the tool that grows
# the volume goes on then (PVE::Cluster, cfs_lock; LVMPlugin, volume_resize).
GROWS_ON = re.compile(r"'storage-[^']*'-locked command timed out")

# What pct says when it has asked HA, and done no more (PVE::API2::LXC::Status).
ASKED_HA = re.compile(r"^Requesting HA (start|stop) for CT", re.MULTILINE)

# What a clone or snapshot says when it could not remove again what it had made on a storage, or
# was broken off while it made it (free_image and volume_snapshot_delete of the plugins in
# pve-storage; PVE::Cluster, cfs_lock). The configurations are as before then, but for a lock.
NOT_CLEANED_UP = re.compile(
    r"lvremove |rbd (?:rm|snap rm|snap purge|unprotect) |can't unmap rbd |subvolume delete "
    r"|cannot (?:destroy|remove)|cannot set property for '[^']*@"
    r"|unlink .{1,4200} failed|-locked command timed out"
    r"|[Ff]ailed to (?:remove|delete)(?! (?:source|target) CT config)")
# Its task says what a cleanup has died of on stdout, and what itself has died of on stderr.
BEGUN_ON_STORAGE = re.compile(r"create (?:full|linked) clone of mount|starting cleanup")
CLEANUP_DIED = re.compile(r"^(?:rbd error: |storage '|cfs-lock |can't lock file)", re.MULTILINE)

# What a clone says that was refused and could not take back its locks (PVE::API2::LXC, clone_vm).
LOCK_STAYED = re.compile(r"^Failed to remove (?:source|target) CT config", re.MULTILINE)

# What a clone says on stdout that ended well, but could not take back its source's lock: another
# task has kept the source for itself for too long (PVE::API2::LXC, clone_vm).
SOURCE_STAYED_LOCKED = re.compile(
    r"^(?:can't lock file '[^']*/pve-config-\d+\.lock'|unable to open file '/etc/pve/)",
    re.MULTILINE)

# What a rollback says before it looks for locks (PVE::AbstractConfig, snapshot_rollback, and
# PVE::Replication, prepare), and of a volume that it removes before it makes it anew from its
# snapshot, or that an earlier one has removed (LvmThinPlugin, volume_snapshot_rollback).
REPLICATION_BROKEN = re.compile(r"(?:removing|delete stale) replication snapshot '")
VOLUME_REMOVED = re.compile(
    r'(?:Logical volume "(?=[^"]*" successfully removed)|Failed to find logical volume "[^/"]*/)'
    r'(vm-[^"]*)"')


def may_have_left_volumes(result):
    """Tell whether a clone or snapshot that failed has said that it could not clean up."""
    begun = BEGUN_ON_STORAGE.search(result.stdout)
    return bool(NOT_CLEANED_UP.search(result.stdout + result.stderr)
                or (begun and CLEANUP_DIED.search(result.stdout, begun.end())))


def destroying(vm_id, values):
    """Return the commands that destroy a container with this {key: text}.

    A clone is protected if its source was (PVE::API2::LXC, clone_vm).
    """
    protected = is_true(values.get("protection"))
    return f"pct set {vm_id} --protection 0 && " * protected + f"pct destroy {vm_id}"


def starts_with_node(node, vm_id, values):
    """Return what to say of a container that is not to be started, if Proxmox will do so.

    A clone is started with its node if its source is (PVE::API2::LXC, clone_vm).
    """
    if not is_true(values.get("onboot")):
        return []
    return [f"VM {vm_id} will be started with its node (onboot: 1); against that{on(node)}: "
            f"pct set {vm_id} --onboot 0"]


def lock_in(document):
    """Return the lock in the text of a configuration, if there are both."""
    return parse_config(document or "").current.get("lock")


class Change:
    """What somebody asked to be changed: by whom, where, how far it came, and what it leaves.

    A handler runs the steps, each by `pct`. `steps` are the commands that were begun and may
    have changed something, and `lost` those among them whose end or whose result nobody knows.
    The `outcome` of a change that failed follows from these two, and from nothing else.
    `started` is done once it has begun, or will never begin. `future` has its result: pending
    while it waits, running, cancelled if it will never begin, done.
    """

    def __init__(self, route, values, client, host):
        # What was asked for, and by whom.
        self.id, self.route, self.values, self.client, self.host = (
            os.urandom(8).hex(), route, values, client, host)
        self.vm_id, self.containers = values["vm_id"], tuple(values[name] for name in route.changes)
        # Quoted, a text cannot look like the rest of a log's line.
        shown = "".join(
            f" {name}={value!r}" if re.search(r"[^\w./:-]", str(value)) else f" {name}={value}"
            for name, value in values.items() if value is not None)
        self.title = f"{route.method} {route.path}{shown}"
        self.long = route.timeout == LONG_TIMEOUT or values.get("timeout", 0) > 60
        # Its life. Moments are epoch seconds, but `since`, from which waiting is measured.
        self.requested, self.since = time.time(), time.monotonic()
        self.began = self.ended = None
        self.started, self.future = Future(), Future()
        self.problem = None                 # how it has failed
        # Where it runs, and how it was there before the first step.
        self.node = self.slot = None
        self.before = None                  # {id: text of its configuration, or None}
        self.ran = None                     # whether the container ran, None if nobody asked
        # Its steps.
        self.steps, self.done, self.lost = [], [], []       # done: those that have ended well
        # Once the daemon stops, no further one is begun; the lock decides which was the last.
        self.lock, self.broken_off = threading.Lock(), False
        self.killed = False                 # a command was, and its task may still be at work
        self.kept_locks = []                # steps that have ended well, but left their lock
        self.snapshot_gone = False          # from the storage; the configuration names it
        self.removed_volumes = []           # by a rollback, which was to make them anew
        # A clone's temporary snapshot; its id once it is whole; its hostname; whether it has `ip`.
        self.temporary = self.clone = self.hostname = None
        self.addressed = False
        # What is told: what was done, if it fails; what stays behind, however it ends.
        self.notes, self.left = [], []
        self.told_locks = set()             # the containers whose locks `left` tells
        self.warnings, self.data = [], {}   # of the answer, if all goes well

    # For the handlers

    def pct(self, command, *arguments, vm_id=None):
        """Run `pct COMMAND ID ARGUMENTS...` there; return its Result, or raise Problem."""
        argv = ["pct", command, str(vm_id or self.vm_id), *map(str, arguments)]
        with self.lock:
            if self.broken_off:
                raise stopping()
            self.steps.append(argv)
            self.lost.append(argv)
        try:
            result = self.host.commands.run(self.node, argv, changes=True)
        except NotBegun as problem:
            self.steps.pop()
            self.lost.pop()
            if self.steps:
                problem.error = f"{' '.join(argv[:3])} was not begun: {problem.error}"
            raise
        self.lost.pop()
        self.killed |= result.exit < 0
        if result.exit:
            raise self.failed(argv, result)
        self.done.append(argv)
        if command == "rollback":
            self.leave(*self.left_by(argv, result))
        if command == "snapshot":           # it ends well even if it leaves the container frozen
            with suppress(Problem):         # it was taken, whatever can be read now
                for told in self.frozen():
                    self.leave(told)
        if command == "clone" and SOURCE_STAYED_LOCKED.search(result.stdout):
            self.keep_lock(argv)
        # stderr says nothing of the work that was done: storages, plugins and old lines of a
        # configuration have something to say at every call.
        said = map(str.strip, result.stderr[-MAX_DETAILS:].splitlines())
        self.warnings += filter(None, said)
        asked = ASKED_HA.search(result.stdout)
        if asked:
            self.warnings.append(f"Proxmox HA was asked to {asked[1]} VM {self.vm_id} and may do "
                                 "so later; ask for the container's state")
        return result

    def failed(self, argv, result):
        """Return the Problem for a command that failed, and note what it says to have left.

        The command is no step any more if it is known to have changed nothing.
        """
        problem = failure(argv, result)
        self.snapshot_gone = problem.error == SNAPSHOT_GONE
        if argv[1] == "rollback":
            self.removed_volumes = VOLUME_REMOVED.findall(result.stdout + result.stderr)
        left = self.left_by(argv, result)
        self.leave(*left)
        if not left and self.changed_nothing(argv, result, problem):
            self.steps.pop()
        return problem

    def left_by(self, argv, result):
        """Return what a command says to have changed or left that its end does not tell.

        Of a rollback this is so however it ends, of others if they failed.
        """
        if argv[1] == "resize" and (CONFIG_UNWRITTEN.search(result.stderr)
                                    or GROWS_ON.search(result.stderr)):
            return [f"The volume of VM {self.vm_id} may have grown, though its configuration does "
                    f"not have the new size; to enter what it has{on(self.node)}: "
                    f"pct rescan --vmid {self.vm_id}"]
        if argv[1] == "set" and CONFIG_UNWRITTEN.search(result.stderr):
            return [f"If VM {argv[2]} runs, it may have the new value until its next start"]
        if argv[1] == "rollback" and REPLICATION_BROKEN.search(result.stdout):
            return [f"VM {self.vm_id} has lost replication snapshots, and will be replicated as a "
                    f"whole unless you keep snapshot '{argv[3]}' until the next replication is "
                    "done"]
        if argv[1] in ("clone", "snapshot") and may_have_left_volumes(result):
            vm_id = argv[3] if argv[1] == "clone" else argv[2]
            return [f"A volume of VM {vm_id}, or a snapshot of one, may be left on its storage; "
                    f"look for it{on(self.node)} with: pvesm list STORAGE --vmid {vm_id}"]
        return []

    def changed_nothing(self, argv, result, problem):
        """Tell whether the last command, which failed, is known to have changed nothing.

        Either Proxmox refused it before it began, or it was the first step and all is as before.
        """
        at_once = not LOCK_STAYED.search(result.stderr) and (
            problem.status in (400, 404) or AT_ONCE.match(f"{argv[1]}: {problem.error}"))
        if at_once and not (argv[1] == "clone" and "locked" in problem.error
                            and not self.is_untouched(int(argv[3]))):
            return True
        # A destroy frees volume after volume, and changes the configuration only when all have
        # gone (PVE::LXC, destroy_lxc_container): so that does not tell that nothing was done.
        passing = argv[1] != "destroy" and (
            problem.status == 503 or (problem.status != 500 and argv[1] not in POWER))
        return passing and len(self.steps) == 1 and self.is_as_before()

    def is_untouched(self, vm_id):
        """Tell whether a container's file is known to be as before: the same, or not there.

        Before 4.2-2, pve-container made a clone's file before it looked for its source's lock.
        """
        try:
            return self.read(self.host.pve.conf_path(vm_id)) == self.before[vm_id]
        except Problem:
            return False

    def keep_lock(self, argv):
        """Note that a clone has ended well, but has left its source locked, and tell so.

        Of one from a temporary snapshot this is told where that is to be removed.
        """
        self.kept_locks.append(argv)
        if self.temporary:
            return
        try:
            told = self.lock_left(self.vm_id, self.texts())
        except Problem:
            told = [f"VM {self.vm_id} may be left with the lock 'disk'; if no task of it runs, "
                    f"mend it{on(self.node)} with: pct unlock {self.vm_id}"]
        self.leave(*told)
        self.told_locks.add(self.vm_id)

    def verify(self, read):
        """Return read(), which tells what a step has done; if that fails, nobody knows."""
        try:
            return read()
        except Problem as problem:
            self.lost.append(self.steps[-1])
            problem.error = (f"{' '.join(self.steps[-1][:3])} has ended, "
                             f"but what it did cannot be read: {problem.error}")
            raise

    def runs_now(self):
        """Tell whether the container runs, by its cgroup if that says so, for pct takes long."""
        pids = only_number(self.read(f"{self.host.cgroups.lxc}/{self.vm_id}/pids.current"))
        return bool(pids) or self.state() == "running"

    def conf(self, vm_id=None):
        """Return the container's Conf as its own node has it.

        In this node's /etc/pve, a change on another node is seen some milliseconds later.
        """
        vm_id = vm_id or self.vm_id
        text = self.read(self.host.pve.conf_path(vm_id))
        if text is None:
            text = self.host.commands.run(
                self.node, ["pct", "config", vm_id], self.slot, check=True).stdout
        return parse_config(text)

    @contextmanager
    def temporary_snapshot(self):
        """Take a snapshot, yield its name, and remove it unless something may still need it."""
        name = self.temporary = TEMPORARY_SNAPSHOT + os.urandom(4).hex()
        try:
            self.pct("snapshot", name)
            yield name
        finally:
            if self.steps:                  # else it was refused
                self.remove_temporary(name)
            self.temporary = None

    def remove_temporary(self, name):
        """Remove a temporary snapshot, or tell in `left` how to."""
        what, how = (f"The temporary snapshot '{name}' of VM {self.vm_id}",
                     f"remove it{on(self.node)} with: ")
        command, why, locked, there = f"pct delsnapshot {self.vm_id} {name}", "", None, True
        if not self.lost:
            try:
                conf = self.conf()
                there = name in conf.snapshots
                if not there and not self.killed:       # else it may yet come
                    return
                # While a lock is there that a step has left, pct would refuse.
                locked = there and self.own_lock(conf)
                if there and not locked:
                    self.pct("delsnapshot", name)
                    self.notes.append(f"{what} was removed again")
                    return
            except Problem as problem:
                why = f" ({problem.error})"
                command += " --force 1" * self.snapshot_gone
                if problem.status == 404:   # it may have moved
                    with suppress(Problem):
                        node = self.host.files.read(self.host.pve.find, self.vm_id)
                        how = f"remove it{on(node)} with: "
                if not self.lost:
                    with suppress(Problem):
                        conf = self.conf()
                        if name not in conf.snapshots and not self.killed:
                            self.notes.append(f"{what} was removed again")
                            return
                        locked = self.own_lock(conf)
        if self.lost or not there:
            self.leave(self.tell_temporary("may be left"))
            return
        if locked:
            self.told_locks.add(self.vm_id)
            how, command = (f"if no task of VM {self.vm_id} runs, {how}",
                            f"pct unlock {self.vm_id} && {command}")
        self.leave(f"{what} could not be removed{why}; {how}{command}")

    def tell_temporary(self, state):
        """Return how to remove the temporary snapshot later."""
        return (f"The temporary snapshot '{self.temporary}' of VM {self.vm_id} {state}; "
                f"once no task of VM {self.vm_id} runs, remove it{on(self.node)} with: "
                f"pct delsnapshot {self.vm_id} {self.temporary}")

    def leave(self, *texts):
        for text in texts:
            self.left.append(text)
            log.warning("%s", text)

    # Looking

    def state(self, vm_id=None):
        """Return `running` or `stopped`, as pct says, or None if it says no state."""
        result = self.host.commands.run(
            self.node, ["pct", "status", vm_id or self.vm_id], self.slot, check=True)
        found = re.search(r"^status: (.*)", result.stdout, re.MULTILINE)
        return found and found[1].strip()

    def read(self, path):
        """Return a file's text as the node has it, or None if it is not there.

        One that cannot be read is a Problem, and not taken for one that is not there.
        """
        if not self.node:
            return self.host.files.read(read_text, path)
        result = self.host.commands.run(self.node, ["cat", path], self.slot)
        if result.stderr.endswith(": No such file or directory\n"):
            return None
        if result.exit or result.overflow:
            raise failure(("cat", path), result)
        return result.stdout

    def texts(self):
        """Return {id: text, or None} of the containers' configurations, as the node has them."""
        return {vm_id: self.read(self.host.pve.conf_path(vm_id)) for vm_id in self.containers}

    def own_lock(self, conf):
        """Return the lock in the container's Conf, if it is one that a step has left there.

        A step that has ended well has taken its own away again.
        """
        own = [OWN_LOCKS[step[1]][0] for step in self.failed_steps() + self.kept_locks
               if step[1] in OWN_LOCKS]
        lock = conf.current.get("lock")
        return lock if lock in own else None

    def failed_steps(self):
        return [step for step in self.steps if step not in self.done]

    def is_as_before(self):
        """Tell whether the containers are as before the first step, by their files and state."""
        try:
            return (self.texts() == self.before
                    and (self.ran is None or (self.state() == "running") == self.ran)
                    and not (self.ran_any("snapshot") and self.frozen()))
        except Problem:
            return False

    # Its life

    def run(self, node, slot):
        """Run the steps on a node, and return the Answer; Problem 404 if it has no container."""
        self.node, self.slot, self.steps, self.done, self.lost = node, slot, [], [], []
        self.before = self.host.files.read(self.host.pve.texts, self.containers, node)
        message = self.route.handler(self, **self.values)
        if self.warnings or self.left:
            self.data["warnings"] = self.all_warnings()
        return success(message, self.data or None)

    def break_off(self):
        """Begin no further step, for the daemon stops."""
        with self.lock:
            self.broken_off = True

    def goes_on(self):
        """Return what a daemon that stops tells of a change that it leaves."""
        last = self.steps[-1:]              # a copy, for its thread goes on meanwhile
        step = " ".join(last[0][:4]) if last else "nothing"
        return f"{step} goes on in Proxmox, and what was to follow it will not be done"

    def unfinished(self):
        """Return what stays behind if the last step ends well and none follows it, as texts."""
        found = list(self.notes)
        if not self.steps:
            return found
        if self.temporary:
            found.append(self.tell_temporary("stays"))
        return found if self.ran_any("set") else found + self.without_address()

    def without_address(self):
        """Return what to say of a clone that has perhaps not got the address it was to get."""
        ip, before = self.values.get("ip"), self.before or {}       # read once: end() drops it
        # One that has failed is neither done nor lost; one in work counts as lost until it ends.
        if (not ip or self.addressed
                or not any(step[1] == "clone" for step in self.done + self.lost)):
            return []
        vm_id, has = self.values["new_vm_id"], "may not" if self.ran_any("set") else "will not"
        source = parse_config(before.get(self.vm_id) or "").current
        return [f"VM {vm_id} {has} have the address {ip}, but what VM {self.vm_id} has; "
                "do not start it with that", *starts_with_node(self.node, vm_id, source)]

    def all_warnings(self):
        """Return what pct warned of and what is left, each once."""
        return list(dict.fromkeys(self.warnings + self.left))

    def conclude(self, problem):
        """Turn what a step failed with into the Problem that the caller hears."""
        if not self.steps:
            problem.fields = {"outcome": NOTHING_DONE, **problem.fields}
            return problem.again()
        notes = [f"VM {self.clone} was cloned"] * bool(self.clone) + self.notes
        if self.lost:
            outcome, status = UNKNOWN, 504 if isinstance(problem, Lost) else 500
            # These three stop it first.
            if self.ran and self.lost[-1][1] in ("rollback", "destroy", "reboot"):
                notes.append(f"VM {self.vm_id} ran before")
            self.left += self.without_address()
        else:
            outcome, status = INCOMPLETE, 409 if problem.status == 409 else 500
            try:
                self.left += self.remains()
            except Exception:               # even so, the caller must get an answer
                log.exception("internal error in %s", self.title)
        self.warnings = notes + self.warnings       # for who asks /operations
        # Trying again would do the first steps twice.
        error = re.split("(?:;| and) try again", problem.error)[0]
        concluded = Problem(status, error, outcome=outcome, **problem.fields)
        concluded.add_details(*notes, *self.left)
        return concluded

    def remains(self):
        """Return what the steps have left, as texts: locks, half-made containers, who runs."""
        last = self.steps[-1][1]
        asked = ([self.vm_id] * bool(self.ran or last in (*POWER, "destroy") and not self.clone)
                 + [self.clone] * bool(self.clone))
        try:
            texts = self.texts()
            states = {vm_id: self.state(vm_id) for vm_id in asked if texts[vm_id] is not None}
            found = [text for text in (self.frozen() if self.ran_any("snapshot") else ())
                     if text not in self.left]
        except Problem as problem:
            return [f"What is left cannot be read: {problem.error}"]
        found += [each for vm_id in self.containers for each in self.lock_left(vm_id, texts)]
        found += self.made_or_gone(texts)
        found += [each for vm_id, state in states.items()
                  for each in self.state_left(vm_id, state, texts)]
        if self.killed and "no task of " not in "".join(found + self.left):
            found.append("Its task may still be at work: look again before trying again")
        return found

    def state_left(self, vm_id, state, texts):
        """Return what to say of a container's state after a failure, as texts."""
        last, runs = self.steps[-1][1], state == "running"
        if vm_id == self.clone and not runs:
            values = parse_config(texts[vm_id]).current
            remove = destroying(vm_id, values)
            if self.values["ip"] and not self.addressed:        # what it has is perhaps another's
                return [f"VM {vm_id} is {state}, without its address" + self.how("remove", remove),
                        *starts_with_node(self.node, vm_id, values)]
            return [f"VM {vm_id} is {state}" + self.how("start", f"pct start {vm_id}")
                    + f", or remove it with: {remove}"]
        # Then lock_left, which speaks of the lock that it left, says how to go on.
        mended = (last in ("rollback", "destroy") and not self.snapshot_gone
                  and lock_in(texts[self.vm_id]) == OWN_LOCKS[last][0])
        if last == "destroy":
            was = "ran before and is" if self.ran and not runs else "is"
            remove = f"pct destroy {vm_id}" + " --force 1" * runs
            return [f"VM {vm_id} {was} {state} now, "
                    "and its volumes or snapshots may be gone already"
                    + ("" if mended else self.how("remove", remove))]
        if self.ran and not runs and last not in ("stop", "shutdown"):
            return [f"VM {vm_id} ran before and is {state} now"
                    + ("" if mended else self.how("start", f"pct start {vm_id}"))]
        if vm_id == self.clone or (last in POWER and not self.clone):
            return [f"VM {vm_id} is {state} now"]
        return []

    def how(self, verb, command):
        """Return how to mend what is left."""
        if_idle = "if no task of it runs, " if self.killed else ""
        return f"; {if_idle}{verb} it{on(self.node)} with: {command}"

    def made_or_gone(self, texts):
        """Return what to say of what a step has made or removed, though it failed, as texts.

        A task that has done all its work ends with 255 if its log cannot be written, as on a full
        disk (PVE::RESTEnvironment, fork_worker; PVE::Tools, upid_read_status).
        """
        (expected, before, had), (coming, now, has) = (
            parse_config(each[self.vm_id] or "") for each in (self.before, texts))
        found = []
        for _, command, _, name, *_ in (step for step in self.failed_steps() if len(step) > 3):
            if command == "clone" and self.before[int(name)] is None:
                clone = parse_config(texts[int(name)] or "").current
                if clone.get("hostname") == self.hostname and "lock" not in clone:
                    without = ", without its address" if self.values["ip"] else ""
                    found.append(f"VM {name} is there now{without}"
                                 + self.how("remove", destroying(name, clone)))
                    found += starts_with_node(self.node, name, clone) if without else ()
            elif (command == "snapshot" and name in has and "snapstate" not in has[name]
                    and name not in had
                    and not name.startswith(TEMPORARY_SNAPSHOT)):       # of that one all is said
                found.append(f"Snapshot '{name}' of VM {self.vm_id} is there now")
            elif command == "delsnapshot" and name in had and name not in has:
                found.append(f"Snapshot '{name}' of VM {self.vm_id} is gone now")
            elif command == "rollback" and now.get("parent") == name and "lock" not in now:
                was = "may have been" if before.get("parent") == name else "was"
                found.append(f"VM {self.vm_id} {was} rolled back to snapshot '{name}'")
            elif command == "destroy" and texts[self.vm_id] is None:
                found.append(f"VM {self.vm_id} is gone now")
            elif command == "set" and not self.clone and coming.get(name[2:]) not in (
                    None, expected.get(name[2:])):
                key = name[2:]              # of "--cores" or "--memory"
                pends = now.get(key) != coming[key]
                found.append(f"VM {self.vm_id} has {key} {coming[key]} "
                             + (f"from its next start on; take that back{on(self.node)} with: "
                                f"pct set {self.vm_id} --revert {key}" if pends else "now"))
        return found

    def frozen(self):
        """Return what to say of a container that a snapshot has frozen and not thawed.

        pct freezes it for the moment of the snapshot (PVE::LXC::Config, __snapshot_freeze). A
        cgroup below a frozen one says so, too (Linux, Documentation/admin-guide/cgroup-v2.rst).
        """
        events = self.read(f"{self.host.cgroups.lxc}/{self.vm_id}/ns/cgroup.events")
        if not re.search(r"^frozen 1$", events or "", re.MULTILINE):
            return []
        return [f"VM {self.vm_id} is frozen, so that all its processes stand still; "
                f"if no task of it runs, thaw it{on(self.node)} with: lxc-unfreeze -n {self.vm_id}"]

    def lock_left(self, vm_id, texts):
        """Return what to say of a lock that a container has now and had not before."""
        now = parse_config(texts[vm_id] or "").current
        lock = now.get("lock")
        if not lock or lock == lock_in(self.before[vm_id]) or vm_id in self.told_locks:
            return []
        if vm_id != self.vm_id and lock == "create" and self.ran_any("clone"):
            # Another task may have taken the id: of ours, the source is locked, or it has our name.
            if lock_in(texts[self.vm_id]) != "disk" and now.get("hostname") != self.hostname:
                return [f"VM {vm_id} is being created, perhaps by another task; look at it"]
            # Each volume is entered once it is whole (PVE::API2::LXC, clone_vm: update_conf).
            return [f"VM {vm_id} is left half-made; if no task of it runs, "
                    f"remove it{on(self.node)} with: "
                    f"pct unlock {vm_id} && {destroying(vm_id, now)}",
                    "A volume that was being copied stays, for its configuration does not name it; "
                    f"look for it{on(self.node)} with: pvesm list STORAGE --vmid {vm_id}"]
        for step in self.failed_steps() + self.kept_locks:
            own, mend = OWN_LOCKS.get(step[1], (None, ""))
            if lock == own and vm_id == self.vm_id:
                name = "".join(step[3:4])
                if self.snapshot_gone and step[1] == "rollback":        # it would fail again
                    mend = ""
                command = f"pct unlock {vm_id}" + mend.format(
                    vm_id=vm_id, name=name, start=" --start 1" if self.ran else "")
                command += " --force 1" * (self.snapshot_gone and step[1] == "delsnapshot")
                return [*self.how_to_make_anew(name),
                        f"VM {vm_id} is left with the lock '{lock}'; if no task of it runs, "
                        f"mend it{on(self.node)} with: {command}"]
        return [f"VM {vm_id} is locked by Proxmox ({lock}), by another task"]

    def how_to_make_anew(self, snapshot):
        """Return what to say of a volume that a rollback may have removed, if there is one."""
        if not self.removed_volumes:
            return []
        volume = self.removed_volumes[-1]
        missing = f"If the volume {volume} is missing{on(self.node)}, "
        if self.snapshot_gone:
            return [missing + f"it cannot be made anew from snapshot '{snapshot}': "
                              "restore it from another snapshot or a backup"]
        return [missing + "first make it anew from its snapshot, with the name of its volume "
                          "group in place of GROUP: "
                          f"lvcreate -kn -n {volume} -s GROUP/snap_{volume}_{snapshot}"]

    def ran_any(self, command):
        return any(step[1] == command for step in self.steps)

    def row(self):
        """Return what /operations tells of this change."""
        began, ended = self.began, self.ended       # once, for its thread sets them meanwhile
        problem = self.problem if ended else None   # set before `ended`, and so read after it
        moments = [when and utc(int(when)) for when in (self.requested, began, ended)]
        state = ("failed" if problem else "done") if ended else "running" if began else "waiting"
        outcome = problem.fields["outcome"] if problem else RUNNING if state == "running" else None
        return {"id": self.id, "endpoint": self.route.path,
                "parameters": {name: value for name, value in self.values.items()
                               if value is not None},
                "client": self.client, "state": state, "outcome": outcome,
                "requested": moments[0], "began": moments[1], "ended": moments[2],
                "status": None if not ended else problem.status if problem else 200,
                "error": problem and problem.error,
                "warnings": self.all_warnings()}


class Changes:
    """Runs changes, each in a thread of its own and one at a time for each container.

    So a caller that leaves, or waits too long, ends nothing: the change goes on, keeps
    its containers reserved, and its end is logged and, if it scales, counted: by count(change).
    """

    def __init__(self, host, workers, count):
        self.host, self.workers, self.count = host, workers, count
        self.lock, self.stopping, self.ending = threading.Lock(), False, Future()
        self.pending, self.recent = set(), deque()
        self.queues = {}                    # {container: the changes that run or wait, in order}
        self.rules, _ = read_section("containers", None, {})

    def take(self, change, asynchronous=False):
        """Let a change begin as soon as it is the first in the queues of all its containers.

        No thread waits for that. Unless its client does not wait for it (asynchronous), a node
        that does not answer is told at once.
        """
        self.guard(change)
        with self.lock:                     # either refuse_waiting sees it, or it has been called
            if self.stopping:
                raise stopping()
            if len(self.pending) >= MAX_OPERATIONS or any(
                    len(self.queues.get(vm_id, ())) >= MAX_TURNS for vm_id in change.containers):
                raise unavailable("Too many changes wait; try again later", RETRY_SECONDS)
            self.pending.add(change)
            self.recent.appendleft(change)
            if len(self.recent) > MAX_OPERATIONS:
                # One that has not ended is still asked for.
                self.recent.remove(next(old for old in reversed(self.recent) if old.ended))
            first = not any(map(self.queues.get, change.containers))
            for vm_id in change.containers:
                self.queues.setdefault(vm_id, deque()).append(change)
        if first:
            self.start([change])
        elif not asynchronous:
            self.refuse_unreachable(change)

    def refuse_unreachable(self, change):
        """Refuse a change now, and not at its turn, if its node does not answer."""
        try:
            node = self.host.files.read(self.host.pve.changeable, change.vm_id)
            if node:
                self.host.commands.reachable(node, change.since)
        except Problem as problem:
            if problem.status == 503:       # what is not there may be by then
                self.cancel(change, problem)
        except Exception:
            log.exception("internal error in %s", change.title)     # its turn will tell

    def guard(self, change):
        """Hold a change to the rules, or Problem 403 or 400; no clone can be its own source."""
        values, rules = change.values, self.rules
        if values.get("new_vm_id") == values["vm_id"]:
            raise Problem(400, "Invalid new_vm_id: must differ from vm_id")
        for vm_id in change.containers:
            if vm_id in rules.protected:
                raise Problem(403, f"VM {vm_id} is protected: "
                                   "containers.protected in the daemon's configuration names it")
            if rules.allowed and vm_id not in rules.allowed:
                raise Problem(403, f"VM {vm_id} must not be changed: containers.allowed "
                                   "in the daemon's configuration does not name it")
        for parameter, setting in ((CORES, "max_cores"), (MEMORY, "max_memory_mb")):
            low, high = parameter.schema["minimum"], getattr(rules, setting)
            if values.get(parameter.name, 0) > high:
                raise Problem(400, f"Invalid {parameter.name}: must be an integer "
                                   f"between {low} and {high} "
                                   f"(containers.{setting} in the daemon's configuration)")

    def start(self, ready):
        """Start changes that are the first now, each in a thread of its own."""
        while ready:
            change = ready.pop()
            try:
                self.workers.start(self.work, change)
            except Problem as problem:      # no thread is left
                ready += self.end_unbegun(change, problem)

    def answer(self, change, client, seconds):
        """Wait for a change, and return its Answer.

        If it takes longer than so many seconds once it has begun, this is Problem 504. If the
        client leaves before it has begun, it will not begin.
        """
        try:
            client.wait(change.started)
            if not change.future.cancelled():
                # Whoever half-closes the connection now still hears its end.
                client.changing = True
                client.wait(change.future, self.ending, seconds=seconds)
        except ClientLeft:
            self.cancel(change, Problem(CLIENT_LEFT, "The client left before this began"))
            raise
        if change.future.done():
            if change.problem:
                raise change.problem.again()
            return change.future.result()
        left = ()
        if self.ending.done():
            if not change.steps:            # after break_off, none begins
                raise stopping()
            why = f"has not finished, and the daemon stops: {change.goes_on()}"
            left = change.unfinished()
        else:
            why = (f"did not finish in {seconds} s; it is still running in Proxmox, "
                   "and its container stays reserved until it ends")
        problem = Problem(504, f"{change.title} {why}. "
                               "Ask for the container's state before trying again",
                          outcome=RUNNING, operation=change.id)
        problem.add_details(*left)
        raise problem

    def work(self, change):
        answer = problem = None
        try:
            answer = self.run_in_turn(change)
        except Problem as raised:
            problem = change.conclude(raised)
        except Exception as error:
            log.exception("internal error in %s", change.title)
            change.lost = change.steps[:]
            problem = change.conclude(internal_error(error))
        # If it was cancelled, its end has been told.
        if change.future.cancelled() or not (
                change.future.running() or change.future.set_running_or_notify_cancel()):
            return
        change.problem = problem
        self.start(self.end(change, answer))

    def run_in_turn(self, change):
        """Run a change that is the first in its queues; return its Answer, None if cancelled."""
        files, pve, commands = self.host.files, self.host.pve, self.host.commands
        node = files.read(pve.changeable, change.vm_id)
        with commands.slot(node, change.since, change.long) as slot:
            self.guard(change)              # the rules may have changed while it waited
            if not change.future.set_running_or_notify_cancel():
                return None
            change.began = time.time()
            log.info("change %s by %s: begun", change.title, change.client, extra=UNWAITED)
            change.started.set_result(None)
            try:
                return change.run(node, slot)
            except Problem as problem:
                moved = (files.read(pve.find, change.vm_id)
                         if problem.status == 404 and not change.steps else node)
                if moved == node:
                    raise
        # It has moved meanwhile, and is asked for once more.
        with commands.slot(moved, change.since, change.long) as slot:
            return change.run(moved, slot)

    def cancel(self, change, problem):
        """End a change that has not begun, and start those that waited for it only."""
        self.start(self.end_unbegun(change, problem))

    def end_unbegun(self, change, problem):
        """End a change unless it has begun or ended; return those that may begin now.

        Its client may leave while the daemon stops: then the first of the two reasons counts.
        """
        with self.lock:
            if change.future.cancelled() or not change.future.cancel():
                return []
        change.problem = change.conclude(problem)
        return self.end(change)

    def blocked(self, change):
        """Return (a container of a change that waits, the change that it waits for), or None."""
        with self.lock:
            return next(((vm_id, self.queues[vm_id][0]) for vm_id in change.containers
                         if change in self.pending and self.queues[vm_id][0] is not change), None)

    def refuse_late(self):
        """Refuse the changes that have waited for others to end for LOCK_SECONDS."""
        for change in sorted(self.pending, key=lambda change: change.since):
            late = time.monotonic() - change.since > LOCK_SECONDS
            found = self.blocked(change) if late else None
            if found:                       # and not since the one before was refused
                vm_id, first = found
                since = utc(int(first.began or first.requested))
                self.cancel(change, Problem(
                    409, f"VM {vm_id} has been busy for over {LOCK_SECONDS} s, now with: "
                         f"{first.title}, since {since}"))

    def end(self, change, answer=None):
        """Tell a change's end, take it out of its queues, and return those that may begin now.

        It is logged and counted before its caller and /operations hear of it, and before a daemon
        that stops may take it for ended.
        """
        ended, change.before, problem = time.time(), None, change.problem
        outcome = (f"{problem.status} {problem.error} ({problem.fields['outcome']})" if problem
                   else "done")
        log.info("change %s by %s: %s, after %.1f s", change.title, change.client, outcome,
                 time.monotonic() - change.since, extra=None if change.began else UNWAITED)
        if problem and change.steps:
            told = "; ".join(filter(None, (problem.error, problem.fields.get("details"))))
            log.warning("%s: %s by %s: %s",
                        problem.fields["outcome"], change.title, change.client, told)
        if change.route.scaling:
            self.count(change)
        change.ended = ended
        if not change.future.cancelled():
            change.future.set_result(answer)
        if not change.started.done():
            change.started.set_result(None)
        with self.lock:
            self.pending.discard(change)
            ready = []
            for vm_id in change.containers:
                queue = self.queues[vm_id]
                if queue[0] is change and len(queue) > 1:
                    ready.append(queue[1])
                queue.remove(change)
                if not queue:
                    del self.queues[vm_id]
            return [] if self.stopping else [
                each for each in dict.fromkeys(ready)
                if all(self.queues[vm_id][0] is each for vm_id in each.containers)]

    def refuse_waiting(self):
        """Let nothing begin any more, and take nothing new, for the daemon stops."""
        with self.lock:
            self.stopping = True
            waiting = list(self.pending)
        for change in waiting:
            self.cancel(change, stopping())

    def are_running(self):
        """Tell whether changes run that were not left alone."""
        return not self.ending.done() and any(
            change.future.running() for change in list(self.pending))

    def leave_running(self):
        """Tell who still waits that Proxmox goes on, and log what is left, for the daemon ends."""
        for change in list(self.pending):
            if change.future.running():
                change.break_off()
                if change.steps:            # else it has only looked, and begins nothing now
                    log.warning("left running: %s by %s: %s", change.title, change.client,
                                "; ".join([change.goes_on(), *change.unfinished()]))
        self.ending.set_result(None)

    def rows(self, id=None, vm_id=None):
        """Return the rows of /operations, newest first: all, or those of an id or a container."""
        return [change.row() for change in list(self.recent)
                if id in (None, change.id) and (vm_id is None or vm_id in change.containers)]


# Endpoints: one short function each, then the table that drives everything

def check_health(api):
    ok, detail = api.host.health()
    return Answer(200 if ok else 503, {
        "status": "healthy" if ok else "unhealthy", "timestamp": utc(int(time.time())),
        "checks": {"lxc_commands": {"ok": ok, "detail": detail}},
    }, None if ok else {"Retry-After": str(PROBE_SECONDS)})


def show_metrics(api):
    gauges = {**api.host.files.read(api.host.gauges),
              **api.host.commands.gauges(),
              **api.host.files.read(process_metrics),
              "lxc_autoscale_api_requests_in_progress": {"": api.in_progress()}}
    return Answer(200, api.metrics.render(gauges),
                  content_type="text/plain; version=0.0.4; charset=utf-8")


def list_routes(api):
    return Answer(200, {"status": "success", "routes": [
        {"endpoint": path, "methods": [route.method], "description": route.summary}
        for path, route in PATHS.items()]})


def set_cores(change, vm_id, cores):
    change.pct("set", "--cores", cores)
    return f"CPU cores set to {cores} for VM {vm_id}"


def set_memory(change, vm_id, memory):
    change.pct("set", "--memory", memory)
    return f"Memory set to {memory} MB for VM {vm_id}"


def growth(before, gigabytes, relative):
    """Return the size for `pct resize`: how much to add if it is `relative`, else the whole.

    With the former, two callers at once both count. With the latter, a request that is repeated
    does no harm even while the first is still at work for a daemon that has gone: pct looks at
    the volume again under the container's lock, and refuses what has that size (PVE::API2::LXC,
    resize_vm).
    """
    if relative:
        return f"+{gigabytes}G"
    size = int(size_in_bytes(before)) + gigabytes * GIB
    return next(f"{size // unit}{name}"
                for unit, name in ((GIB, "G"), (MIB, "M"), (1024, "K"), (1, ""))
                if not size % unit)


def grow_storage(change, vm_id, disk_size, disk, current_size):
    """Add so many GB to a disk.

    `pct resize` may end with 0 though it failed: the work is done by a task whose end it does
    not pass on. A success has at least so much more in the configuration (more if somebody
    else grew it, too), and a file system that followed. pct writes the size with each
    success, so a size where there was none before is a success as well. It knows nothing of
    pending changes.
    """
    disks = change.conf().current
    before = option(disks.get(disk), "size")
    if disk != "rootfs" and disk not in disks:
        raise Problem(409, f"VM {vm_id} has no {disk}")
    if current_size not in (None, size_in_gb(before)):
        has = "has no size of its own" if before is None else f"has {size_in_gb(before)} GB now"
        raise Problem(409, f"The {disk} of VM {vm_id} {has}, and not {current_size}")
    result = change.pct("resize", disk, growth(before, disk_size, relative=current_size is None))
    after = option(change.verify(change.conf).current.get(disk), "size")
    if "disk is already at specified size" in result.stderr or (
            (size_in_bytes(after) or 0) < (size_in_bytes(before) or 0) + disk_size * GIB):
        problem = change.failed(change.steps[-1], result)
        if problem.status == 500:
            problem.error = (f"The {disk} of VM {vm_id} was not grown as asked; "
                             f"its size is now {after or 'unknown'}")
        raise problem
    said = result.stdout + result.stderr
    if FILE_SYSTEM_STAYED.search(said):
        followed = "may not have" if TASK_KILLED in said else "has not"
        raise Problem(500, f"The {disk} of VM {vm_id} has grown to {after}, "
                           f"but its file system {followed} followed",
                      details=said.strip()[-MAX_DETAILS:])
    return f"Storage increased by {disk_size} GB for VM {vm_id}"


def create_snapshot(change, vm_id, snapshot_name, description):
    change.pct("snapshot", snapshot_name,
               *(("--description", description) if description else ()))
    return f"Snapshot '{snapshot_name}' created for VM {vm_id}"


def delete_snapshot(change, vm_id, snapshot_name):
    change.pct("delsnapshot", snapshot_name)
    return f"Snapshot '{snapshot_name}' of VM {vm_id} deleted"


def roll_back(change, vm_id, snapshot_name):
    """Roll back; a container that ran is started again, for pct leaves it stopped.

    pct ends with 0 even if that start failed, for it is a task of its own whose end it does not
    pass on (PVE::API2::LXC::Snapshot, rollback).
    """
    change.ran = change.state() == "running"
    result = change.pct("rollback", snapshot_name, *(("--start", 1) if change.ran else ()))
    if change.ran and not ASKED_HA.search(result.stdout) and not change.verify(change.runs_now):
        raise Problem(500, f"VM {vm_id} was rolled back to snapshot '{snapshot_name}', "
                           "but did not start", details=result.stdout.strip()[-MAX_DETAILS:])
    return f"Rolled back VM {vm_id} to snapshot '{snapshot_name}'"


def set_address(change, new_vm_id, ip):
    """Change the address in the clone's net0; with dhcp, its gateway goes.

    All else stays: without its hwaddr, pct would make a new one.
    """
    name = "ip6" if ":" in ip else "ip"
    try:
        net = with_option(change.conf(new_vm_id).current.get("net0", ""), name, ip)
        change.pct("set", "--net0", with_option(net, "gw", None) if ip == "dhcp" else net,
                   vm_id=new_vm_id)
    except Problem as problem:
        what = ("whether it got its address is not known" if isinstance(problem, Lost)
                else "did not get its address")
        problem.error = f"VM {new_vm_id} was cloned, but {what}: {problem.error}"
        raise
    change.addressed = True
    change.notes.append(f"VM {new_vm_id} got its address")


def addresses_twice(change, vm_id):
    """Return [(static address of a container, the id of another that has it)]."""
    holders = change.host.files.read(change.host.pve.address_holders, vm_id)
    return [(address[2], holders[address])
            for address in static_addresses(change.conf(vm_id).current)
            if address in holders]


def start_clone(change, new_vm_id, start):
    """Start a clone; if `start` is None, only if no other container has its static addresses."""
    try:
        twice = addresses_twice(change, new_vm_id)
        for address, holder in twice:
            change.leave(f"VM {new_vm_id} has the static address {address}, as VM {holder} has")
        if twice and start is None:
            change.leave(f"VM {new_vm_id} was not started, for its address would be on the network "
                         "twice; give it another (ip), "
                         f"and start it{on(change.node)} with: pct start {new_vm_id}")
            with suppress(Problem):         # it is not started, whatever can be read now
                change.leave(*starts_with_node(
                    change.node, new_vm_id, change.conf(new_vm_id).current))
            return
        change.pct("start", vm_id=new_vm_id)
    except Problem as problem:
        what = "whether it started is not known" if isinstance(problem, Lost) else "did not start"
        problem.error = f"VM {new_vm_id} was cloned, but {what}: {problem.error}"
        raise
    change.data["started"] = True


def create_clone(change, vm_id, new_vm_id, new_vm_name, start, ip, storage, full):
    """Clone, give the clone its address, and start it, if that is wanted."""
    if ip and "net0" not in change.conf().current:
        raise Problem(409, f"VM {vm_id} has no net0, which could get an address")
    change.hostname = new_vm_name.replace("_", "-")         # a hostname cannot hold _
    options = ["--hostname", change.hostname]
    options += ["--storage", storage] if storage else []
    options += ["--full", int(full)] if full is not None else []
    change.ran = change.state() == "running"
    # On RBD it needs that snapshot for good (PVE::Storage::RBDPlugin, clone_image).
    if change.ran and full is False:
        raise Problem(409, f"VM {vm_id} runs, and a linked clone would need its temporary snapshot "
                           "for good; stop it first, or leave out full")
    # pct clones a running container from a snapshot only.
    with change.temporary_snapshot() if change.ran else nullcontext() as name:
        change.pct("clone", new_vm_id, *options, *(("--snapname", name) if name else ()))
        change.clone = new_vm_id
        change.data.update(vm_id=new_vm_id, started=False)
    if ip:
        set_address(change, new_vm_id, ip)
    if start is not False:
        start_clone(change, new_vm_id, start)
    return f"Cloned VM {vm_id} to new VM {new_vm_id} ({new_vm_name})"


def delete_clone(change, vm_id):
    """Destroy; pct stops it first, unless it is protected."""
    change.ran = change.state() == "running"                # to be told if this fails
    change.pct("destroy", "--force", 1)
    return f"Deleted VM {vm_id}"


def unless_so_already(change, refusal, *command):
    """Run a command that pct refuses if the container is in the wanted state already.

    Such a refusal becomes a warning.
    """
    change.ran = command[0] != "start"      # or it is refused
    try:
        change.pct(*command)
    except Problem as problem:
        if problem.error != refusal:
            raise
        change.warnings.append(refusal)


def start_container(change, vm_id):
    unless_so_already(change, f"VM {vm_id} is already running", "start")
    return f"Started VM {vm_id}"


def stop_container(change, vm_id):
    unless_so_already(change, f"VM {vm_id} is not running", "stop")
    return f"Stopped VM {vm_id}"


def shut_down_container(change, vm_id, timeout):
    unless_so_already(change, f"VM {vm_id} is not running",
                      "shutdown", "--timeout", timeout, "--forceStop", 0)
    return f"Shut down VM {vm_id}"


def reboot_container(change, vm_id, timeout):
    """Reboot; pct does nothing, and calls that a success, if a stop of others came before it.

    (PVE::LXC, vm_reboot.)
    """
    change.ran = True                       # or pct refuses it
    change.pct("reboot", "--timeout", timeout)
    if not change.verify(change.runs_now):
        raise Problem(500, f"VM {vm_id} does not run after its reboot; "
                           "it may have been stopped meanwhile")
    return f"Rebooted VM {vm_id}"


def list_operations(api, id, vm_id):
    found = api.changes.rows(id and id.lower(), vm_id)
    return success(f"Found {len(found)} operations", found)


def list_snapshots(api, vm_id):
    found = api.host.snapshots(vm_id)
    return success(f"Found {len(found)} snapshots for VM {vm_id}", found)


def list_containers(api):
    found = api.host.list()
    return success(f"Found {len(found)} containers", found)


def show_status(api, vm_id):
    return success(f"Retrieved status for VM {vm_id}", api.host.status(vm_id))


def show_config(api, vm_id):
    rules = api.config.containers
    return success(f"Successfully retrieved configuration for VM {vm_id}",
                   api.host.config(vm_id, rules.max_cores, rules.max_memory_mb))


def show_node(api, node_name):
    return success(f"Retrieved status for node '{node_name}'", api.host.node_status(node_name))


def show_cluster(api):
    return success("Retrieved cluster status", api.host.cluster_status())


def show_openapi(api):
    return Answer(200, openapi())


# What the endpoints answer, as JSON Schema

def shown(kind, description, **more):
    """Return a value's schema: its JSON type (with ? if it may be null), its meaning and unit."""
    nullable = kind.endswith("?")
    return {"type": [kind[:-1], "null"] if nullable else kind, "description": description, **more}


def text_list(description):
    return shown("array", description, items={"type": "string"})


def record(description, optional=(), /, **properties):
    """Return the schema of an object that has all of these properties but the optional ones."""
    return {"type": "object", "description": description, "properties": properties,
            "required": [name for name in properties if name not in optional]}


def called(name):
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(name):
    return {"type": "array", "items": called(name)}


def success_with(data, optional=()):
    """Return the schema of the whole body of a success with such `data`."""
    return record("A success.", optional, status={"const": "success"}, data=data,
                  message=shown("string", "What was done or found, in one sentence."))


IDENTITY = {
    "vm_id": shown("integer", "The container's id."),
    "lxc_id": shown("integer", "The same as vm_id."),
}
PLACE = {
    "node": shown("string", "The node that the container is on."),
    "name": shown("string?", "Its hostname, or CT and its id."),
    "status": shown("string?", "running or stopped; null where its node does not tell."),
}
MARKS = {
    "lock": shown("string?", "Why Proxmox holds it locked, such as backup; null if it does not."),
    "template": shown("boolean", "Whether it is a template, which cannot be started."),
    "tags": text_list("Its tags."),
}
LIMITS = record(
    "What makes sense on the container's node.",
    cores=record("Cores.", min=shown("integer", "The fewest."), max=shown("integer", "The most.")),
    memory_mb=record("Memory.", min=shown("integer", "The least, in MB."),
                     max=shown("integer", "The most, in MB.")),
    disk_gb=record("Root disk.", min=shown("number?", "Its size, in GB: it cannot shrink.")))
OUTCOMES = {                                # what a failed change has done
    NOTHING_DONE: "no changing command was begun, or Proxmox refused the first one",
    INCOMPLETE: "something was done, or may be left behind; details says how to mend it",
    RUNNING: "it goes on in Proxmox",
    UNKNOWN: "its result could not be learned; ask before trying again",
}
FAILED = {
    "status": {"const": "error"},
    "error": shown("string", "What was wrong, in one sentence."),
    "details": shown("string", "The end of what the command printed, and what was left behind."),
}
SCHEMAS = {
    "Container": record(
        "A container in the list.", **IDENTITY, **PLACE,
        cores=shown("number?", "CPU cores allotted; null for no limit."),
        memory=shown("number?", "Memory allotted, in MB."),
        uptime=shown("integer?", "Seconds since its start; 0 if it does not run."),
        **MARKS, onboot=shown("boolean?", "Whether it is started with its node.")),
    "Pressure": record(
        "Percentage of the last 10 s in which something in the container waited.",
        cpu=shown("number?", "For a processor, in percent."),
        memory=shown("number?", "For memory, in percent."),
        io=shown("number?", "For a disk, in percent.")),
    "ContainerStatus": record(
        "A container's state and what it uses.", **IDENTITY, **PLACE, **MARKS,
        cpu=shown("number?", "Processors allotted."),
        cpu_usage=shown("number?", "Processor time used, in percent of the allotment."),
        memory=shown("number?", "Memory allotted, in MB."),
        memory_used=shown("number?", "Memory used, in MB, without page cache and tmpfs."),
        memory_shared=shown("number?", "Memory in tmpfs and shared memory, in MB."),
        swap=shown("number?", "Swap allotted, in MB."),
        swap_used=shown("number?", "Swap used, in MB."),
        pressure={"oneOf": [called("Pressure"), {"type": "null"}],
                  "description": "What it waited for; null where the kernel does not tell."},
        disk=shown("number?", "Size of the root disk, in GB."),
        disk_used=shown("number?", "Used on the root disk, in GB."),
        uptime=shown("integer?", "Seconds since its start; 0 if it does not run."),
        network_in=shown("integer?", "Bytes received."),
        network_out=shown("integer?", "Bytes sent."),
        disk_read=shown("integer?", "Bytes read."), disk_write=shown("integer?", "Bytes written.")),
    "MountPoint": record(
        "A disk beside the root disk.",
        disk=shown("string", "Its name, such as mp0."),
        path=shown("string?", "Where it is mounted in the container."),
        size_gb=shown("number?", "Its size, in GB; null for a folder or device of the host."),
        volume=shown("string", "The volume, or the path on the host.")),
    "ContainerConfig": record(
        "What is allotted to a container, and the limits for scaling it.", **IDENTITY,
        cores=shown("integer?", "CPU cores; null for no limit."),
        memory_mb=shown("integer?", "Memory, in MB."), swap_mb=shown("integer?", "Swap, in MB."),
        disk_gb=shown("number?", "Size of the root disk, in GB."),
        hostname=shown("string?", "Its hostname, if it has one."),
        limits=LIMITS, mountpoints=list_of("MountPoint")),
    "Snapshot": record(
        "A snapshot of a container.",
        name=shown("string", "Its name."),
        timestamp=shown("string?", "When it was taken, in UTC.", format="date-time"),
        description=shown("string?", "Its description."),
        parent=shown("string?", "The snapshot before it."),
        state=shown("string?", "prepare or delete of one that is incomplete.")),
    "NodeStatus": record(
        "A node's load, memory and disk.", node=shown("string", "Its name."),
        cpu_usage=shown("number?", "Processor time used, in percent."),
        cpu_count=shown("integer?", "Its processors."),
        load_average=shown("array?", "Over 1, 5 and 15 minutes.", items={"type": "number"}),
        memory_usage=shown("number?", "Memory used, in percent."),
        memory_total=shown("number?", "Memory, in MB."),
        memory_used=shown("number?", "Memory used, in MB."),
        swap_total=shown("number?", "Swap, in MB."),
        swap_used=shown("number?", "Swap used, in MB."),
        disk_total=shown("number?", "Root disk, in GB."),
        disk_used=shown("number?", "Used on it, in GB."),
        uptime=shown("integer?", "Seconds since its start."),
        version=shown("string?", "Its Proxmox VE.")),
    "ClusterNode": record(
        "A node of the cluster.",
        name=shown("string?", "Its name."),
        online=shown("boolean", "Whether it is online."),
        local=shown("boolean", "Whether it is this one."),
        address=shown("string?", "Its IP address.")),
    "ClusterStatus": record(
        "The cluster's nodes and quorum.",
        cluster=shown("string?", "Its name; null for a single host."),
        quorate=shown("boolean", "Whether it has a quorum."), nodes=list_of("ClusterNode")),
    "Endpoint": record(
        "An endpoint.", endpoint=shown("string", "Its path."),
        methods=text_list("Its methods."),
        description=shown("string", "What it does.")),
    "Health": record(
        "Whether the daemon can do its work.",
        status={"type": "string", "enum": ["healthy", "unhealthy"]},
        timestamp=shown("string", "When this was said, in UTC.", format="date-time"),
        checks=record("What was tried.", lxc_commands=record(
            "pct.", ok=shown("boolean", "Whether it works."),
            detail=shown("string", "What it said.")))),
    "Changed": record(
        "What there is to say of a change that succeeded.", ("warnings",),
        warnings=text_list("What pct printed on stderr though it succeeded, "
                           "or what was left behind.")),
    "Cloned": record(
        "What became of a clone.", ("warnings",), vm_id=shown("integer", "The clone's id."),
        started=shown("boolean", "Whether it was started."),
        warnings=text_list("What there is to say.")),
    "Accepted": record(
        "A change that will be begun, and may be asked for in /operations.",
        status={"const": "accepted"},
        message=shown("string", "What was accepted."),
        operation=shown("string", "Its id in /operations.")),
    "Operation": record(
        "A change, and what became of it.",
        id=shown("string", "Its id."),
        endpoint=shown("string", "Its path."),
        parameters={"type": "object", "description": "What was asked for."},
        client=shown("string", "The address that asked for it, and the fingerprint of its key."),
        state={"type": "string", "enum": ["waiting", "running", "done", "failed"],
               "description": "How far it is."},
        outcome=shown("string?", "What was done, if it failed or still runs.",
                      enum=[*OUTCOMES, None]),
        requested=shown("string", "When it was asked for, in UTC.", format="date-time"),
        began=shown("string?", "When it began, in UTC.", format="date-time"),
        ended=shown("string?", "When it ended, in UTC.", format="date-time"),
        status=shown("integer?", "The HTTP status that its end has; null before."),
        error=shown("string?", "What was wrong."), warnings=text_list("What there is to say.")),
    "Error": record("An error.", ("details",), **FAILED),
    "ChangeError": record(
        "An error of a change.", ("details", "operation"), **FAILED,
        outcome={"type": "string", "enum": list(OUTCOMES),
                 "description": "; ".join(map(": ".join, OUTCOMES.items()))},
        operation=shown("string", "With the outcome running: its id in /operations.")),
    "RateLimited": record(
        "Too many requests.", status={"const": "error"}, error={"const": "Rate limit exceeded"},
        retry_after_seconds=shown("integer", "Seconds after which to try again."),
        limit=shown("integer", "Requests that are taken in a window."),
        window_seconds=shown("integer", "Length of the window, in seconds.")),
}
CHANGED = success_with(called("Changed"), ("data",))


class Route(namedtuple(
        "Route", "method path handler parameters summary changes timeout scaling key limited also "
                 "shared monitored answer probe",
        defaults=[(), "change_timeout_seconds", (), True, True, "", None, False, CHANGED, False])):
    """One endpoint.

    `changes` names the parameters whose containers it changes, a clone's new id last, `timeout`
    the setting of its time, `scaling` its metrics labels (resource, action); `key` says whether a
    key is needed, or which setting of `authentication` says so, `limited` whether the rate is
    limited; `also` is its other path, and shared(api), if given, tells whether an answer costs
    much now, so that all who ask at the same time share one. `monitored` says that its query
    means nothing, for monitors add things to the addresses they ask. `answer` is the JSON Schema
    of what it answers with 200, or None if that is plain text; `probe` says that a 503 of it is
    the same.
    """


def always(api):
    return True


ROUTES = (
    Route("GET", "/health/check", check_health, (),
          "Whether Proxmox's commands work.", key=False,
          shared=lambda api: api.host.must_probe(), monitored=True, answer=called("Health"),
          probe=True),
    Route("GET", "/metrics", show_metrics, (),
          "Metrics for Prometheus.", key="metrics",
          limited=False, shared=always, monitored=True, answer=None),
    Route("GET", "/routes", list_routes, (),
          "This list.",
          answer=record("The endpoints.", status={"const": "success"}, routes=list_of("Endpoint"))),
    Route("GET", "/openapi.json", show_openapi, (),
          "This API's description in OpenAPI 3.1.",
          answer={"type": "object", "description": "An OpenAPI document."}),
    Route("POST", "/scale/cores", set_cores, (VM_ID, CORES),
          "Set a container's number of CPU cores.",
          changes=("vm_id",), scaling=("cpu", "set")),
    Route("POST", "/scale/ram", set_memory, (VM_ID, MEMORY),
          "Set a container's memory, in MB.",
          changes=("vm_id",), scaling=("ram", "set")),
    Route("POST", "/scale/storage/increase", grow_storage, (VM_ID, DISK_SIZE, DISK, CURRENT_SIZE),
          "Grow a container's disk by so many GB.",
          changes=("vm_id",), scaling=("storage", "increase")),
    Route("POST", "/snapshot/create", create_snapshot, (VM_ID, SNAPSHOT_NAME, DESCRIPTION),
          "Take a snapshot of a container.",
          changes=("vm_id",), timeout=LONG_TIMEOUT),
    Route("GET", "/snapshot/list", list_snapshots, (VM_ID,),
          "List a container's snapshots, oldest first.",
          answer=success_with(list_of("Snapshot"))),
    Route("DELETE", "/snapshot/delete", delete_snapshot, (VM_ID, SNAPSHOT_NAME),
          "Delete a snapshot of a container.",
          changes=("vm_id",), timeout=LONG_TIMEOUT),
    Route("POST", "/snapshot/rollback", roll_back, (VM_ID, SNAPSHOT_NAME),
          "Roll a container back to a snapshot.",
          changes=("vm_id",), timeout=LONG_TIMEOUT),
    Route("POST", "/clone/create", create_clone,
          (VM_ID, NEW_VM_ID, NEW_VM_NAME, START, IP, STORAGE, FULL),
          "Clone a container, running or not.",
          changes=("vm_id", "new_vm_id"), timeout=LONG_TIMEOUT,
          answer=success_with(called("Cloned"))),
    Route("DELETE", "/clone/delete", delete_clone, (VM_ID,),
          "Destroy a container, running or not.",
          changes=("vm_id",), timeout=LONG_TIMEOUT),
    Route("POST", "/power/start", start_container, (VM_ID,),
          "Start a container.",
          changes=("vm_id",)),
    Route("POST", "/power/stop", stop_container, (VM_ID,),
          "Stop a container at once.",
          changes=("vm_id",)),
    Route("POST", "/power/shutdown", shut_down_container, (VM_ID, TIMEOUT),
          "Let a container shut itself down.",
          changes=("vm_id",)),
    Route("POST", "/power/reboot", reboot_container, (VM_ID, TIMEOUT),
          "Let a container shut down, or kill it past the timeout, and start it.",
          changes=("vm_id",)),
    Route("GET", "/operations", list_operations, (OPERATION, ANY_VM_ID),
          "The last changes, newest first.",
          answer=success_with(list_of("Operation"))),
    Route("GET", "/resource/vm/list", list_containers, (),
          "All containers, in a cluster of all nodes.", also="/resource/lxc/list",
          shared=always, answer=success_with(list_of("Container"))),
    Route("GET", "/resource/vm/status", show_status, (VM_ID,),
          "A container's state and what it uses.", also="/resource/lxc/status",
          shared=always, answer=success_with(called("ContainerStatus"))),
    Route("GET", "/resource/vm/config", show_config, (VM_ID,),
          "A container's allotment, and the limits for scaling it.", also="/resource/lxc/config",
          answer=success_with(called("ContainerConfig"))),
    Route("GET", "/resource/node/status", show_node, (NODE_NAME,),
          "A node's load, memory and disk.",
          shared=always, answer=success_with(called("NodeStatus"))),
    Route("GET", "/resource/cluster/status", show_cluster, (),
          "The cluster's nodes and quorum.",
          shared=always, answer=success_with(called("ClusterStatus"))),
)
PATHS = {path: route for route in ROUTES for path in (route.path, route.also) if path}


def allowed_methods(route):
    return "GET, HEAD, OPTIONS" if route.method == "GET" else f"{route.method}, OPTIONS"


# The table as OpenAPI 3.1

STATUSES = {                                # every answer but success, and what it means
    400: "A parameter is missing, unknown or invalid, or Proxmox refuses it.",
    401: "The key is missing or wrong.",
    403: "The configuration forbids changing this container, or the key may only read.",
    404: "No such container, snapshot or node.",
    405: "Wrong method.",
    408: "The request did not arrive in time.",
    409: "The container's state does not allow it.",
    411: "The request has no Content-Length.",
    413: "The body is too large.",
    414: "The request line is too long.",
    415: "The body is not plain JSON in UTF-8.",
    417: "An expectation that is not met here.",
    429: "Too many requests.",
    431: "The headers are too long.",
    500: "A command failed.",
    503: "Not now; nothing was done.",
    504: "A command did not finish in time; `error` says whether it goes on.",
    505: "Not HTTP/1.",
}

HEADERS = {                                 # of answers: the type and meaning
    "X-RateLimit-Limit": ("integer", "Requests that are taken in a window; "
                                     "absent for local clients."),
    "X-RateLimit-Remaining": ("integer", "How many more would be; absent for local clients."),
    "X-RateLimit-Reset": ("integer", "Epoch seconds at which the oldest counted request "
                                     "leaves the window; absent for local clients."),
    "Retry-After": ("integer", "Seconds after which to try again."),
    "WWW-Authenticate": ("string", "How a key is asked for."),
    "Accept-Encoding": ("string", "The Content-Encoding that is taken: none."),
    "Allow": ("string", "The methods that are taken here."),
    "Location": ("string", "Where the change may be asked for: a path of /operations."),
    "Preference-Applied": ("string", "The preference that was followed: respond-async."),
}
# Local clients do not get these.
RATE_HEADERS = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
STATUS_HEADERS = {
    401: ["WWW-Authenticate"], 405: ["Allow"], 415: ["Accept-Encoding"], 429: ["Retry-After"],
    503: ["Retry-After"]}
PLAIN_ERRORS = {401: "Error", 429: "RateLimited"}       # what is the same for reads and changes
# Of whom is turned away before his request was read, nobody knows what he asked for.
TURNED_AWAY = [called("Error"), called("ChangeError")]


def describe_headers(names):
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def describe_error(status, schema):
    headers = describe_headers([*RATE_HEADERS, *STATUS_HEADERS.get(status, ())])
    schema = {"anyOf": TURNED_AWAY} if (status, schema) == (503, "Error") else called(schema)
    return {"description": STATUSES[status], "headers": headers,
            "content": {"application/json": {"schema": schema}}}


def describe_parameter(parameter):
    """Return (a parameter's description, its JSON Schema)."""
    others = " or ".join(parameter.also)
    text = "; ".join(filter(None, (
        parameter.rule, parameter.note, others and f"may also be called {others}")))
    has_default = parameter.default not in (REQUIRED, None)
    return text, {**parameter.schema, **({"default": parameter.default} if has_default else {})}


def describe_request(route):
    """Describe how a route's parameters are sent: in the query, or in a body."""
    described = [(each, *describe_parameter(each)) for each in route.parameters]
    if route.method == "GET":
        return {"parameters": [
            {"name": each.name, "in": "query", "required": each.default is REQUIRED,
             "description": text, "schema": schema} for each, text, schema in described]}
    body = {"type": "object", "additionalProperties": False,
            "required": [each.name for each in route.parameters if each.default is REQUIRED],
            "properties": {each.name: {"description": text, **schema}
                           for each, text, schema in described}}
    return {
        "parameters": [
            {"name": "Prefer", "in": "header", "required": False, "schema": {"type": "string"},
             "description": "respond-async: do not wait for the change's end (RFC 7240)."}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}


def describe_route(path, route):
    kind = "application/json" if route.answer else "text/plain"
    good = {kind: {"schema": route.answer or {"type": "string"}}}
    # Where a setting says whether a key is needed, it says so of the limit, too.
    limited = route.limited or route.key not in (True, False)
    headers = describe_headers(RATE_HEADERS if limited else ())
    error, keys = "ChangeError" if route.changes else "Error", [{"header": []}, {"query": []}]
    described = {
        "operationId": path.strip("/").replace("/", "_").replace(".", "_"),
        "summary": route.summary,
        # With an empty requirement beside them, these are optional: a setting decides.
        "security": {True: keys, False: []}.get(route.key, [{}, *keys]),
        "responses": {"200": {"description": "Done.", "headers": headers, "content": good},
                      **{str(status): {"$ref": f"#/components/responses/{error}{status}"}
                         for status in STATUSES}},
        **describe_request(route),
    }
    if route.probe:
        described["responses"]["503"] = {
            "description": "Proxmox's commands do not work, or they cannot be looked at now.",
            "content": {kind: {"schema": {"anyOf": [route.answer, *TURNED_AWAY]}}},
            "headers": describe_headers([*RATE_HEADERS, "Retry-After"])}
    if route.changes:
        described["responses"]["202"] = {
            "description": "Accepted, for the client does not want to wait.",
            "content": {"application/json": {"schema": called("Accepted")}},
            "headers": {**headers, **describe_headers(("Location", "Preference-Applied"))}}
    return described


def openapi():
    """Describe the API in OpenAPI, from ROUTES."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "lxc_autoscale_api", "version": VERSION,
                 "description": __doc__.partition("\n")[0]},
        "paths": {path: {route.method.lower(): describe_route(path, route)}
                  for path, route in PATHS.items()},
        "components": {
            "securitySchemes": {"header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                                "query": {"type": "apiKey", "in": "query", "name": "api_key"}},
            "schemas": SCHEMAS,
            "headers": {name: {"description": meaning, "schema": {"type": kind}}
                        for name, (kind, meaning) in HEADERS.items()},
            "responses": {f"{kind}{status}": describe_error(status, PLAIN_ERRORS.get(status, kind))
                          for kind in ("Error", "ChangeError") for status in STATUSES},
        },
    }


# From a request to an answer

def fingerprint(key):
    """Return what logs name a key by."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")       # what clients call UTF-8 or a part of it
BOM = "\ufeff".encode("utf-8")


class Pairs(list):
    """A JSON object as the pairs it was written with."""


def no_constant(name):
    """Refuse NaN and Infinity, which Python would take."""
    raise ValueError(f"{name} is not JSON")


JSON_PAIRS = json_decoder(object_pairs_hook=Pairs, parse_constant=no_constant)


def read_object(request):
    """Return the JSON object in a body as (name, value) pairs, duplicates kept, or Problem.

    The body is read only when it will be taken. A byte order mark before the object is ignored,
    as RFC 8259 section 8.1 allows. (The codec utf-8-sig would do so as well, but is loaded from
    a file at its first use.)
    """
    if request.length is None:
        raise Problem(411, "Missing Content-Length: send the parameters as a JSON object, "
                           "with Content-Type: application/json")
    if request.length > MAX_BODY:
        raise Problem(413, f"The body is too large: at most {MAX_BODY} bytes are taken")
    if request.headers.get("content-encoding", "").lower() not in ("", "identity"):
        raise Problem(415, "No Content-Encoding is taken: send the JSON object as it is",
                      {"Accept-Encoding": "identity"})
    kind, *options = request.headers.get("content-type", "").lower().split(";")
    if kind.strip(" \t") != "application/json":
        raise Problem(415, "The body must be JSON: send Content-Type: application/json")
    for each in options:
        name, _, charset = each.partition("=")
        if name.strip(" \t") == "charset" and charset.strip(' \t"') not in CHARSETS:
            raise Problem(415, "The body must be in UTF-8: send Content-Type: application/json")
    body = request.read_body().removeprefix(BOM)
    try:
        value = JSON_PAIRS.decode(body.decode("utf-8"))
    except NOT_JSON:
        raise Problem(400, "Invalid JSON: the body must be one JSON object in UTF-8, "
                           'such as {"vm_id": 104}') from None
    if not isinstance(value, Pairs):
        raise Problem(400, 'Invalid JSON: must be an object, such as {"vm_id": 104}')
    return value


def loggable_path(path):
    """Return as much of a path as may be logged, for a key may stand in it.

    That is what comes before a key, or before the first mark that may be a mistyped '?'.
    """
    for key in access_log.keys:             # the log would not know a key that was cut in two
        path = path.replace(key, "?")
    return re.split(r"[^A-Za-z0-9/._~-]", path, maxsplit=1)[0][:100]


class Api:
    """Request -> Answer: limits, authenticates, finds the row of ROUTES and calls its handler."""

    def __init__(self, config, host, metrics, workers):
        self.host, self.metrics, self.workers, self.flights = (
            host, metrics, workers, SingleFlight(workers))
        self.changes = Changes(
            host, workers, lambda change: metrics.count_scaling(change, host.pve.seen))
        self.limiter = self.bounds = None
        self.in_progress = lambda: 1            # the server says how many, once there is one
        self.configure(config)

    def configure(self, config):
        """Take over settings; a limiter whose bounds stay goes on counting."""
        rates = config.rate_limiting
        bounds = ((rates.max_requests_per_minute, rates.time_window_seconds) if rates.enabled
                  else None)
        if bounds != self.bounds:
            self.limiter = RateLimiter(*bounds) if bounds else None
        self.config, self.bounds, self.changes.rules = config, bounds, config.containers
        login = config.authentication
        self.open_paths = {
            path for path, route in PATHS.items() if route.key is False
            or (route.key is not True and getattr(login, route.key) == "open")}
        # Keys are compared by digests, so neither their length nor their bytes tell in time.
        self.known = [(hashlib.sha256(key.encode()).digest(), fingerprint(key), key in config.keys)
                      for key in config.keys + config.read_only_keys]

    def answer(self, request):
        """Return the Answer to a Request, or None if the client has left before there was one."""
        limiter, headers, route = self.limiter, {}, PATHS.get(request.path)
        needs_key = self.config.authentication.enabled and request.path not in self.open_paths
        # Where a key is needed, nobody guesses it without end.
        limited = not route or route.limited or needs_key
        try:
            if limited and limiter and not request.client.local:
                headers = self.check_rate(limiter, request.client.address)
            answer = self.dispatch(request, route, needs_key)
        except Problem as problem:
            answer = problem.answer(request.method)
        except ClientLeft:
            answer = None
        except Exception as error:
            log.exception("internal error in %s %s", request.method, loggable_path(request.path))
            answer = internal_error(error).answer(request.method)
        return answer.with_headers(headers) if headers and answer else answer

    def dispatch(self, request, route, needs_key):
        self.authenticate(request, needs_key)
        if not route:
            raise Problem(404, "Unknown path; GET /routes lists the endpoints")
        if request.method == "OPTIONS":
            return Answer(204, "", {"Allow": allowed_methods(route)})
        if request.method != route.method and (request.method, route.method) != ("HEAD", "GET"):
            allowed = allowed_methods(route)
            raise Problem(405, f"Wrong method; {request.path} takes {allowed}", {"Allow": allowed})
        pairs = parse_query(request.query) if request.query and not route.monitored else ()
        pairs = [pair for pair in pairs if pair[0] != "api_key"]
        if route.method != "GET":
            if pairs:
                raise Problem(400, f"Unknown query parameter; {route.method} {route.path} "
                                   "takes its parameters from a JSON body")
            pairs = read_object(request)
        values = parse_parameters(route.parameters, pairs)
        if route.changes:
            return self.change(request, route, values)
        if not (route.shared and route.shared(self)):
            return route.handler(self, **values)
        question = (route.path, *values.values())
        answer = self.flights.join(question, lambda: route.handler(self, **values))
        request.client.wait(answer)
        return answer.result()

    def check_rate(self, limiter, address):
        """Count a request, or Problem 429; return the headers that tell how many more may come."""
        admitted, remaining, wait = limiter.admit(address)
        headers = {"X-RateLimit-Limit": str(limiter.limit),
                   "X-RateLimit-Remaining": str(remaining),
                   "X-RateLimit-Reset": str(math.ceil(time.time() + wait))}
        if admitted:
            return headers
        self.metrics.add("lxc_autoscale_api_rate_limited_total")
        seconds = max(1, math.ceil(wait))
        raise Problem(429, "Rate limit exceeded", {"Retry-After": str(seconds), **headers},
                      retry_after_seconds=seconds,
                      limit=limiter.limit, window_seconds=limiter.window)

    def authenticate(self, request, needs_key):
        """Check the key, if one is needed: Problem 401 for a wrong one, 403 if it may only read."""
        request.client.key = None
        if not needs_key:
            return
        given = request.headers.get("x-api-key")
        if given is None:
            keys = []
            with suppress(Problem):         # a query that cannot be read has none
                keys = [value for name, value in parse_query(request.query) if name == "api_key"]
            given = keys[0] if len(keys) == 1 else ""
        given = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        found = [(name, may_change) for known, name, may_change in self.known
                 if hmac.compare_digest(given, known)]
        if not found:                       # all were compared
            self.metrics.add("lxc_autoscale_api_auth_failures_total")
            raise Problem(401, "Missing or invalid API key",
                          {"WWW-Authenticate": 'ApiKey realm="lxc_autoscale_api"'})
        request.client.key, may_change = found[0]
        if request.method in CHANGING and not may_change:
            raise Problem(403, "This key may only read")

    def change(self, request, route, values):
        """Run a handler that changes containers, once it is the first in their queues."""
        client, key = request.client, request.client.key
        who = f"{client.address} with key {key}" if key else client.address
        change = Change(route, values, who, self.host)
        asynchronous = "respond-async" in request.words("prefer")       # RFC 7240
        self.changes.take(change, asynchronous)
        if asynchronous:
            return Answer(202, {"status": "accepted",
                                "message": f"{change.title} was accepted",
                                "operation": change.id},
                          {"Preference-Applied": "respond-async",
                           "Location": f"/operations?id={change.id}"})
        # A shutdown that is not followed ends after twice its time (PVE::LXC, vm_stop).
        seconds = getattr(self.config.proxmox, route.timeout) + 2 * values.get("timeout", 0)
        try:
            return self.changes.answer(change, client, seconds)
        except (Problem, ClientLeft):
            raise
        except Exception as error:          # the change itself goes on
            log.exception("internal error in %s", change.title)
            raise internal_error(error, outcome=UNKNOWN, operation=change.id) from None


# TLS

PEM_CERTIFICATE = re.compile(               # as OpenSSL looks for it; other lines may say anything
    r"^-----BEGIN CERTIFICATE-----\s*?\n.+?^-----END CERTIFICATE-----\s*?$",
    re.DOTALL | re.MULTILINE)
VALIDITY = re.compile(                      # two times in DER (RFC 5280 section 4.1.2.5)
    rb"\x30.(?:\x17\x0d\d{12}|\x18\x0f\d{14})Z(?:\x17\x0d|\x18\x0f)(\d{12}(?:\d\d)?)Z", re.DOTALL)


def end_of_certificate(pem):
    """Return until when PEM's first certificate is valid, as YYYYMMDDHHMMSS in UTC, or None."""
    first = PEM_CERTIFICATE.search(pem)
    try:
        found = first and VALIDITY.search(ssl.PEM_cert_to_DER_cert(first[0].strip()))
    except ValueError:                      # OpenSSL takes more than Python's reader of this
        return None
    if not found:
        return None
    end = found[1].decode()
    return end if len(end) == 14 else ("19" if end >= "50" else "20") + end


def no_passphrase():
    """Refuse a passphrase to OpenSSL, which would ask the terminal otherwise."""
    raise ValueError


class BadFile(Exception):
    """A file that cannot be used: which setting names it, and what is wrong with it."""


def bad_file(config, setting, text):
    """Make the ConfigError for a file that cannot be used.

    In an unmounted /etc/pve it may yet appear.
    """
    folder = config.proxmox.pve_dir
    below = getattr(config.server, setting).startswith(folder + "/")
    code = 1 if below and not os.path.lexists(f"{folder}/lxc") else EX_CONFIG
    return ConfigError(config.where["server", setting], f"server.{setting} {text}", code=code)


def unverified():
    """Return the context of a client that need not know whom it talks to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def load_tls(certificate, key):
    """Load (SSLContext, when its certificate ends) from the two files, or raise BadFile."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")      # of TLS 1.2: with forward secrecy
    for setting, path, rule, load, arguments in (
            ("tls_certificate", certificate, "must hold a certificate in PEM",
             unverified().load_verify_locations, (certificate,)),
            ("tls_key", key,
             "must hold the key of that certificate, in PEM and without a passphrase",
             context.load_cert_chain, (certificate, key, no_passphrase))):
        try:
            load(*arguments)
        except (ssl.SSLError, ValueError) as error:
            why = getattr(error, "reason", None)
            raise BadFile(
                setting, f"{path} {rule}" + (f" (OpenSSL says {why})" if why else "")) from None
        except OSError as error:
            raise BadFile(setting, f"{path} cannot be read: {error.strerror}") from None
    with open(certificate, encoding="latin-1") as file:
        return context, end_of_certificate(file.read())


def read_tls(config, files, old=None):
    """Return (SSLContext for connections to come, when its certificate ends), or Nones.

    Of the files that are named, one that cannot be used is a ConfigError. They may lie under
    /etc/pve, and nobody waits for that without end; if it hangs or is not mounted, as it may
    be while a host starts, that passes, and systemd tries the start again. If the old settings
    name the same files then, what these held stays: a key must be revocable even so.
    """
    certificate, key = config.server.tls_certificate, config.server.tls_key
    if not certificate:
        return None, None
    try:
        return files.read(load_tls, certificate, key)
    except BadFile as fault:
        error = bad_file(config, *fault.args)
    except Problem as problem:
        line = config.where["server", "tls_certificate"]
        error = ConfigError(line, f"server.tls_certificate: {problem.error}", code=1)
    if (error.code == EX_CONFIG or not old
            or (certificate, key) != (old.server.tls_certificate, old.server.tls_key)):
        raise error
    log.warning("not read anew: %s", error.text)
    return old.tls, old.tls_ends


class Tls:
    """A connection that speaks TLS, with a socket's recv and send.

    The socket stays as it is, with the kernel's deadlines: Python's own SSLSocket would try
    again for ever after one of them (_ssl.c, as for a blocking socket). The handshake is part
    of what is read first, and so of the first request's time.
    """

    def __init__(self, sock, context):
        self.sock, self.incoming, self.outgoing = sock, ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.begun = self.plain = False
        self.unsent, self.taken = b"", 0

    def recv(self, size):
        """Receive as a socket does, but None if what has come makes no whole record yet.

        What is no TLS at all is returned as it came, and `plain` says so.
        """
        data = self.decrypted(size)
        if data is not None:
            return data
        received = self.sock.recv(size)
        if not received:
            return b""
        if not self.begun and received[0] != 0x16:          # a handshake (RFC 8446 section 5.1)
            self.plain = True
            return received
        self.begun = True
        self.incoming.write(received)
        return self.decrypted(size)

    def decrypted(self, size):
        try:
            return self.tls.read(size)
        except ssl.SSLWantReadError:
            return None
        finally:                            # a step of the handshake, or why it failed
            if self.outgoing.pending:
                self.sock.sendall(self.outgoing.read())

    def send(self, data):
        """Send as a socket does; take nothing (0) until all that was taken before has gone out."""
        if self.plain:
            return self.sock.send(data)
        if not self.unsent:
            self.taken = self.tls.write(memoryview(data)[:LARGE])
            self.unsent = self.outgoing.read()
        self.unsent = self.unsent[self.sock.send(self.unsent):]
        return 0 if self.unsent else self.taken

    def end(self):
        """Tell the client that nothing more comes, and wait for nothing."""
        if self.plain or self.unsent:
            return
        with suppress(OSError):             # its own farewell has not come, and need not
            self.tls.unwrap()
        if self.outgoing.pending:
            self.sock.send(self.outgoing.read(), socket.MSG_DONTWAIT)


# HTTP/1.1

AUTHORITY = r"(?:\[[0-9A-Za-z.:%_-]+\]|[0-9A-Za-z._%-]+)(?::[0-9]*)?"       # RFC 3986, without user
# A Host field: empty where the target names none (RFC 9112 section 3.2).
HOST = re.compile(f"(?:{AUTHORITY})?")
REQUEST_LINE = re.compile(
    rb"(?P<method>[!#$%%&'*+.^_`|~0-9A-Za-z-]{1,32}) (?:(?i:https?)://%b(?=[/? ])|(?=/))"
    rb"(?P<target>[!-~]*) HTTP/1\.(?P<minor>[0-9])" % AUTHORITY.encode())
OTHER_HTTP = re.compile(rb"HTTP/(?!1\.[0-9]\Z)[0-9]+\.[0-9]+")
EMPTY_LINES = re.compile(rb"(?:\r\n)*")
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
FIELD_VALUE = re.compile(r"[\t -~\x80-\xff]*")
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {phrase}\r\n"
                for status, (phrase, _) in BaseHTTPRequestHandler.responses.items()}
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")     # that metrics tell apart
COMMON_HEADERS = (f"Server: lxc_autoscale_api/{VERSION}\r\n"
                  "Cache-Control: no-store\r\n"
                  "X-Content-Type-Options: nosniff\r\n")


def timeval(seconds):
    """Pack seconds as the struct that SO_RCVTIMEO and SO_SNDTIMEO take."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


def parse_request_line(line):
    """Split a request line's bytes into (method, path, query, minor version), or Problem.

    The target may be a whole URL (RFC 9112 section 3.2.2); whatever host it names is this
    one. What is said in a later HTTP/1 is understood as HTTP/1.1 (RFC 9110 section 2.5).
    """
    match = REQUEST_LINE.fullmatch(line)
    if match:
        path, _, query = match["target"].decode("ascii").partition("?")
        return match["method"].decode("ascii"), path or "/", query, min(1, int(match["minor"]))
    method, _, rest = line.partition(b" ")
    target, _, version = rest.partition(b" ")
    if method and target and OTHER_HTTP.fullmatch(version):
        raise Problem(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here")
    raise Problem(400, "Bad request line: expected METHOD /path HTTP/1.1, in visible ASCII")


def parse_head(block, minor):
    """Read the header lines of a request as {lower-case name: value}, or Problem.

    Stricter than RFC 9112 allows where leniency lets two parsers see two requests: no
    bare CR or LF, no folding, no space before a colon. Repeated fields are joined, so
    that two lengths are one that cannot be right. What Host must be is in its section 3.2.
    """
    fields = {}
    for line in block.decode("latin-1").split("\r\n") if block else ():
        name, colon, value = line.partition(":")
        if not (colon and FIELD_NAME.fullmatch(name) and FIELD_VALUE.fullmatch(value)):
            raise Problem(400, "Bad header: expected 'Name: value' on a line of its own")
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    headers = {name: ", ".join(values) for name, values in fields.items()}
    if "transfer-encoding" in headers:
        raise Problem(411, "Transfer-Encoding is not taken; send a Content-Length")
    if not re.fullmatch(r"[0-9]{1,15}", headers.get("content-length", "0")):
        raise Problem(400, "Bad Content-Length: must be given once, in digits")
    hosts = fields.get("host", [])
    if not hosts and minor:
        raise Problem(400, "Missing Host: HTTP/1.1 needs one")
    if len(hosts) > 1:
        raise Problem(400, f"Bad Host: there are {len(hosts)}, and one is needed")
    if hosts and not HOST.fullmatch(hosts[0]):
        raise Problem(400, "Bad Host: expected a name or an address, and perhaps a port, "
                           "such as pve.example.org:5000 or [2001:db8::1]:5000")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise Problem(417, "The only expectation met here is 100-continue")
    return headers


# Whether a change was asked for is not known.
TOO_MANY_BODY = Problem(
    503, "Too many connections; try again later", outcome=NOTHING_DONE).answer().body
TOO_MANY = (f"{STATUS_LINES[503]}Retry-After: 1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(TOO_MANY_BODY)}\r\nConnection: close\r\n\r\n"
            ).encode() + TOO_MANY_BODY


class Server(ThreadingHTTPServer):
    """Connections, a thread each and at most `max_connections` of them."""
    request_queue_size = 512

    def __init__(self, config, api, handler):
        server, files = config.server, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.api, self.tls = api, config.tls
        # Beyond the limit of open files nobody could be accepted, so nobody would give way.
        self.max_connections = min(server.max_connections, max(1, files - SPARE_FILES))
        if self.max_connections < server.max_connections:
            log.warning("server.max_connections is %d, but the limit of open files (%d) lets %d in",
                        server.max_connections, files, self.max_connections)
        # Held by the one thread that waits in accept(); how often one has come; set when it has.
        self.accepting, self.taken, self.came = threading.Lock(), 0, threading.Event()
        self.stopping = threading.Event()
        api.in_progress = lambda: sum(
            client.asking is not None for client in list(self.clients.values()))
        self.address_family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        self.changed = threading.Condition()
        self.clients = {}                   # {socket: Client}
        self.sending = {}                   # {Client: since when a large answer goes out to it}
        self.refused = deque()              # (until, socket): told to go, not yet closed
        self.own_address, self.complained = None, -math.inf
        super().__init__((server.host, server.port), handler)

    def server_bind(self):
        """Bind, with what every connection then inherits (Linux, net/core/sock.c, sk_clone).

        HTTPServer's own method would ask the DNS for this host's name.
        """
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.socket.setsockopt(socket.SOL_SOCKET, option, timeval(REQUEST_SECONDS))
        TCPServer.server_bind(self)

    def serve_forever(self):
        """Let threads take connections until the daemon stops, and look after both meanwhile.

        Python runs one thread at a time, so few are faster than many. Where none waits for the
        next connection, others are added only if all are held up: for HELD_SECONDS the daemon was
        idle, or took less than one connection in such a time, or no more than threads had just
        been added. These are twice as many as the last time if those were all taken, so that a
        crowd of slow clients delays nobody for long, and else half as many.
        """
        added = before = seen = 0           # the last round's threads, connections so far, moment
        looked = 0                          # when it was last looked who has left
        while not self.stopping.is_set():
            self.came.clear()
            if self.accepting.locked():
                self.came.wait(LOOK_SECONDS)
            used = time.process_time()
            self.stopping.wait(HELD_SECONDS)
            busy, now = time.process_time() - used > HELD_SECONDS / 2, time.monotonic()
            taken, before = self.taken - before, self.taken
            elapsed, seen = now - seen, now
            flows = busy and taken > added and taken * HELD_SECONDS > elapsed
            if flows or self.accepting.locked():
                added = 0
            else:
                added = max(1, 2 * added if taken >= added else added // 2)
            try:
                for _ in range(min(added, self.max_connections)):
                    self.api.workers.start(self.take_connections)
            except Problem:                 # no thread is left
                self.refuse_backlog()
                self.stopping.wait(0.1)     # asking again at once would only burn CPU
            if now - looked > LOOK_SECONDS:
                looked = now
                self.close_connections()
                self.api.changes.refuse_late()

    def refuse_backlog(self):
        """Turn away the connections that wait to be accepted, unless a thread accepts them."""
        if not self.accepting.acquire(blocking=False):
            return
        try:
            poll = select.poll()
            poll.register(self.socket, select.POLLIN)
            for _ in range(self.request_queue_size):        # and not as long as others come
                if not poll.poll(0):
                    break
                self.turn_away(self.get_request()[0])
        except (OSError, ValueError):       # no descriptor is left, or the socket is closed
            pass
        finally:
            self.accepting.release()

    def take_connections(self):
        """Accept connections and handle them, one after the other, until another thread waits.

        Nothing is handed over from thread to thread: the kernel itself wakes one that waits.
        """
        while not self.stopping.is_set() and self.accepting.acquire(blocking=False):
            try:
                sock, (address, port, *_) = self.get_request()
                self.taken += 1
            except OSError as error:        # none came for REQUEST_SECONDS, or the daemon stops
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    # It stays in the backlog; asking again at once would only burn CPU.
                    time.sleep(0.1)
                continue
            finally:
                self.accepting.release()
            self.came.set()
            client_address = str(plain_address(address)) if ":" in address else address, port
            self.handle_connection(sock, client_address)

    def handle_connection(self, sock, client_address):
        """Take in a connection and let a Handler answer its requests, or turn it away."""
        with self.changed:
            full = (len(self.clients) >= self.max_connections
                    and client_address != self.own_address)
            room = not full or self.make_room(client_address[0])
            if room:
                client = self.clients[sock] = Client(sock, client_address[0])
                if self.stopping.is_set():  # it came at the last moment
                    self.hang_up(client)
        if not room:
            self.turn_away(sock)
            return
        try:
            self.finish_request(sock, client_address)
        except Exception:
            log.exception("internal error in a connection from %s", client_address[0])
        finally:
            with self.changed:              # first, for who sees it closed may come again at once
                self.clients.pop(sock, None)
            self.shutdown_request(sock)

    def make_room(self, address):
        """Close a connection of the address that holds most, and tell whether there is room now.

        It is for a client from `address`. If that is one of those which hold most, a connection
        gives way only if it has waited, or been answered, for YIELD_SECONDS, and its change has
        not begun.
        """
        holders = [(client, networks_of(client.address)[0]) for client in self.clients.values()]
        newcomer = networks_of(address)[0]
        held = Counter([newcomer, *(holder for _, holder in holders)])
        most = max(held.values())
        greedy = [client for client, holder in holders if held[holder] == most]
        least = min(greedy, key=lambda client: (
            client.changing, client.waited_for or client.asking))
        waits = time.monotonic() - (least.waited_for or least.asking)
        if held[newcomer] == most and (least.changing or waits < YIELD_SECONDS):
            return False
        if held[newcomer] < most and time.monotonic() - self.complained > COMPLAINT_SECONDS:
            self.complained = time.monotonic()
            log.warning("%s holds %d of %d connections; one of them gives way to %s",
                        least.address, most, self.max_connections, address, extra=UNWAITED)
        self.dismiss(least)
        return True

    def dismiss(self, client):
        """Close a client's connection; the answer that it waits for is not waited for any more."""
        self.hang_up(client)
        self.clients.pop(client.sock, None)
        client.let_go()

    def hang_up(self, client):
        """Wake a connection's thread: its next read finds the end of the connection.

        To a client without a request in work, what is being sent still goes out.
        """
        with suppress(OSError):
            client.sock.shutdown(socket.SHUT_RDWR if client.asking else socket.SHUT_RD)

    @contextmanager
    def large_answer(self, client):
        """Send a large answer once there are less than MAX_SENDING, or one has given way.

        That is the one that has been on its way longest, of those of the address that has most,
        if that was YIELD_SECONDS or more.
        """
        with self.changed:
            while len(self.sending) >= MAX_SENDING:
                held = Counter(networks_of(each.address)[0] for each in self.sending)
                most = max(held.values())
                slow = next(each for each in self.sending
                            if held[networks_of(each.address)[0]] == most)
                seconds = self.sending[slow] + YIELD_SECONDS - time.monotonic()
                if seconds > 0:
                    self.changed.wait(seconds)
                else:
                    del self.sending[slow]
                    self.dismiss(slow)
            self.sending[client] = time.monotonic()
        try:
            yield
        finally:
            with self.changed:
                self.sending.pop(client, None)
                self.changed.notify_all()

    def close_connections(self):
        """Close those that were refused LINGER_SECONDS ago, and those left while a request waits.

        Where no request waits, the connection's own thread notices that its client has left.
        """
        with self.changed:
            while self.refused and self.refused[0][0] <= time.monotonic():
                self.refused.popleft()[1].close()
        late = time.monotonic() - LOOK_SECONDS
        # `asking` is read once: its own thread sets it to None.
        waiting = {client.sock.fileno(): client for client in list(self.clients.values())
                   if (client.asking or math.inf) < late}
        poll = select.poll()
        for fd, client in waiting.items():
            if fd >= 0:                     # else it has just been closed
                poll.register(fd, 0 if client.changing else select.POLLRDHUP)
        try:
            gone = poll.poll(0)
        except OSError:                     # more than RLIMIT_NOFILE, which may have been lowered
            gone = ()
        for fd, _ in gone:
            with self.changed:
                if waiting[fd].waited_for is None:
                    self.dismiss(waiting[fd])

    def turn_away(self, sock):
        """Answer 503, without a thread, to a connection that is not taken in.

        It is closed LINGER_SECONDS later, when its client had time to read. With TLS nothing is
        sent, for that would need a handshake.
        """
        self.api.metrics.add("lxc_autoscale_api_connections_refused_total")
        with suppress(OSError):
            sock.setblocking(False)
            if not self.tls:
                sock.send(TOO_MANY)
            sock.shutdown(socket.SHUT_WR)
        with self.changed:
            self.refused.append((time.monotonic() + LINGER_SECONDS, sock))
            if len(self.refused) > min(self.max_connections, SPARE_FILES // 2):
                self.refused.popleft()[1].close()

    @contextmanager
    def request_in_work(self, client, address, local):
        """Note that a whole request has come and for whom, and in the end that it was answered.

        Yield whether work for it may begin: not once the daemon stops or its connection is closed.
        """
        with self.changed:
            may_begin = not self.stopping.is_set() and client.sock in self.clients
            if may_begin:
                client.address, client.local = address, local
                client.waited_for, client.asking = None, time.monotonic()
        try:
            yield may_begin
        finally:
            with self.changed:
                client.waited_for, client.asking, client.changing = time.monotonic(), None, False
                if self.stopping.is_set():
                    self.changed.notify_all()

    def answers(self):
        """Tell whether a request to ourselves is answered: what the watchdog is fed for."""
        host, port = self.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        try:
            with socket.socket(self.address_family) as sock:
                sock.settimeout(REQUEST_SECONDS)
                sock.bind((host, 0))
                # It is let in even if all places are taken.
                self.own_address = sock.getsockname()[:2]
                sock.connect((host, port))
                with unverified().wrap_socket(sock) if self.tls else sock as stream:
                    stream.sendall(b"OPTIONS /health/check HTTP/1.0\r\n\r\n")
                    # The answer comes from a thread of its own.
                    return stream.recv(12) in (b"HTTP/1.1 204", b"HTTP/1.1 429")
        except OSError as error:            # an address that has gone says nothing of the daemon
            return error.errno == errno.EADDRNOTAVAIL

    def stop_listening(self):
        """Refuse new connections, and hang up on those that have not sent a whole request."""
        with self.changed:
            self.stopping.set()
            for client in self.clients.values():
                if not client.asking:
                    self.hang_up(client)
        self.refuse_backlog()
        with suppress(OSError):             # on Linux this ends a listening socket at once
            self.socket.shutdown(socket.SHUT_RD)
        self.server_close()

    def wait_for_answers(self, seconds):
        """Wait for so many seconds at most, and tell whether all was done.

        That is: all requests in work were answered, and all changes ended, or were left running.
        A change may go on though its client has left, and its steps must not end half-way.
        """
        def in_work():
            return self.api.changes.are_running() or any(
                client.asking for client in self.clients.values())
        deadline = time.monotonic() + seconds
        with self.changed:
            while in_work() and time.monotonic() < deadline:
                self.changed.wait(0.05)
            return not in_work()


class Handler(BaseHTTPRequestHandler):
    """One connection: bytes in, Requests; Answers, bytes out.

    Of http.server the loop over requests is used, and not its parser, which is lenient
    and waits anew with every byte: here each request has one deadline. The kernel keeps
    the time (SO_RCVTIMEO), so that a request which comes in one piece costs one recv and
    one send, and no poll.
    """

    def setup(self):
        self.client = (self.server.clients.get(self.request)
                       or Client(self.request, self.client_address[0]))
        self.channel = Tls(self.request, self.server.tls) if self.server.tls else self.request
        self.buffer, self.unread, self.continues, self.linger = bytearray(), 0, False, False
        self.patience, self.fresh, self.minor = REQUEST_SECONDS, True, 1
        self.deadline = time.monotonic() + REQUEST_SECONDS

    def handle_one_request(self):
        """Answer one request, and say in `close_connection` whether there may be another."""
        self.close_connection = True
        try:
            request = self.read_request()
        except Problem as problem:
            self.refuse(problem, self.client_address[0])
            return
        except (ClientLeft, OSError):
            return
        speaks_for = client_of(request.headers, self.client_address[0],
                               self.server.api.config.server.trusted_proxies)
        with self.server.request_in_work(self.client, *speaks_for) as may_begin:
            if not may_begin:
                self.refuse(unavailable("The daemon is stopping, or this connection has lost its "
                                        "place", 1), speaks_for[0])
                return
            started = time.perf_counter()
            answer = self.server.api.answer(request)
            # What is unread of its body would have to be read and dropped: not if that is much, or
            # comes only if it is asked for. With 408 or 411, where it ends is not known.
            if (self.server.stopping.is_set() or answer is None or answer.status in (408, 411)
                    or self.unread > MAX_BODY or (self.unread and self.continues)):
                self.close_connection = True
            self.client.waited_for = time.monotonic()       # to take the answer
            self.respond(answer, request.method, request.path, started)
        if not self.close_connection:
            self.drain()

    def refuse(self, problem, address):
        """Answer what is no well-framed request, or came when no work may begin any more."""
        self.close_connection = self.linger = True
        self.client.address = address
        # Of a request line that cannot be read, the method may be plain.
        method = self.method or bytes(self.buffer[:7]).partition(b" ")[0].decode("latin-1")
        shown = self.method or ("HEAD" if method == "HEAD" else "-")    # a HEAD gets no body
        self.respond(problem.answer(method), shown, self.path or "-", math.inf)

    def read_request(self):
        """Wait for the next well-framed Request and return it, or raise Problem.

        It raises ClientLeft if the connection ends, or if no request begins in time. A request's
        time starts with its first byte, but that of the first one with the connection. Empty lines
        before a request are dropped (RFC 9112 section 2.2), and start nothing.
        """
        self.method = self.path = None      # not known yet
        self.begun, empty = False, 0
        if not self.fresh:
            self.deadline = time.monotonic() + IDLE_SECONDS
        while self.buffer in (b"", b"\r") or self.buffer.startswith(b"\r\n"):
            end = EMPTY_LINES.match(self.buffer).end()
            del self.buffer[:end]
            empty += end
            if empty > MAX_LINE:
                raise Problem(400, "Too many empty lines before a request line")
            if self.buffer in (b"", b"\r"):
                self.receive()
        if not self.fresh:
            self.deadline = time.monotonic() + REQUEST_SECONDS
        self.begun, self.fresh = True, False
        line_end = self.read_until(b"\r\n", 0, MAX_LINE, 414, "The request line is")
        self.method, self.path, query, self.minor = parse_request_line(
            bytes(self.buffer[:line_end]))
        end = self.read_until(b"\r\n\r\n", line_end, MAX_HEAD, 431, "The headers are")
        headers = parse_head(bytes(self.buffer[line_end + 2:end]), self.minor)
        del self.buffer[:end + 4]
        length = int(headers["content-length"]) if "content-length" in headers else None
        self.unread, self.continues = length or 0, "expect" in headers and self.minor == 1
        request = Request(
            self.method, self.path, query, headers, length, self.read_body, self.client)
        options = request.words("connection")
        self.close_connection = "close" in options or not (self.minor or "keep-alive" in options)
        return request

    def read_until(self, marker, start, limit, status, what):
        """Return where `marker` begins in the buffer, from `start` on.

        It raises a Problem with this status if `what` is longer than `limit` bytes.

        Only what came last is looked through: a head that comes in single bytes would cost
        the square of its length otherwise.
        """
        seen = start
        while True:
            end = self.buffer.find(marker, max(start, seen - len(marker) + 1))
            if 0 <= end <= limit:
                return end
            if end > limit or len(self.buffer) > limit + len(marker):
                raise Problem(status, f"{what} longer than {limit} bytes")
            if BARE_LINE_END.search(self.buffer, max(start, seen - 1)):
                raise Problem(400, "Bad line ending: a line ends in CR LF, "
                                   "and neither stands alone")
            seen = len(self.buffer)
            self.receive()

    def receive(self):
        """Add what comes to the buffer; ClientLeft at the connection's end.

        At the deadline it raises Problem 408, or ClientLeft if no request has begun, for then
        the client is idle, and not slow. The kernel waits as long as it was last told, so it is
        told only what differs by more than a little.
        """
        seconds = self.deadline - time.monotonic()
        try:
            if seconds < 0.001:
                raise BlockingIOError
            if not seconds <= self.patience < seconds + 0.1:
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(seconds))
                self.patience = seconds
            data = self.channel.recv(65536)
        except BlockingIOError:
            if not self.begun:
                raise ClientLeft from None
            raise Problem(
                408, f"The request did not arrive within {REQUEST_SECONDS} s") from None
        if data == b"":
            raise ClientLeft
        self.buffer += data or b""          # of TLS, something came that makes no whole record yet
        if self.channel is not self.request and self.channel.plain:
            raise Problem(400, "This port speaks TLS: ask for https:// instead of http://")

    def read_body(self):
        before, self.client.waited_for = self.client.waited_for, time.monotonic()
        try:
            if self.continues:
                self.continues = False
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            while len(self.buffer) < self.unread:
                self.receive()
        except (ClientLeft, OSError):
            raise Problem(400, "The connection ended before the body did") from None
        finally:
            self.client.waited_for = before
        body = bytes(self.buffer[:self.unread])
        del self.buffer[:self.unread]
        self.unread = 0
        return body

    def drain(self):
        """Drop a body that was not asked for: its bytes must never be taken for a request."""
        self.continues = False
        try:
            self.read_body()
        except Problem:
            self.close_connection = True

    def respond(self, answer, method, path, started):
        """Send an answer, unless the client has left (None), and count and log the request.

        `started` is when the work for it began, or infinity if it did not.
        """
        status, size = answer.status if answer else CLIENT_LEFT, 0
        known, metrics = path in PATHS, self.server.api.metrics
        labels = (method if method in METHODS else "other", path if known else "unknown")
        # First, for who has the answer may ask for /metrics at once.
        metrics.add("lxc_autoscale_api_requests_total", *labels, str(status))
        metrics.add("lxc_autoscale_api_request_duration_seconds", *labels,
                    value=max(0, time.perf_counter() - started))
        if answer:
            try:
                size = self.send_answer(answer, method == "HEAD")
            except OSError:
                self.close_connection, status = True, CLIENT_LEFT
        milliseconds = max(0, time.perf_counter() - started) * 1000
        shown = path if known else loggable_path(path)
        access_log.add(f"{self.client.address} {method} {shown} {status} {size} "
                       f"{milliseconds:.1f} ms")

    def send_answer(self, answer, head_only):
        """Send an answer, in one write if it is not large; return its body's size as sent."""
        headers = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
        if answer.status != 204:
            headers += (f"Content-Type: {answer.content_type}\r\n"
                        f"Content-Length: {len(answer.body)}\r\n")
        if self.close_connection:
            headers += "Connection: close\r\n"
        elif self.minor == 0:
            headers += "Connection: keep-alive\r\n"
        head = (f"{STATUS_LINES[answer.status]}Date: {http_date(int(time.time()))}\r\n"
                f"{COMMON_HEADERS}{headers}\r\n").encode("latin-1")
        body = b"" if head_only else answer.body
        if len(body) > LARGE:               # its bytes are shared, and not copied for each client
            with self.server.large_answer(self.client):
                self.send(head)
                self.send(body)
        else:
            self.send(head + body)
        return len(body)

    def send(self, data):
        """Send all; OSError if no byte is taken for REQUEST_SECONDS, or not all in twice that."""
        deadline = time.monotonic() + REQUEST_SECONDS
        sent = self.channel.send(data)
        while sent < len(data):
            if time.monotonic() > deadline:
                raise TimeoutError
            sent += self.channel.send(memoryview(data)[sent:])

    def finish(self):
        """Let the answer arrive: to close with bytes unread is a reset, which may destroy it."""
        deadline = time.monotonic() + LINGER_SECONDS
        with suppress(OSError):
            if self.channel is not self.request:
                self.channel.end()
            if not (self.linger or self.unread):
                return
            self.request.shutdown(socket.SHUT_WR)
            self.request.settimeout(LINGER_SECONDS)
            while time.monotonic() < deadline and self.request.recv(65536):
                pass


# The daemon

def read_credential():
    """Return the key that systemd passes with LoadCredential=api_key:…, or None."""
    try:
        with open(os.path.join(os.environ["CREDENTIALS_DIRECTORY"], "api_key"),
                  encoding="utf-8") as file:
            return file.read().strip()
    except (KeyError, OSError, UnicodeDecodeError):
        return None


def read_file(path):
    """Return a file's bytes, or the OSError that this raises."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        return error


def read_settings(path, files=None, old=None):
    """Read a file's settings; the ConfigError names file and line of each fault.

    `files` reads it, and the files that it names, for they may hang; `old` are the settings in
    force, if there are any.
    """
    files = files or Files(Workers())
    try:
        raw = files.read(read_file, path)
    except Problem as problem:
        raise ConfigError(0, f"{path}: {problem.error}", code=1) from None
    if isinstance(raw, OSError):
        raise ConfigError(0, f"{path}: cannot be read: {raw.strerror}")
    try:
        config = load_settings(raw.decode("utf-8"), read_credential())
        config.tls, config.tls_ends = read_tls(config, files, old)
        return config
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(line, f"{path}:{line}: this is not UTF-8") from None
    except ConfigError as error:
        told = [f"{path}:{each.line}: {each.text}" for each in (error, *error.others)]
        raise ConfigError(error.line, "\n".join(told), code=error.code) from None


def build(config):
    """Make a Server that listens, from the settings."""
    metrics = Metrics()
    settings = config.proxmox
    workers = Workers()
    commands = Commands(settings.max_commands, settings.read_timeout_seconds, workers, metrics)
    host = Proxmox(
        commands, Files(workers), settings.pve_dir, settings.cgroup_dir, settings.cluster)
    return Server(config, Api(config, host, metrics, workers), Handler)


class Signals:
    """What signals ask for: to stop, which stays asked for, or else to reload.

    A handler alone could be missed: Python runs it between two steps of the main thread,
    which may be about to wait. So each signal also comes as a byte through a socket. That may
    be full: then the handler keeps a stop, and a reload is in the socket already. Python must
    not warn of that: it may wait for itself then (CPython, signalmodule.c, trip_signal).
    """

    def __init__(self):
        self.stop = None                    # the number of the signal that asked for it
        self.reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.detach(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self.keep)

    def keep(self, number, _):
        if number != signal.SIGHUP:
            self.stop = number

    def wait(self, until=None):
        """Wait for a signal, and return its number; many that came at once are one.

        With `until`, a moment of time.monotonic(), it is None if none has come by then.
        """
        if self.stop:
            return self.stop
        self.reader.settimeout(until and max(0.001, until - time.monotonic()))
        try:
            came = self.reader.recv(4096)
        except socket.timeout:
            return self.stop
        return self.stop or next((each for each in came if each != signal.SIGHUP), signal.SIGHUP)


def list_keys(config):
    """Yield a line for each key: its setting, its fingerprint, and whether it may only read."""
    login = config.authentication
    settings = {login.api_key: "authentication.api_key",
                **dict.fromkeys(login.api_keys, "authentication.api_keys")}
    for key in config.keys:
        yield f"{settings.get(key, 'credential api_key')}: key {fingerprint(key)}"
    for key in config.read_only_keys:
        yield f"authentication.read_only_keys: key {fingerprint(key)}, may only read"


def notify(state):
    """Tell systemd, if it started us, as sd_notify(3) does.

    An address with @ is an abstract one. The socket is connected, for else poll(2) calls it
    writable though systemd takes nothing, and Python would ask for a second without a pause
    (Linux, net/unix/af_unix.c, unix_dgram_poll; CPython, socketmodule.c, sock_call_ex).
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(1)
            sock.connect("\0" + path[1:] if path[0] == "@" else path)
            sock.send(state.encode())
    except OSError as error:
        log.warning("systemd cannot be told %s: %s", state.partition("\n")[0],
                    error.strerror or error)


def watchdog_seconds():
    """Return how often systemd wants to hear from us in seconds, with a margin, or None."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    mine = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(usec) / 3e6 if mine and re.fullmatch(r"[1-9][0-9]{0,15}", usec) else None


def fixed_settings(config):
    """Return the settings under server: and proxmox: that count only after a restart."""
    taken_over = ("tls_certificate", "tls_key", "trusted_proxies",
                  "change_timeout_seconds", "long_change_timeout_seconds")
    return {name: value for name, value in (vars(config.server) | vars(config.proxmox)).items()
            if name not in taken_over}


def warn_of_certificate(config):
    if config.tls_ends and config.tls_ends < time.strftime("%Y%m%d%H%M%S", time.gmtime()):
        log.warning("server.tls_certificate %s has expired (%s, in UTC); clients will refuse it",
                    config.server.tls_certificate, config.tls_ends)


def reload(server, path, files):
    """Take over keys, certificate, limits, container rules and logs; a bad file changes nothing."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
    old = server.api.config
    try:
        config = read_settings(path, files, old)
    except ConfigError as error:
        for told in error.text.split("\n"):
            complain(f"not reloaded, the old settings stay: {told}")
            log.error("not reloaded, the old settings stay: %s", told)
    except Exception:
        log.exception("internal error in a reload; the old settings stay")
    else:
        point_logs(config)
        server.api.configure(config)
        server.tls = config.tls
        log.info("reloaded %s", path)
        warn_of_certificate(config)
        if fixed_settings(config) != fixed_settings(old):
            log.warning("changed settings under server: or proxmox: may need a restart to count")
    notify("READY=1")


def warn_of_temporary_snapshots(api, told):
    """Log the temporary snapshots that this daemon has not taken, and has not `told` before.

    An earlier daemon has left them, that was stopped during a clone, or another node's needs them.
    What is told is added to `told`.
    """
    try:
        found = api.host.files.read(api.host.pve.temporary_snapshots)
    except Problem as problem:
        log.warning("not looked for snapshots that an earlier stop left: %s", problem.error)
        return
    # Of this daemon's own, the changes tell.
    told.update(word for change in list(api.changes.recent)
                for step in list(change.steps) for word in step)
    for name in sorted(found.keys() - told):
        log.warning("a temporary snapshot is there that this daemon has not taken; "
                    "once no clone runs, remove it with: %s", found[name])
    told.update(found)


def in_background(function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True).start()


def feed_watchdog(server):
    """Tell systemd as often as it asks for, if it does, that the daemon answers itself."""
    seconds = watchdog_seconds()
    while seconds and not server.stopping.is_set():
        time.sleep(seconds)                 # a wait of 3.9.2 lasts longer if the clock is set back
        if server.answers():
            notify("WATCHDOG=1")


def serve(server, signals, config_path):
    """Answer until a signal; then let requests in work finish, and leave what still runs alone."""
    in_background(server.serve_forever)
    log.info("lxc_autoscale_api %s listens on %s port %d", VERSION, *server.server_address[:2])
    notify("READY=1")
    in_background(feed_watchdog, server)
    files = Files(server.api.workers)       # apart: a hung /etc/pve must not keep a key in force
    # A pct that an earlier daemon had begun may take its snapshot only now: look once more later.
    told, again = set(), time.monotonic() + LOCK_SECONDS
    in_background(warn_of_temporary_snapshots, server.api, told)
    number = signals.wait(again)
    while number in (None, signal.SIGHUP):
        if number:
            reload(server, config_path, files)
        else:
            try:
                server.api.workers.start(warn_of_temporary_snapshots, server.api, told)
                again = None
            except Problem:                 # no thread is left
                again = time.monotonic() + LOCK_SECONDS
        number = signals.wait(again)
    notify("STOPPING=1")
    log.info("stopping on %s", signal_name(number))
    server.api.changes.refuse_waiting()
    server.stop_listening()
    if not server.wait_for_answers(STOP_SECONDS - 5):
        server.api.changes.leave_running()
        server.wait_for_answers(5)
    log.info("stopped")
    for each in (main_log, error_log, access_log):
        each.flush()


def exit_now():
    """End the process with status 0 now, once Python would begin to take itself apart.

    Threads may still be anywhere, in OpenSSL too, and would use what is being freed: with 500
    TLS handshakes just over, CPython 3.13 was once ended so by "double free or corruption".
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):       # None: it was closed at the start
        with suppress(OSError):
            stream.flush()
    os._exit(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", metavar="PATH", default=CONFIG_PATH,
                        help="configuration file (default: %(default)s)")
    parser.add_argument("--check-config", action="store_true",
                        help="check the configuration file and exit")
    parser.add_argument("--version", action="version", version=f"lxc_autoscale_api {VERSION}")
    arguments = parser.parse_args()
    try:
        config = read_settings(arguments.config)
    except ConfigError as error:
        complain(error.text)
        return error.code
    if arguments.check_config:
        print(f"{arguments.config}: ok", *list_keys(config), sep="\n")
        return 0
    point_logs(config)
    warn_of_certificate(config)
    signals = Signals()
    try:
        server = build(config)
    except OSError as error:
        complain(f"cannot listen on {config.server.host} port {config.server.port}: "
                 f"{error.strerror}")
        return 1
    serve(server, signals, arguments.config)
    atexit.register(exit_now)
    return 0


if __name__ == "__main__":
    sys.exit(main())
