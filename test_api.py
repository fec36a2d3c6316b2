"""The tests of lxc_autoscale_api, and a simulated Proxmox host to run it on.

    pytest test_api.py                  # needs pytest, and nothing of Proxmox
    python3 test_api.py --demo
                        # the daemon on 127.0.0.1:5000 (or --demo PORT) with a simulated host;
                        # needs only Python
"""
import ast
import contextlib
import functools
import hashlib
import json
import os
import py_compile
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE = HERE / "lxc_autoscale_api.py"

# A simulated `pct` and `pvesh`. Its texts, exit codes, locks and task workers are those
# of the real ones; faults.json beside its folders asks for delays and failures.
FAKE = r'''
# with re and json it would start in twice the time
import _signal as signal, fcntl, os, sys, termios, time


def read_json(path):
    """What a file of a test's own says in JSON, which is Python but for three names."""
    with open(path) as file:
        return eval(file.read(), {"true": True, "false": False, "null": None})


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(sys.argv[0])))
MEMBERS = read_json(ROOT + "/pve/.members")
NODE = MEMBERS["nodename"]
CONF = ROOT + "/pve/nodes/" + NODE + "/lxc/%s.conf"
ARGV = [os.path.basename(sys.argv[0])] + sys.argv[1:]


def note(**row):
    with open(ROOT + "/calls.jsonl", "a") as file:
        file.write(repr(dict(row, argv=ARGV, pid=os.getpid(), at=time.time())) + "\n")


class Refused(Exception):
    def __init__(self, text, code=255):
        self.text, self.code = text, code


def refuse_parameter(name, text, usage):
    raise Refused("400 Parameter verification failed.\n%s: %s\n\npct %s [OPTIONS]" % (
        name, text, usage), 2)


# Configuration files: key: value lines, '#' lines, [pve:pending], a section for each snapshot

def load(vm_id, code=2):
    try:
        # of one that hung, there is more
        text = open(CONF % vm_id).read() or open(CONF % vm_id).read()
    except OSError:
        raise Refused("Configuration file 'nodes/%s/lxc/%s.conf' does not exist" % (
            NODE, vm_id), code)
    conf = section = {}
    sections = {}
    for line in text.split("\n"):
        if line.startswith("[") and line.endswith("]"):
            section = sections.setdefault(line[1:-1], {})
        elif line.startswith("#"):
            section["#"] = section.get("#", "") + line + "\n"
        elif ": " in line:
            key, _, value = line.partition(": ")
            section[key] = value
    return conf, sections


def save(vm_id, conf, sections):
    if not MEMBERS.get("cluster", {}).get("quorate", 1):
        raise Refused("cluster not ready - no quorum?")

    def lines(values):
        return values.get("#", "") + "".join(
            "%s: %s\n" % (k, values[k]) for k in sorted(values) if k != "#")
    text = lines(conf) + "".join(
        "\n[%s]\n%s" % (name, lines(values)) for name, values in sections.items())
    with open(CONF % vm_id + ".tmp.%d" % os.getpid(), "w") as file:
        file.write(text)
    os.rename(file.name, CONF % vm_id)
    update_vmlist()


def update_vmlist():
    path = os.path.realpath(ROOT + "/pve/.vmlist")
    with open(path + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_json(path)
        ids = {k: v for k, v in known.get("ids", {}).items()
               if v["type"] != "lxc" or v["node"] != NODE}
        for name in os.listdir(os.path.dirname(CONF)):
            if name.endswith(".conf"):
                ids[name[:-5]] = {"node": NODE, "type": "lxc", "version": 1}
        with open(path + ".tmp.%d" % os.getpid(), "w") as file:
            file.write(repr({"version": known["version"] + 1, **({"ids": ids} if ids else {})})
                       .replace("'", '"'))
        os.rename(file.name, path)


class config_lock:
    """The flock that every change takes, waited for 10 s (or what faults.json says)."""

    def __init__(self, vm_id):
        self.path = ROOT + "/locks/pve-config-%s.lock" % vm_id

    def __enter__(self):
        self.file = open(self.path, "w")
        end = time.monotonic() + FAULTS.get("lock_wait", 10)
        while True:
            try:
                return fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > end:
                    raise Refused("can't lock file '/run/lock/lxc/pve-config-%s.lock' - got timeout"
                                  % self.path.rpartition("-")[2][:-5])
                time.sleep(0.005)

    def __exit__(self, *_):
        self.file.close()


def check_lock(conf):
    if "lock" in conf:
        raise Refused("CT is locked (%s)" % conf["lock"])


class lock_mark:
    """`lock: reason` in the configuration for the time of a long task;
    of some tasks it stays if they fail, and of a clone if somebody else keeps its source."""

    def __init__(self, vm_id, reason):
        self.vm_id, self.reason = vm_id, reason
        self.stays = reason in ("snapshot-delete", "rollback")

    def __enter__(self):
        with config_lock(self.vm_id):
            conf, sections = load(self.vm_id, 255)
            check_lock(conf)
            conf["lock"] = self.reason
            save(self.vm_id, conf, sections)

    def __exit__(self, failure, *_):
        if failure and self.stays:
            return
        if FAULTS.get(ARGV[1], {}).get("keeps_lock"):
            say("can't lock file '/run/lock/lxc/pve-config-%s.lock' - got timeout" % self.vm_id)
            return
        with config_lock(self.vm_id):
            conf, sections = load(self.vm_id, 255)
            conf.pop("lock", None)
            save(self.vm_id, conf, sections)


def running(vm_id):
    folder = ROOT + "/cgroup/lxc/%s" % vm_id
    try:
        with open(folder + "/pids.current") as file:
            return file.read() != "0\n"
    except OSError:
        return os.path.isdir(folder)


def remove_cgroup(vm_id):
    os.rename(ROOT + "/cgroup/lxc/%s" % vm_id, ROOT + "/trash/%s.%d" % (vm_id, time.time_ns()))


def start(vm_id):
    conf, _ = load(vm_id)
    check_lock(conf)
    if conf.get("template"):
        raise Refused("you can't start a CT if it's a template")
    if running(vm_id):
        raise Refused("CT %s already running" % vm_id)
    folder = ROOT + "/cgroup/lxc/%s" % vm_id
    os.makedirs(folder + ".new/ns/init.scope")
    for name, text in read_json(ROOT + "/cgroup.json").items():
        with open(folder + ".new/" + name, "w") as file:
            file.write(text)
    if os.path.isdir(folder):
        remove_cgroup(vm_id)
    os.rename(folder + ".new", folder)


def stop(vm_id):
    if not running(vm_id):
        raise Refused("CT %s not running" % vm_id)
    if FAULTS.get(ARGV[1], {}).get("leaves_cgroup"):
        with open(ROOT + "/cgroup/lxc/%s/pids.current" % vm_id, "w") as file:
            file.write("0\n")
    else:
        remove_cgroup(vm_id)


UNITS = {"M": 1 / 1024, "G": 1, "T": 1024}


def gigabytes(rootfs):
    size = rootfs.partition("size=")[2].partition(",")[0]
    return int(size[:-1]) * UNITS[size[-1]]


def task(work, code_of_failure=255):
    """Run work() in a worker with its own session, copy its output, pass signals on,
    as a PVE task does."""
    def run(write_end):
        os.setsid()
        os.dup2(write_end, 1)
        try:
            work()
            sys.stdout.flush()
            os._exit(1 if FAULTS.get(ARGV[1], {}).get("dies_after") else 0)
        except Refused as refused:
            sys.stdout.flush()
            sys.stderr.write(refused.text + "\n")
            sys.stderr.flush()
            os._exit(1)
    read_end, write_end = os.pipe()
    worker = os.fork()
    if not worker:
        os.close(read_end)
        run(write_end)
    os.close(write_end)

    def end(*_):
        try:
            os.killpg(worker, signal.SIGKILL)
        except OSError:
            pass
        sys.stderr.write("broken pipe\n")
        os._exit(255)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, end)
    while True:
        data = os.read(read_end, 65536)
        if not data:
            break
        try:
            os.write(1, data)
        except OSError:
            end()
    status = os.waitpid(worker, 0)[1]
    if os.WIFSIGNALED(status):
        sys.stderr.write("got unexpected control message:  \n")
    return code_of_failure if status else 0


def say(*lines):
    print(*lines, sep="\n", flush=True)


def pause(seconds):
    """For so long; True: until there is a file `go`."""
    end = time.monotonic() + (60 if seconds is True else seconds)
    while time.monotonic() < end and not (seconds is True and os.path.exists(ROOT + "/go")):
        time.sleep(min(0.01, max(0, end - time.monotonic())))


def die_if(moment):
    """End the task as the kernel does for want of memory, if a fault asks for that now."""
    if FAULTS.get(ARGV[1], {}).get("kills_task") == moment:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def dawdle():
    """The command's work takes this long; in the middle of it a fault may strike."""
    die_if("early")
    fault = FAULTS.get(ARGV[1], {})
    pause(fault.get("delay", 0))
    if "work_fails" in fault:
        raise Refused(fault["work_fails"])
    if "kills_pct" in fault:
        sys.stdout.flush()
        # until pct has taken what was said
        while any(fcntl.ioctl(1, termios.FIONREAD, bytes(4))):
            time.sleep(0.001)
        time.sleep(0.02)
        os.kill(PCT, signal.SIGKILL)
        os._exit(1)


def options_of(words):
    """[104, --cores, 4] -> ([104], {cores: 4}); an argument that starts with - is an option
    wherever it stands."""
    places, options, words = [], {}, list(words)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            options[name] = value if equals else words.pop(0) if words else ""
        else:
            places.append(word)
    return places, options


# Commands

def pct_list():
    ids = sorted(int(name[:-5]) for name in os.listdir(os.path.dirname(CONF))
                 if name.endswith(".conf"))
    if ids:
        print("%-10s %-10s %-12s %-20s" % ("VMID", "Status", "Lock", "Name"))
    for vm_id in ids:
        conf, _ = load(vm_id)
        print("%-10s %-10s %-12s %-20s" % (vm_id, "running" if running(vm_id) else "stopped",
                                           conf.get("lock", ""), conf.get("hostname", "")))


def pct_status(vm_id, verbose=None):
    conf, _ = load(vm_id)
    up = running(vm_id)
    if verbose is None:
        return print("status: " + ("running" if up else "stopped"))
    values = {"cpus": conf.get("cores", os.cpu_count()), "disk": 0, "diskread": 0, "diskwrite": 0,
              "maxdisk": int(gigabytes(conf["rootfs"]) * 2**30),
              "maxmem": int(conf.get("memory", 512)) * 2**20,
              "maxswap": int(conf.get("swap", 512)) * 2**20,
              "mem": 0, "name": conf.get("hostname", "CT" + vm_id), "netin": 0, "netout": 0,
              "status": "running" if up else "stopped", "swap": 0, "type": "lxc", "uptime": 0,
              "vmid": vm_id}
    values.update({key: conf[key] for key in ("lock", "tags", "template") if key in conf})
    if up:
        values.update(pressurecpufull="1.93", pressurecpusome="2.38",
                      pressureiofull="0.00", pressureiosome="0.63",
                      pressurememoryfull="0.00", pressurememorysome="0.00")
        values.update(disk=1288490189, diskread=1048576, diskwrite=2097152, mem=524288000,
                      netin=12345, netout=67890, pid=4321,
                      uptime=int(time.time() - os.stat(
                          ROOT + "/cgroup/lxc/" + vm_id).st_ctime) + 3600)
        # time passes, and it computes
        with open(ROOT + "/cgroup/lxc/%s/cpu.stat" % vm_id, "r+") as file:
            used = int(file.readline().split()[1]) + 20000
            file.seek(0)
            file.write("usage_usec %d\nuser_usec 4000000\nsystem_usec 1000000\n" % used)
    for key in sorted(values):
        print("%s: %s" % (key, values[key]))


def pct_config(vm_id):
    conf, sections = load(vm_id)
    pending = sections.get("pve:pending", {})
    for key in pending.get("delete", "").replace(";", ",").replace(" ", ",").split(","):
        conf.pop(key, None)
    conf.update({key: value for key, value in pending.items() if key != "delete"})
    if "#" in conf:
        conf["description"] = conf.pop("#").replace("#", "").replace("\n", "%0A")
    for key in sorted(conf):
        print("%s: %s" % (key, conf[key]))


def is_dns_name(text):
    return len(text) <= 255 and text.isascii() and all(
        each.replace("-", "").isalnum() and each == each.strip("-") for each in text.split("."))


def check_hostname(options, usage):
    if "hostname" in options and not is_dns_name(options["hostname"]):
        refuse_parameter("hostname", "invalid format - value does not look like a valid DNS name\n",
                         usage)


def pct_set(vm_id, **options):
    for name, low, high in (("cores", 1, 8192), ("memory", 16, None)):
        if name in options and int(options[name]) < low:
            refuse_parameter(name, "value must have a minimum value of %d" % low, "set <vmid>")
        if name in options and high and int(options[name]) > high:
            refuse_parameter(name, "value must have a maximum value of %d" % high, "set <vmid>")
    check_hostname(options, "set <vmid>")
    with config_lock(vm_id):
        conf, sections = load(vm_id)
        check_lock(conf)
        dawdle()
        conf.update(options)
        save(vm_id, conf, sections)


def pct_resize(vm_id, disk, size):
    conf, _ = load(vm_id)
    check_lock(conf)
    more, wanted = size.startswith("+"), int(size[:-1].lstrip("+")) * UNITS[size[-1]]
    if not more and wanted < gigabytes(conf[disk]):
        raise Refused("unable to shrink disk size")

    def work():
        with config_lock(vm_id):
            conf, sections = load(vm_id)
            dawdle()
            total = int(gigabytes(conf[disk]) * more + wanted)
            if total < gigabytes(conf[disk]):
                raise Refused("unable to shrink disk size")
            if total == gigabytes(conf[disk]):
                raise Refused("disk is already at specified size")
            if total >= 16 * 2**20 * 1024:
                say("  Size is too big (>=16EiB).")
                raise Refused("error resizing volume '/dev/pve/vm-%s-disk-0':   "
                              "Error during parsing of command line." % vm_id)
            say("  Size of logical volume pve/vm-%s-disk-0 changed to %d.00 GiB." % (vm_id, total),
                "  WARNING: You have not turned on protection against thin pools "
                "running out of space.",
                "  Logical volume pve/vm-%s-disk-0 successfully resized." % vm_id)
            volume, _, size = conf[disk].partition("size=")
            conf[disk] = "%ssize=%dG%s" % (volume, total, size.lstrip("0123456789MGT"))
            save(vm_id, conf, sections)
            note(event="grew", of=PCT)
            die_if("late")
            if total > 16384:
                say("resize2fs: New size results in too many block group descriptors.", "",
                    "Failed to update the container's filesystem: command "
                    "'resize2fs /dev/pve/vm-%s-disk-0' failed: exit code 1" % vm_id)
    return task(work, code_of_failure=0)            # its command definition has no exit handler


def check_snapshot_name(name, usage):
    if not (name.isascii() and name[:1].isalpha() and name[1:]
            and name.replace("-", "_").isidentifier()):
        refuse_parameter("snapname", "invalid format - invalid configuration ID '%s'\n" % name,
                         usage)
    if len(name) > 40:
        refuse_parameter("snapname", "value may only be 40 characters long", usage)
    if name in ("current", "vzdump"):
        raise Refused("unable to use snapshot name '%s' (reserved name)" % name, 2)


def pct_snapshot(vm_id, name, description=None):
    check_snapshot_name(name, "snapshot <vmid> <snapname>")

    def work():
        conf, sections = load(vm_id, 255)
        if conf.get("template"):
            raise Refused("you can't take a snapshot if it's a template")
        if name in sections:
            raise Refused("snapshot name '%s' already used" % name)
        if not conf["rootfs"].startswith("local-lvm:"):
            raise Refused("snapshot feature is not available")
        with lock_mark(vm_id, "snapshot"):
            taken = {k: v for k, v in conf.items() if k not in ("lock", "#")}
            taken.update(snaptime=str(int(time.time())), snapstate="prepare")
            if description:
                taken["#"] = "".join("#%s\n" % line.replace(":", "%3A")
                                     for line in description.split("\n"))
            with config_lock(vm_id):
                conf, sections = load(vm_id)
                save(vm_id, conf, dict(sections, **{name: taken}))
            try:
                dawdle()
            except Refused:
                say("snapshot create failed: starting cleanup")
                with config_lock(vm_id):
                    save(vm_id, conf, sections)
                raise
            say('  Logical volume "snap_vm-%s-disk-0_%s" created.' % (vm_id, name))
            with config_lock(vm_id):
                conf, sections = load(vm_id)
                sections[name].pop("snapstate")
                conf["parent"] = name
                save(vm_id, conf, sections)
    return task(work)


def pct_listsnapshot(vm_id):
    conf, sections = load(vm_id)
    rows = [(int(v["snaptime"]), name, v) for name, v in sections.items() if "snaptime" in v]
    nodes = sorted(rows) + [(1 << 62, "current", conf)]
    names = [row[1] for row in nodes]

    def show(parent, indent):
        for taken, name, values in nodes:
            if (values.get("parent") if values.get("parent") in names else None) != parent:
                continue
            head = " " * indent + "`->"
            text = "You are here!" if name == "current" else \
                values.get("#", "#no-description\n").split("\n")[0][1:].replace("%3A", ":")
            when = "" if name == "current" else time.strftime(
                "%Y-%m-%d %H:%M:%S", time.localtime(taken))
            print("%s %-*s %-23s %s" % (head, 30 - len(head), name, when, text))
            if name != "current":
                show(name, indent + 1)
    show(None, 0)


def pct_delsnapshot(vm_id, name, force="0"):
    def work():
        conf, sections = load(vm_id, 255)
        if name not in sections:
            raise Refused("snapshot '%s' does not exist" % name)
        with lock_mark(vm_id, "snapshot-delete"):
            with config_lock(vm_id):
                conf, sections = load(vm_id)
                if conf.get("template"):
                    raise Refused("you can't delete a snapshot if vm is a template")
                sections[name]["snapstate"] = "delete"
                save(vm_id, conf, sections)
            try:
                dawdle()
            except Refused:
                if force != "1":            # what the storage says counts without it only
                    raise
            with config_lock(vm_id):
                conf, sections = load(vm_id)
                gone = sections.pop(name)
                for values in [conf, *sections.values()]:
                    if values.get("parent") == name:
                        values.pop("parent")
                        if "parent" in gone:
                            values["parent"] = gone["parent"]
                save(vm_id, conf, sections)
    return task(work)


def pct_rollback(vm_id, name, start="0"):
    def work():
        conf, sections = load(vm_id, 255)
        if name not in sections:
            raise Refused("snapshot '%s' does not exist" % name)
        if "snapstate" in sections[name]:
            raise Refused("unable to rollback to incomplete snapshot (snapstate = %s)"
                          % sections[name]["snapstate"])
        check_lock(conf)
        if running(vm_id):
            stop(vm_id)
        with lock_mark(vm_id, "rollback"):
            dawdle()
            say('  Logical volume "vm-%s-disk-0" successfully removed.' % vm_id)
            with config_lock(vm_id):
                conf, sections = load(vm_id)
                back = {k: v for k, v in sections[name].items()
                        if k not in ("snaptime", "parent", "#")}
                save(vm_id, dict(back, parent=name, lock="rollback"), sections)
        # a task of its own, whose end this one does not pass on
        if start == "1" and FAULTS.get("rollback", {}).get("start_fails"):
            say("startup for container '%s' failed" % vm_id)
        elif start == "1":
            globals()["start"](vm_id)
    return task(work)


def pct_clone(vm_id, new_id, hostname=None, snapname=None, full=None, storage=None):
    check_hostname({"hostname": hostname} if hostname else {}, "clone <vmid> <newid>")

    def work():
        conf, sections = load(vm_id, 255)
        check_lock(conf)
        taken = read_json(ROOT + "/pve/.vmlist").get("ids", {}).get(new_id)
        if taken:
            raise Refused("unable to create CT %s - %s %s already exists on node '%s'" % (
                new_id, "VM" if taken["type"] == "qemu" else "CT", new_id, taken["node"]))
        if snapname and snapname not in sections:
            raise Refused("snapshot '%s' does not exist" % snapname)
        if storage and conf.get("template") and full != "1":
            raise Refused("parameter 'storage' not allowed for linked clones", 2)
        if running(vm_id) and not snapname:
            raise Refused("Full clone of a running container is only possible from a snapshot")
        with lock_mark(vm_id, "disk"):
            new = {k: v for k, v in conf.items()
                   if not k.startswith(("rootfs", "mp", "parent", "lock", "template"))}
            for key in [key for key in new if key.startswith("net")]:
                before, _, after = new[key].partition("hwaddr=")
                if after:
                    new[key] = "%shwaddr=BC:24:11:%02X:00:%02X%s" % (
                        before, int(new_id) % 256, int(key[3:]), after[17:])
            new.update(lock="create", hostname=hostname or "CT" + new_id)
            save(new_id, new, {})
            say("creating a clone of container %s with ID %s" % (vm_id, new_id),
                "create full clone of mountpoint rootfs (local-lvm:vm-%s-disk-0)" % vm_id)
            try:
                dawdle()
            except Refused as refused:
                os.remove(CONF % new_id)
                update_vmlist()
                raise Refused("clone failed: " + refused.text)
            new.pop("lock")
            for key in [key for key in conf if key.startswith(("rootfs", "mp"))]:
                own, _, volume = conf[key].replace(vm_id, new_id).partition(":")
                new[key] = (storage or own) + ":" + volume
            save(new_id, new, {})
    return task(work)


def pct_destroy(vm_id, force="0", purge="0"):
    conf, _ = load(vm_id)
    check_lock(conf)
    if conf.get("protection") == "1":
        raise Refused("can't remove CT %s - protection mode enabled" % vm_id)
    if running(vm_id) and force != "1":
        raise Refused("unable to destroy CT %s - container is running" % vm_id)

    def work():
        if running(vm_id):
            say("forced to stop CT %s before destroying!" % vm_id)
            stop(vm_id)
        dawdle()                    # the lock `destroyed` comes when all volumes have gone
        say('  Logical volume "vm-%s-disk-0" successfully removed.' % vm_id)
        os.remove(CONF % vm_id)
        update_vmlist()
    return task(work)


def pct_start(vm_id):
    load(vm_id)
    return task(lambda: (dawdle(), start(vm_id)))


def pct_stop(vm_id):
    load(vm_id)
    return task(lambda: (check_lock(load(vm_id)[0]), dawdle(), stop(vm_id)))


def pct_shutdown(vm_id, timeout="60", forceStop="0"):
    load(vm_id)
    return task(lambda: (running(vm_id) and dawdle(), stop(vm_id)))


def pct_reboot(vm_id, timeout="60"):
    load(vm_id)
    if not running(vm_id):
        raise Refused("VM %s not running" % vm_id)
    return task(lambda: (dawdle(), stop(vm_id), start(vm_id)))


def pct_unlock(vm_id):
    conf, sections = load(vm_id)
    conf.pop("lock", None)
    save(vm_id, conf, sections)


def pvesh_get(path, **_):
    parts = path.split("/")
    if parts[1] == "nodes" and parts[2] != NODE:
        raise Refused("hostname lookup '%s' failed - failed to get address info for: "
                      "%s: Name or service not known" % (parts[2], parts[2]), 2)
    if path == "/cluster/status":
        print(open(ROOT + "/cluster.json").read())
    elif path.endswith("/status"):
        print(repr({
            "cpu": 0, "cpuinfo": {"cpus": 8, "cores": 4, "sockets": 1},
            "loadavg": ["0.21", "0.35", "0.40"],
            "memory": {"total": 33554432000, "used": 8388608000,
                       "free": 25165824000, "available": 25165824000},
            "swap": {"total": 8589934592, "used": 0, "free": 8589934592}, "wait": 0, "idle": 0,
            "rootfs": {"total": 107374182400, "used": 21474836480,
                       "free": 85899345920, "avail": 85899345920},
            "uptime": 864000, "pveversion": "pve-manager/8.3.0/c1689ccb1065a83b",
            "kversion": "Linux 6.8.12-4-pve"}).replace("'", '"'))


def strike(fault):
    """Misbehave as asked, before any work is done."""
    if "grandchild" in fault and not os.fork():
        time.sleep(fault["grandchild"])
        os._exit(0)
    pause(fault.get("pause", 0))
    if "spew" in fault:
        block = b"x" * 65536
        for _ in range(fault["spew"] // len(block)):
            os.write(1, block)
    sys.stdout.write(fault.get("stdout", ""))
    sys.stdout.flush()
    os.write(1, bytes.fromhex(fault.get("bytes", "")))
    sys.stderr.write(fault.get("stderr", ""))
    sys.stderr.flush()
    if "signal" in fault:
        os.kill(os.getpid(), fault["signal"])
    if "exit" in fault:
        return fault["exit"]


def main():
    places, options = options_of(sys.argv[2:])
    options.pop("output-format", None)
    if "verbose" in options:
        options["verbose"] = True
    code = strike(FAULTS.get(ARGV[1], {}))
    if code is not None:
        return code
    try:
        return globals()[ARGV[0] + "_" + ARGV[1]](*places, **options) or 0
    except Refused as refused:
        sys.stdout.flush()
        sys.stderr.write(refused.text + "\n")
        return refused.code


try:
    FAULTS = read_json(ROOT + "/faults.json")
except OSError:
    FAULTS = {}
PCT = os.getpid()
note(event="start", group=os.getpgrp(), session=os.getsid(0))
CODE = main()
sys.stdout.flush()
HIDES = CONF % FAULTS.get(ARGV[1], {}).get("hides")
if os.path.exists(HIDES) and not CODE:          # a file that nobody can read any more
    open(ROOT + "/hidden.soon", "w").close()
    os.link(HIDES, HIDES + ".hidden")           # so that there is no moment without a file
    os.mkfifo(HIDES + ".new")
    os.rename(HIDES + ".new", HIDES)
note(event="end", code=CODE)
os._exit(CODE)
'''


@functools.lru_cache(maxsize=None)
def fake_bytecode():
    """FAKE as a .pyc file's bytes: a simulated command starts some hundred times."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "simulated.py"
        source.write_text(FAKE)
        return Path(py_compile.compile(str(source), cfile=f"{folder}/simulated.pyc",
                                       doraise=True)).read_bytes()


@functools.lru_cache(maxsize=None)
def daemons_bytecode():
    """A folder with the module, compiled once for all daemons that import it; it goes with this
    process."""
    folder = tempfile.TemporaryDirectory()
    py_compile.compile(str(MODULE), cfile=f"{folder.name}/{MODULE.stem}.pyc", doraise=True)
    return folder


# What pvesh_get, above, tells of a node, as /proc and pve-manager have it.
PROC_FILES = {
    "stat": "cpu  800 0 200 9000 0 0 0 0 0 0\n"
            + "".join(f"cpu{n} 100 0 25 1125 0 0 0 0 0 0\n" for n in range(8)) + "intr 1 2\n",
    "loadavg": "0.21 0.35 0.40 2/136 2904\n",
    "meminfo": "MemTotal:       32768000 kB\nMemFree:        20000000 kB\n"
               "MemAvailable:   24576000 kB\nBuffers:          100000 kB\n"
               "Cached:          5000000 kB\nSwapTotal:       8388608 kB\n"
               "SwapFree:        8388608 kB\nHugePages_Total:       0\n",
    "uptime": "864000.57 6912000.00\n",
    "pvecfg.pm": "package PVE::pvecfg;\n\nsub package {\n    return 'pve-manager';\n}\n\n"
                 "sub version {\n    return '8.3.0';\n}\n\n"
                 "sub version_text {\n    return '8.3.0/c1689ccb1065a83b';\n}\n",
}


# What is in the control group of a container that runs.
CGROUP_FILES = {
    "cpu.stat": "usage_usec 5000000\nuser_usec 4000000\nsystem_usec 1000000\n",
    "cpu.max": "max 100000\n", "memory.current": "734003200\n",
    "memory.stat": "anon 524288000\nfile 209715200\nshmem 52428800\n",
    "cpu.pressure": "some avg10=2.38 avg60=1.64 avg300=0.43 total=1250000\n"
                    "full avg10=1.93 avg60=1 avg300=0 total=7\n",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
                       "full avg10=0.00 avg60=0 avg300=0 total=0\n",
    "io.pressure": "some avg10=0.63 avg60=0.31 avg300=0.07 total=2500000\n"
                   "full avg10=0.00 avg60=0 avg300=0 total=0\n",
    "memory.swap.current": "0\n", "memory.max": "2147483648\n", "pids.current": "42\n",
    "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
    "io.stat": "253:1 rbytes=1048576 wbytes=2097152 rios=10 wios=20 dbytes=0 dios=0\n",
    "ns/init.scope/cgroup.procs": "",
}


class Code(str):
    """What stands in a patch as it is, and not as a string."""
    __repr__ = str.__str__


class Host:
    """A folder that a simulated Proxmox host lives in; hosts of one cluster have `shared`
    in common."""

    def __init__(self, root, name="proxmox", shared=None):
        self.root, self.name, shared = Path(root), name, shared or Path(root) / "shared"
        for folder in ("bin", "lib", "locks", "trash", "cgroup/lxc", "pve"):
            (self.root / folder).mkdir(parents=True)
        (shared / "nodes" / name / "lxc").mkdir(parents=True)
        self.pve, self.cgroup, self.shared = self.root / "pve", self.root / "cgroup", shared
        (self.pve / "lxc").symlink_to(f"nodes/{name}/lxc")
        for each in ("nodes", ".vmlist", ".rrd"):
            (self.pve / each).symlink_to(shared / each)
        (self.pve / ".members").write_text(f'{{\n"nodename": "{name}",\n"version": 0\n}}\n')
        if not (shared / ".vmlist").exists():
            (shared / ".vmlist").write_text('{\n"version": 1\n\n}\n')     # while it has none
        self.proc = self.root / "proc"
        self.proc.mkdir()
        for file, text in PROC_FILES.items():
            (self.proc / file).write_text(text)
        self.write("cluster.json", [{"id": "node/" + name, "ip": "192.0.2.10", "level": "",
                                     "local": 1, "name": name, "nodeid": 0,
                                     "online": 1, "type": "node"}])
        self.write("cgroup.json", CGROUP_FILES)
        for name in ("pct", "pvesh"):
            script = self.root / "bin" / name
            script.write_text(f"#!{os.path.realpath(sys.executable)} -IS\nimport sys\n"
                              f"sys.path.insert(0, {str(self.root / 'lib')!r})\n"
                              "import simulated\n")
            script.chmod(0o755)
        (self.root / "lib/simulated.pyc").write_bytes(fake_bytecode())

    def write(self, name, value, folder=None):
        scratch = (folder or self.root) / (name + ".new")
        scratch.write_text(json.dumps(value))
        scratch.rename((folder or self.root) / name)

    def as_node(self):
        """The constants with which the daemon sees a node of this host's own,
        in place of the machine that it runs on."""
        return {"PROC": str(self.proc), "PVECFG": str(self.proc / "pvecfg.pm"),
                "os.statvfs": Code("lambda path: daemon.SimpleNamespace("
                                   "f_frsize=4096, f_blocks=26214400, f_bfree=20971520)")}

    def faults(self, **faults):
        """Ask for faults by command, such as clone={"delay": 1}, or True to wait for go();
        the ones asked for before are gone."""
        (self.root / "go").unlink(missing_ok=True)
        self.write("faults.json", faults)

    def go(self):
        """Let commands with the fault {"delay": True} or {"pause": True} go on."""
        (self.root / "go").touch()

    def path(self, vm_id):
        return self.pve / "lxc" / f"{vm_id}.conf"

    def add(self, vm_id, hostname=None, running=False, **values):
        values = {"arch": "amd64", "cores": 2, "hostname": hostname or f"ct{vm_id}",
                  "memory": 2048, "ostype": "debian",
                  "rootfs": f"local-lvm:vm-{vm_id}-disk-0,size=8G", "swap": 512,
                  "unprivileged": 1, **values}
        self.path(vm_id).write_text("".join(
            f"{key}: {values[key]}\n" for key in sorted(values) if values[key] is not None))
        self.list(vm_id)
        if running:
            self.start(vm_id)
        (self.root / "calls.jsonl").unlink(missing_ok=True)

    def start(self, vm_id):
        """Let a container run as after `pct start`, which would have to start a Python."""
        folder = self.cgroup / "lxc" / f"{vm_id}.new"
        (folder / "ns/init.scope").mkdir(parents=True)
        for name, text in CGROUP_FILES.items():
            (folder / name).write_text(text)
        folder.rename(folder.with_suffix(""))

    def list(self, vm_id, kind="lxc"):
        """Say in .vmlist that an id is on this host."""
        known = json.loads((self.shared / ".vmlist").read_text())
        known.setdefault("ids", {})[str(vm_id)] = {"node": self.name, "type": kind, "version": 1}
        self.write(".vmlist", known, self.shared)

    def conf(self, vm_id):
        return dict(line.split(": ", 1)
                    for line in self.path(vm_id).read_text().split("\n\n")[0].splitlines()
                    if ": " in line)

    def snapshots(self, vm_id):
        return [line[1:-1] for line in self.path(vm_id).read_text().splitlines()
                if line.startswith("[")]

    def running(self, vm_id):
        folder = self.cgroup / "lxc" / str(vm_id)
        with contextlib.suppress(OSError):
            return (folder / "pids.current").read_text() != "0\n"
        return folder.is_dir()

    def rows(self, event="start"):
        path = self.root / "calls.jsonl"
        rows = ([ast.literal_eval(line) for line in path.read_text().splitlines()]
                if path.exists() else [])
        return [row for row in rows if row["event"] == event]

    def ended(self, command):
        return [row for row in self.rows("end") if row["argv"][1] == command]

    def calls(self, event="start"):
        """The command lines that were run, in order."""
        return [" ".join(row["argv"]) for row in self.rows(event)]


def config_text(host, port, key, **sections):
    """A configuration as YAML; `sections` add to or replace what the tests need,
    None leaves a setting out."""
    settings = {
        "server": {"host": "127.0.0.1", "port": port},
        "authentication": {"api_key": key},
        "logging": {name: f"{host.root}/{path}" for name, path in (
            ("log_file", "main.log"), ("access_log", "access.log"), ("error_log", "error.log"))},
        "proxmox": {"pve_dir": str(host.pve), "cgroup_dir": str(host.cgroup)},
    }
    for section, values in sections.items():
        settings.setdefault(section, {}).update(values)
    return "".join(
        f"{section}:\n" + "".join(f"  {key}: {json.dumps(value)}\n"
                                  for key, value in values.items() if value is not None)
        for section, values in settings.items())


def environment(host, **values):
    """This process' environment, with the simulated commands on its PATH."""
    return {**os.environ, "PATH": f"{host.root}/bin:{os.environ['PATH']}", **values}


def importing(constants):
    """What Python runs to import the module as `daemon`, and to put constants in place
    of its own."""
    patches = "".join(f"daemon.{name} = {value!r}\n" for name, value in constants.items())
    return (f"import sys\nsys.path.insert(0, {daemons_bytecode().name!r})\n"
            f"import lxc_autoscale_api as daemon\n{patches}")


def start_daemon(host, config, constants=None, inside=(), env=None, **popen):
    """Start the daemon with the simulated commands on its PATH: as the script that it is,
    or with `constants` in place of its own, imported, which spares compiling it each time.
    `inside` is a command that starts others in some namespace."""
    path = host.root / "api.yaml"
    path.write_text(config)
    env = environment(host, **env or {})
    command = [str(MODULE)]
    if constants is not None:
        command = ["-c", importing(constants) + "sys.exit(daemon.main())"]
    return subprocess.Popen([*inside, sys.executable, *command, "--config", str(path)],
                            env=env, **popen)


def one(vm_id):
    """Return the labels of a metric of one container."""
    return f'{{container_id="{vm_id}"}}'


def proxmox_of(host):
    """The daemon's view of a simulated host's files, without its commands."""
    return module.Proxmox(
        None, module.Files(module.Workers()), str(host.pve), str(host.cgroup), True)


TAKEN_PORTS, LANE = set(), [0]              # the first of every 16 ports is for the first process


def free_port():
    """A port that nothing listens on, below those that the kernel gives to outgoing connections.

    None is given twice: a daemon in a network of its own listens where this look does not see it,
    and another process may have looked at the same port a moment ago.
    """
    while True:
        port = 10000 + 16 * secrets.randbelow(1375) + LANE[0]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in TAKEN_PORTS:
                TAKEN_PORTS.add(port)
                return port


DEMO_CURL = """
curl -s {url}/health/check
curl -s -H "X-API-Key: $KEY" {url}/routes
curl -s -H "X-API-Key: $KEY" {url}/resource/vm/list
curl -s -H "X-API-Key: $KEY" "{url}/resource/vm/status?vm_id=104"
curl -s -H "X-API-Key: $KEY" "{url}/resource/vm/config?vm_id=104"
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 104, "cores": 4}}' {url}/scale/cores
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 104, "memory": 4096}}' {url}/scale/ram
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 104, "disk_size": 5}}' {url}/scale/storage/increase
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 104, "snapshot_name": "backup_20241224"}}' {url}/snapshot/create
curl -s -H "X-API-Key: $KEY" "{url}/snapshot/list?vm_id=104"
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 104, "snapshot_name": "backup_20241224"}}' {url}/snapshot/rollback
curl -s -X DELETE -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 104, "snapshot_name": "backup_20241224"}}' {url}/snapshot/delete
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 104, "new_vm_id": 105, "new_vm_name": "test_clone"}}' {url}/clone/create
curl -s -X DELETE -H "X-API-Key: $KEY" -H "Content-Type: application/json" \
-d '{{"vm_id": 105}}' {url}/clone/delete
curl -s -H "X-API-Key: $KEY" "{url}/resource/node/status?node_name=proxmox"
curl -s -H "X-API-Key: $KEY" {url}/resource/cluster/status
curl -s {url}/metrics
"""


def demo(port=5000):
    """Run the daemon on a simulated host until it is interrupted."""
    if answers(port):
        return f"Something listens on port {port} already; try: python3 test_api.py --demo 5001"
    for number in (signal.SIGINT, signal.SIGTERM):      # a background job ignores one
        signal.signal(number, signal.default_int_handler)
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lxc_autoscale_api_demo_") as root:
        host = Host(root)
        host.add(104, "web-01", running=True)
        host.add(106, "db-01", running=True, cores=4, memory=8192)
        host.add(107, "batch", cores=None)
        daemon = start_daemon(host, config_text(host, port, key), host.as_node())
        try:
            wait_until(lambda: daemon.poll() is not None or answers(port), 10)
            if daemon.poll() is not None:
                return daemon.returncode
            print("A simulated host with the containers 104, 106 (running) and 107 (stopped); "
                  f"its files: {root}\n"
                  f"Stop with Ctrl-C. To try it, in another terminal:\n\nKEY={key}"
                  + DEMO_CURL.format(url=f"http://127.0.0.1:{port}"), flush=True)
            return daemon.wait()
        except KeyboardInterrupt:
            print("stopping")
        finally:
            daemon.terminate()
            daemon.wait()
    return 0


def answers(port, connect=socket.create_connection):
    with contextlib.suppress(OSError), connect(("127.0.0.1", port), 1):
        return True
    return False


def wait_until(condition, seconds=10):
    """Wait for a condition -> its first true value; the test fails if it never comes.

    It is looked at less often while it does not come, for others need the processor."""
    end, pause = time.monotonic() + seconds, 0.002
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(pause)
        pause = min(1.3 * pause, 0.03)
    raise AssertionError(f"not within {seconds} s: {condition}")


if __name__ == "__main__":
    sys.exit(demo(*map(int, sys.argv[2:])) if sys.argv[1:2] == ["--demo"] else __doc__)

import atexit  # noqa: E402  (the simulated host above needs Python alone)
import concurrent.futures  # noqa: E402
import ctypes  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import gc  # noqa: E402
import http.client  # noqa: E402
import itertools  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import ssl  # noqa: E402
import threading  # noqa: E402
import urllib.parse  # noqa: E402
import weakref  # noqa: E402
from collections import Counter, namedtuple  # noqa: E402

import pytest  # noqa: E402

import lxc_autoscale_api as module  # noqa: E402

KEY = "test-key-0123456789abcdef"
ASKING = {"proxmox": {"cgroup_dir": "/nowhere"}}
# A certificate of the tests' own for localhost, 127.0.0.1 and ::1, until 2126, and its key.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBrTCCAVSgAwIBAgIUEHIINdYno0hE3Z8YJKg8VryEgJUwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNTAzMTI0M1oYDzIxMjYxMTAx
MDMxMjQzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAThDqzAl3LtsO4uFBZmZAjxQkS4tcCtuaWAphINBHvKoUCMZYDGdLUv
sGfZYPKyD/KX2q7vHRj04ubIE6XLTOxto4GBMH8wHQYDVR0OBBYEFFiZ9GXJ4bkZ
1BND4+m3PJHmZQttMB8GA1UdIwQYMBaAFFiZ9GXJ4bkZ1BND4+m3PJHmZQttMA8G
A1UdEwEB/wQFMAMBAf8wLAYDVR0RBCUwI4cEfwAAAYcQAAAAAAAAAAAAAAAAAAAA
AYIJbG9jYWxob3N0MAoGCCqGSM49BAMCA0cAMEQCIAdrrFDn7GnF3KSBwbc9l5D8
52yaRBQbZ6ggx5ZG1z0HAiB5zDj4NAiZ/T6kOSzQkcVmthv7AoUWHnTm5/pyeGGt
tQ==
-----END CERTIFICATE-----
"""
CERTIFICATES_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgPNdIEbxDXsgCBo0f
VSydMKfRIab7L9MS9ts9dwljdmahRANCAAThDqzAl3LtsO4uFBZmZAjxQkS4tcCt
uaWAphINBHvKoUCMZYDGdLUvsGfZYPKyD/KX2q7vHRj04ubIE6XLTOxt
-----END PRIVATE KEY-----
"""
# Another one for the same key, one that ended with 2020, another key,
# and the key with a passphrase.
RENEWED = """\
-----BEGIN CERTIFICATE-----
MIIBizCCATKgAwIBAgIUXLtghP4DLqo9Zlwd4o0N3GvV7ukwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHcmVuZXdlZDAgFw0yNjExMjUwMzE3NTJaGA8yMTI2MTEwMTAz
MTc1MlowEjEQMA4GA1UEAwwHcmVuZXdlZDBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABOEOrMCXcu2w7i4UFmZkCPFCRLi1wK25pYCmEg0Ee8qhQIxlgMZ0tS+wZ9lg
8rIP8pfaru8dGPTi5sgTpctM7G2jZDBiMB0GA1UdDgQWBBRYmfRlyeG5GdQTQ+Pp
tzyR5mULbTAfBgNVHSMEGDAWgBRYmfRlyeG5GdQTQ+PptzyR5mULbTAPBgNVHRMB
Af8EBTADAQH/MA8GA1UdEQQIMAaHBH8AAAEwCgYIKoZIzj0EAwIDRwAwRAIgR1bz
/bor/sDZLCBZGU1rxyd0mtAt6OTqQmdxxGygCDgCIEZyVH0N3iifuRSeqfbQnaHE
ijLCzsxysIvPCRZaChXO
-----END CERTIFICATE-----
"""
EXPIRED = """\
-----BEGIN CERTIFICATE-----
MIIBDzCBtgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwHhcN
MjAwMTAxMDAwMDAwWhcNMjEwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAThDqzAl3LtsO4uFBZmZAjxQkS4
tcCtuaWAphINBHvKoUCMZYDGdLUvsGfZYPKyD/KX2q7vHRj04ubIE6XLTOxtMAoG
CCqGSM49BAMCA0gAMEUCIHL/61XFBCyDqqcub/XWc7b500uYRTMIZSYU+rs5VnpL
AiEA+u1dP2pDaTE8ylq2M+1igb5tc/JecjkoMMxfiyfyP3w=
-----END CERTIFICATE-----
"""
OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgtyK4FDKImz+6n4BY
jBII9gHT4neTT8lDkhfXKilWR52hRANCAATkN9RGDbkDD9WGGXujxHEc0hXWe0hP
kmIqKNvJbv8d33Vnh7g1e3Pb/rVra5eseZtV0DeLkCwuqfeKqY2QoJfQ
-----END PRIVATE KEY-----
"""
LOCKED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgppKAz8uLDqgICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEGunWPqIrSKecFb8tMVcvwwEgZCH
uODlvHrLfMhIll/K9bBWBoHAg6ajQYQ2wbCEUqAkUzrQOG64id/5DA9SDWE6rZA6
kUhf7aWjgqXg5yLdu008UGIdm8HJQYuGM8ZyMNzOpNM4Hvvv17aH4/uy7HLc1Pua
BFG5tF39kk4dNF22ZyU9RYnFsQTXSNCRLgIrBNuP+111xOq2uAa63nRFMlQo+lI=
-----END ENCRYPTED PRIVATE KEY-----
"""
Reply = namedtuple("Reply", "status body headers")


# Run by a process that has imported the module, and that forks a daemon or looks whether one has
# ended whenever it is asked to over a socket. A daemon that is forked goes on after the loop, with
# nothing of what was there for the others.
FORKING = r'''
import gc, json, os, signal, socket

gc.freeze()                 # what is loaded is not looked through when a daemon ends
signal.signal(signal.SIGINT, signal.SIG_IGN)
channel = socket.socket(fileno=int(sys.argv[1]))
while True:
    request, fds, _, _ = socket.recv_fds(channel, 1 << 20, 3)
    if not request:
        sys.exit()
    asked = json.loads(request)
    if "ended" in asked:
        reply = os.waitpid(asked["ended"], os.WNOHANG)
    else:
        reply = os.fork(), 0
        if reply[0] == 0:
            break
        for fd in fds:
            os.close(fd)
    channel.send(json.dumps(reply).encode())

channel.close()
for number, fd in enumerate(fds):
    os.dup2(fd, number)
    os.close(fd)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.umask(asked["umask"])
os.chdir(asked["folder"])
os.environ.clear()
os.environ.update(asked["environment"])
sys.argv[1:] = ["--config", asked["config"]]
exec(asked["importing"])
sys.exit(daemon.main())
'''


@functools.lru_cache(maxsize=None)
def forking():
    """The socket of the process that forks daemons, which ends with this one, and a lock for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-c", importing({}) + FORKING, str(theirs.fileno())],
            pass_fds=[theirs.fileno()])
    return ours, threading.Lock()


class Forked:
    """A daemon that is forked from a process which has imported the module, so that no Python
    has to start; used as a Popen."""

    def __init__(self, host, config, constants, stderr):
        path = host.root / "api.yaml"
        path.write_text(config)
        umask = re.search(r"Umask:\s+(\d+)", Path("/proc/self/status").read_text())[1]
        self.returncode = None
        self.pid, _ = self.ask(
            [0, 1, stderr.fileno()], importing=importing(constants), config=str(path),
            environment=environment(host), folder=os.getcwd(), umask=int(umask, 8))

    def ask(self, fds=(), **what):
        channel, lock = forking()
        with lock:
            socket.send_fds(channel, [json.dumps(what).encode()], fds)
            return json.loads(channel.recv(1024))

    def poll(self):
        if self.returncode is None:
            pid, status = self.ask(ended=self.pid)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"daemon {self.pid}", timeout)
            time.sleep(0.002)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Daemon:
    """The daemon as a process on a free port, and a client for it.

    It is forked, unless it is to run in another namespace or with an environment of its own,
    which Python reads when it starts.
    """

    def __init__(self, host, constants=None, env=None, key=KEY, inside=(),
                 connect=socket.create_connection, tls=False, **sections):
        self.host, self.key, self.port, self.connection, self.tls = (
            host, key, free_port(), connect, None)
        if tls:
            sections["server"] = {**tls_files(host.root), **sections.get("server", {})}
            self.tls = ssl.create_default_context(cafile=host.root / "tls.pem")
        self.stderr = open(host.root / "stderr.txt", "w+")
        config = config_text(host, self.port, key, **sections)
        if inside or env:
            self.process = start_daemon(host, config, constants or {}, inside, env,
                                        stderr=self.stderr)
        else:
            self.process = Forked(host, config, constants or {}, self.stderr)
        wait_until(lambda: self.process.poll() is not None or answers(self.port, connect), 15)
        assert self.process.poll() is None, self.said()

    def said(self):
        self.stderr.seek(0)
        return self.stderr.read()

    def connect(self, timeout=30, source="127.0.0.1"):
        """A connection from an address of this machine's loopback network."""
        sock = self.connect_plainly(timeout, source)
        return self.tls.wrap_socket(sock, server_hostname="127.0.0.1") if self.tls else sock

    def connect_plainly(self, timeout=30, source="127.0.0.1"):
        return self.connection(("127.0.0.1", self.port), timeout, (source, 0))

    def request(self, method, path, body=None, headers=None, key=KEY, timeout=60):
        headers = dict(headers or {})
        if key:
            headers.setdefault("X-API-Key", key)
        if body is not None and not isinstance(body, (bytes, str)):
            body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.sock = self.connect(timeout)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            text = reply.read()
            is_json = reply.headers.get("Content-Type") == "application/json" and text
            return Reply(reply.status, json.loads(text) if is_json else text.decode(),
                         dict(reply.headers))
        finally:
            connection.close()

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, body, **options):
        return self.request("POST", path, body, **options)

    def delete(self, path, body, **options):
        return self.request("DELETE", path, body, **options)

    def raw(self, data, timeout=15):
        """Send bytes as they are -> all bytes that come until the daemon closes."""
        with self.connect(timeout) as sock:
            with contextlib.suppress(OSError):
                sock.sendall(data)
            return read_all(sock)

    def log(self, name="main"):
        path = self.host.root / f"{name}.log"
        wait_until(path.exists)                 # it is made by a thread of its own
        return path.read_text()

    def stop(self, number=signal.SIGTERM, seconds=40):
        """-> the exit status after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        self.stderr.close()
        return code


def side_by_side(*calls):
    """Make calls that mostly wait, each given as (function, *arguments), at once
    -> their results."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [each.result() for each in [pool.submit(*call) for call in calls]]


@contextlib.contextmanager
def held_up(host, command, call, *arguments):
    """Make a call in whose middle pct is held up by a fault, from when it has begun the command
    until the end of the `with` -> the Future of its reply."""
    begun = len(host.calls())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(call, *arguments)
        wait_until(lambda: any(each.startswith(f"pct {command} ") for each in host.calls()[begun:]))
        try:
            yield asked
        finally:
            host.go()


def tls_files(folder, certificate=CERTIFICATE, key=CERTIFICATES_KEY):
    """Write a certificate and its key -> the settings that name them."""
    for name, text in (("tls.pem", certificate), ("tls.key", key)):
        (folder / (name + ".new")).write_text(text)
        (folder / (name + ".new")).rename(folder / name)
    return {"tls_certificate": str(folder / "tls.pem"), "tls_key": str(folder / "tls.key")}


def read_all(sock):
    data = b""
    with contextlib.suppress(ConnectionError):
        while True:
            more = sock.recv(65536)
            if not more:
                break
            data += more
    return data


def read_answer(sock, head=False):
    """One answer from a connection that stays open -> Reply."""
    reply = http.client.HTTPResponse(sock, method="HEAD" if head else "GET")
    reply.begin()
    text = reply.read()
    return Reply(reply.status, json.loads(text) if text.startswith(b"{") else text.decode(),
                 dict(reply.headers))


def statuses(data):
    """The status codes of all answers in a byte string, and the last answer's JSON body."""
    codes, body = [], b""
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        codes.append(int(head.split()[1]))
        length = re.search(rb"Content-Length: (\d+)", head)
        size = int(length[1]) if length else len(rest)
        body, data = rest[:size], rest[size:]
    return codes, json.loads(body) if body.startswith(b"{") else None


class Sharing:
    """A part of pytest by which helpers run some of the tests, for they are many and mostly wait.

    All go through all tests, from different ones on, and each is run by the one that first makes
    a folder for it. A helper leaves its reports there, which the first process hands on as if it
    had run the test.
    """

    def __init__(self, config, folder, helpers=()):
        self.config, self.folder, self.helpers = config, folder, helpers
        self.claimed, self.lent, self.failed, self.codes = {}, [], False, {}

    def path(self, nodeid):
        return self.folder / hashlib.sha256(nodeid.encode()).hexdigest()

    def claim(self, item):
        with contextlib.suppress(FileExistsError):
            self.path(item.nodeid).mkdir()
            self.claimed[item.nodeid] = []

    def pytest_runtest_protocol(self, item, nextitem):
        """-> None to let pytest run a test, or True."""
        self.claim(item)
        if self.helpers:
            if item.nodeid not in self.claimed:
                self.lent.append(item)
            self.hand_on(wait=nextitem is None)
        return None if item.nodeid in self.claimed else True

    def ended(self):
        """-> whether all helpers have ended."""
        for helper in set(self.helpers) - set(self.codes):
            pid, status = os.waitpid(helper, os.WNOHANG)
            if pid:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.helpers)

    def hand_on(self, wait):
        """Report the helpers' tests that have ended, or wait for all of them."""
        while self.lent and (wait or (self.path(self.lent[0].nodeid) / "reports.json").exists()):
            item, done = self.lent[0], self.path(self.lent[0].nodeid) / "reports.json"
            wait_until(lambda: done.exists() or self.ended(), 300)
            assert done.exists(), (self.folder / "output").read_text()
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for data in json.loads(done.read_text()):
                report = self.config.hook.pytest_report_from_serializable(
                    config=self.config, data=data)
                if isinstance(report.longrepr, list):       # why it was skipped, as JSON has it
                    report.longrepr = tuple(report.longrepr)
                self.failed = self.failed or report.failed
                item.ihook.pytest_runtest_logreport(report=report)
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            del self.lent[0]

    def pytest_runtest_logreport(self, report):
        if not self.helpers and report.nodeid in self.claimed:
            self.claimed[report.nodeid].append(self.config.hook.pytest_report_to_serializable(
                config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid):
        if not self.helpers and nodeid in self.claimed:
            scratch = self.path(nodeid) / "reports.new"
            scratch.write_text(json.dumps(self.claimed[nodeid]))
            scratch.rename(scratch.with_suffix(".json"))


def become_helper(config, items, folder, fixture):
    """Go on, as a process just forked, with the tests from the first one on that uses a fixture."""
    begin = next((number for number, item in enumerate(items) if fixture in item.fixturenames),
                 len(items) // 2) or 1
    # the first is under way, and not the helper's
    items[1:] = items[begin:] + items[1:begin]
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()
    sys.stdout.flush()
    with open(folder / "output", "a") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    capture.start_global_capturing()
    config.pluginmanager.register(Sharing(config, folder))


def memory():
    """-> a folder in memory in which there is room, and programs may run, or None."""
    with contextlib.suppress(OSError):
        found = os.statvfs("/dev/shm")
        if (os.access("/dev/shm", os.W_OK) and not found.f_flag & os.ST_NOEXEC
                and found.f_bavail * found.f_frsize > 2 ** 29):
            return "/dev/shm"
    return None


def remove_if_empty(folders):
    for folder in folders:
        with contextlib.suppress(OSError):          # other runs may have theirs in it
            folder.rmdir()


@pytest.fixture(scope="session", autouse=True)
def base(request, tmp_path_factory):
    """The folder of all tests' folders. It is in memory if that can be, for to make a file takes
    ext4 thirty times as long, and it goes when all have passed."""
    parents = []
    atexit.register(remove_if_empty, parents)       # after what pytest does there at its own end
    with pytest.MonkeyPatch.context() as patch:
        if memory():
            patch.setenv("PYTEST_DEBUG_TEMPROOT", memory())
        base, me = tmp_path_factory.getbasetemp(), os.getpid()
    yield base
    if os.getpid() == me and not request.session.testsfailed:       # and not in a helper
        shutil.rmtree(base)
        for left in base.parent.iterdir():
            if left.is_symlink() and not left.exists():         # pytest's own, to the last run
                left.unlink()
        parents.append(base.parent)


@pytest.fixture(scope="module", autouse=True)
def sharing(base, request, tmp_path_factory):
    """Fork helpers, which begin with the tests that use these fixtures: before each of them
    much of the time goes by."""
    config, items, helpers = request.config, request.session.items, []
    if len(items) < 200 or config.getoption("usepdb"):
        yield
        return
    folder = tmp_path_factory.mktemp("sharing")
    sys.stdout.flush()
    gc.freeze()             # what is loaded is neither looked through again nor copied by helpers
    for number, fixture in enumerate(
            ("lab", "stage_here", "steady_tls", "installed", "launch"), 1):
        helpers.append(os.fork())
        if not helpers[-1]:
            LANE[0] = number
            become_helper(config, items, folder, fixture)
            yield
            return
    mine = Sharing(config, folder, helpers)
    for item in (items[0], items[-1]):      # after the last one, what all have used is put away
        mine.claim(item)
    config.pluginmanager.register(mine)
    yield
    for item in items:                              # nothing is left to run after an early end
        mine.claim(item)
    wait_until(mine.ended, 120)
    assert mine.lent or max(mine.codes.values()) == int(mine.failed), (
        (folder / "output").read_text())


@pytest.fixture
def host(tmp_path):
    """A simulated host: 104 runs, 106 is stopped, 105 does not exist."""
    host = Host(tmp_path / "host")
    host.add(104, "web-01", running=True)
    host.add(106, "db-01")
    return host


@pytest.fixture
def launch(host):
    """Start daemons on the host; at the end each must stop on SIGTERM with status 0."""
    started = []

    def launch(**options):
        started.append(Daemon(host, **options))
        return started[-1]
    yield launch
    host.faults()
    codes = [daemon.stop() for daemon in started if daemon.process.returncode is None]
    assert codes == [0] * len(codes)


@pytest.fixture
def api(launch):
    return launch()


@pytest.fixture
def asking(launch):
    """A daemon that cannot read cgroups, and so asks pct for a container's status."""
    return launch(**ASKING)


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """One daemon for all tests that change nothing."""
    host = Host(tmp_path_factory.mktemp("steady") / "host")
    host.add(104, "web-01", running=True)
    daemon = Daemon(host, rate_limiting={"enabled": False}, **ASKING)
    yield daemon
    assert daemon.stop() == 0
    assert "internal error" not in daemon.log("error")


@pytest.fixture(scope="module")
def steady_tls(tmp_path_factory):
    """The same as `steady`, over TLS."""
    host = Host(tmp_path_factory.mktemp("steady_tls") / "host")
    host.add(104, "web-01", running=True)
    daemon = Daemon(host, tls=True, rate_limiting={"enabled": False}, **ASKING)
    yield daemon
    assert daemon.stop() == 0
    assert "internal error" not in daemon.log("error")


@pytest.fixture(params=["steady", "steady_tls"], ids=["plain", "tls"])
def either(request):
    """The one and the other: what HTTP promises holds over both."""
    return request.getfixturevalue(request.param)


OVER_BOTH = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


def ok(message, data=None):
    return {"status": "success", "message": message, **({} if data is None else {"data": data})}


def error(text, **fields):
    return {"status": "error", "error": text, **fields}


def refused(text, **fields):
    """The error of a POST or DELETE that has done nothing."""
    return error(text, outcome="nothing_done", **fields)


# Logs

def test_nothing_a_client_or_pct_says_forges_a_line_or_an_escape(api, host):
    host.faults(set={"exit": 255, "stderr": (
        "bad \x1b[31mred\x1b[0m\r\nforged line\n\x00\x07 "
        "\u2028\u2029\u202a\u202e\u2066\u2069 \x9b")})
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    assert reply.status == 500 and "forged line" in reply.body["details"]
    for path in ("/a%0d%0aforged", "/a%1b[31m", "/\x7f", "/a\tb"):
        api.raw((f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: \x1b[31m\r\n"
                 "Connection: close\r\n\r\n").encode("latin-1"))
    api.get("/last")
    wait_until(lambda: " GET /last 404 " in api.log("access"))
    for name in ("main", "access", "error"):
        text = api.log(name)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", text)
        assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line)
                   for line in text.splitlines())
    assert r"\x1b[31mred\x1b[0m\r\nforged line" in api.log("error")


def test_logs_that_cannot_be_written_cost_only_their_lines(launch, host):
    folder = host.root / "logs"
    folder.mkdir()
    api = launch(logging={"log_file": "/dev/full", "access_log": str(folder / "access.log"),
                          "error_log": "/nowhere/error.log"})
    assert api.get("/routes").status == 200
    wait_until(lambda: (folder / "access.log").exists() and (folder / "access.log").read_text())
    shutil.rmtree(folder)
    assert [api.get("/routes").status for _ in range(3)] == [200] * 3
    folder.mkdir()
    assert api.get("/routes").status == 200
    wait_until(lambda: (folder / "access.log").exists()
               and " GET /routes 200 " in (folder / "access.log").read_text())
    assert api.stop() == 0
    said = (host.root / "stderr.txt").read_text()
    assert said.count(
        "/dev/full cannot be written: No space left on device; going on without it\n") == 1
    assert said.count("/nowhere/error.log cannot be opened: No such file or directory; "
                      "going on without it\n") == 1
    assert "Traceback" not in said


def test_a_log_s_disk_that_hangs_costs_lines_and_nothing_else(launch, host):
    paths = {name: f"{host.root}/{name}.fifo" for name in ("log_file", "access_log", "error_log")}
    for path in paths.values():
        os.mkfifo(path)                             # nobody reads it: opening it waits for ever
    api = launch(logging=paths, constants={"MAX_BACKLOG": 1200})
    started = time.monotonic()
    assert api.get("/health/check").status == 200
    for cores in range(1, 31):
        assert api.post("/scale/cores", {"vm_id": 104, "cores": cores}).status == 200
    assert host.conf(104)["cores"] == "30" and time.monotonic() - started < 10
    lines = []
    for name in ("log_file", "access_log"):
        with open(paths[name]) as reader:
            lines.append([])
            while not lines[-1] or not lines[-1][-1].endswith(" were lost\n"):
                lines[-1].append(reader.readline())
    assert "INFO lxc_autoscale_api" in lines[0][0] and " GET /health/check 200 " in lines[1][0]
    for each in lines:
        assert re.fullmatch(r"\S+Z WARNING \d+ lines before this one were lost\n", each[-1])
        assert len("".join(each)) < 2500
    started = time.monotonic()
    assert api.stop() == 0 and time.monotonic() - started < 3


def slow_write(seconds):
    """A disk on which each write to a log takes a while."""
    return Code("(lambda write: lambda fd, data: "
                f"(daemon.time.sleep({seconds}), write(fd, data))[1])(daemon.os.write)")


def test_a_log_s_disk_that_is_slow_is_waited_for_once(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(
        module.os, "write", lambda fd, data: (time.sleep(0.1), write(fd, data))[1])
    log, started = module.LogFile(), time.monotonic()
    log.point(str(tmp_path / "log"), [])
    for number in range(30):
        log.add(f"line {number}", 5)
    assert time.monotonic() - started < 1 and log.hangs
    log.flush()
    end_thread_of(log)
    assert (tmp_path / "log").read_text().count("line ") == 30


def test_a_log_s_disk_that_hangs_is_waited_for_once(tmp_path):
    os.mkfifo(tmp_path / "log")             # nobody reads it: opening it waits for ever
    log, started = module.LogFile(), time.monotonic()
    log.point(str(tmp_path / "log"), [])
    for number in range(9):
        log.add(f"line {number}", 0.3)
    assert 0.3 <= time.monotonic() - started < 1 and log.hangs
    with open(tmp_path / "log") as reader:
        assert [reader.readline()[-7:] for _ in range(9)] == [f"line {n}\n" for n in range(9)]
        end_thread_of(log)


def test_changes_that_a_stop_refuses_are_logged_without_waiting_for_each(launch, host):
    """A hundred lines on a disk that takes almost too long for each would hold the stop up."""
    host.faults(set={"delay": True})
    api = launch(constants={"os.write": slow_write(0.04)})
    for _ in range(99):
        assert api.post("/scale/cores", {"vm_id": 104, "cores": 4},
                        headers={"Prefer": "respond-async"}).status == 202
    started = time.monotonic()
    api.process.send_signal(signal.SIGTERM)

    def refuses():
        with contextlib.suppress(ConnectionResetError):
            try:
                api.connect(5).close()
            except ConnectionRefusedError:
                return True
    wait_until(refuses)
    assert time.monotonic() - started < 2
    host.go()
    wait_until(lambda: api.process.poll() == 0)
    assert api.log().count("503 The daemon is stopping (nothing_done)") == 98


def test_a_log_that_was_moved_from_a_disk_that_hangs_is_as_fast_as_any(tmp_path, monkeypatch):
    write, hangs, works, old = os.write, threading.Event(), threading.Event(), tmp_path / "old"

    def hang(fd, data):
        if data and os.readlink(f"/proc/self/fd/{fd}") == str(old):
            hangs.set()
            assert works.wait(20)
        return write(fd, data)
    monkeypatch.setattr(module.os, "write", hang)
    log = module.LogFile()
    log.point(str(old), [])
    log.add("one", 0.2)
    assert hangs.wait(10)
    log.point(str(tmp_path / "new"), [])
    started = time.monotonic()
    for number in range(9):
        log.add(f"line {number}", 5)
    assert time.monotonic() - started < 2
    works.set()
    wait_until(lambda: old.read_text().endswith("Z one\n"))     # that one counts nothing
    log.add("last", 5)
    assert not log.hangs and log.written == log.added == 11
    end_thread_of(log)
    assert (tmp_path / "new").read_text().count("\n") == 10


@contextlib.contextmanager
def no_thread_left(monkeypatch):
    """No thread can be started -> those that were to be."""
    refused = []

    def refuse(thread):
        refused.append(thread)
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patched:
        patched.setattr(module.threading.Thread, "start", refuse)
        yield refused


def end_thread_of(log):
    with log.changed:
        log.thread = None
        log.changed.notify_all()


def test_a_log_for_which_no_thread_is_left_stays_where_it_was(tmp_path, monkeypatch, capsys):
    old, new, log = tmp_path / "old", tmp_path / "new", module.LogFile()
    log.point(str(old), [])
    with no_thread_left(monkeypatch):
        log.point(str(new), [])
    assert capsys.readouterr().err == (
        f"{new} cannot be written: no thread is left; going on as before\n")
    log.add("one", 10)
    assert old.read_text().endswith("Z one\n") and not new.exists()
    log.point(str(new), [])
    log.add("two", 10)
    assert new.read_text().endswith("Z two\n") and old.read_text().count("\n") == 1
    end_thread_of(log)


def test_logs_are_private_whatever_the_umask(launch, host):
    before = os.umask(0)
    try:
        api = launch()
    finally:
        os.umask(before)
    api.get("/routes")
    for name in ("main", "access", "error"):
        path = host.root / f"{name}.log"
        wait_until(path.exists)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_text_of_a_request_cannot_look_like_the_rest_of_its_line(api):
    forged = "x by 192.0.2.66 with key deadbeef: done, after 0.1 s"
    assert api.post("/snapshot/create", {
        "vm_id": 104, "snapshot_name": "s1", "description": forged}).status == 200
    lines = [line for line in api.log().splitlines() if " change " in line]
    assert len(lines) == 2                  # of its begin and its end
    for line in lines:
        assert f" vm_id=104 snapshot_name=s1 description='{forged}' by 127.0.0.1 with key " in line


def test_a_log_whose_file_cannot_be_closed_is_opened_anew(tmp_path, monkeypatch):
    """NFS may tell of a full disk then only, and the descriptor is gone all the same."""
    path, close = tmp_path / "a.log", os.close
    file = module.SimpleNamespace(path=str(path), fd=None, torn=False)
    module.open_again(file)
    path.rename(tmp_path / "a.log.1")

    def fail(fd):
        close(fd)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    monkeypatch.setattr(module.os, "close", fail)
    with pytest.raises(OSError):
        module.open_again(file)
    monkeypatch.undo()
    module.open_again(file)
    assert os.path.samestat(os.fstat(file.fd), path.stat())
    os.close(file.fd)


@pytest.fixture
def log_file(tmp_path):
    """A log's file as its thread has it before it is opened."""
    return module.SimpleNamespace(path=f"{tmp_path}/away/x.log", fd=None, torn=False)


def test_a_line_that_a_full_disk_tore_apart_is_not_continued_by_the_next_one(
        log_file, monkeypatch):
    Path(log_file.path).parent.mkdir()
    log, write, room = module.LogFile(), os.write, [6]

    def write_what_fits(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = write(fd, data[:room[0]])
        room[0] -= done
        return done
    monkeypatch.setattr(module.os, "write", write_what_fits)
    assert log.write(log_file, ["one", "two"]) == 1
    room[0] = 1000
    assert log.write(log_file, ["three"]) == 0
    assert Path(log_file.path).read_text() == "one\ntw\nthree\n"
    os.close(log_file.fd)


def test_a_line_that_is_written_in_pieces_is_whole(log_file, monkeypatch):
    Path(log_file.path).parent.mkdir()
    write = os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: write(fd, data[:3]))
    assert module.LogFile().write(log_file, ["one", "two"]) == 0
    assert Path(log_file.path).read_text() == "one\ntwo\n"
    os.close(log_file.fd)


def test_that_a_log_cannot_be_written_is_said_once_and_again_after_it_could(log_file, capsys):
    log, folder = module.LogFile(), Path(log_file.path).parent
    for _ in range(2):
        log_file.fd = None
        assert [log.write(log_file, ["lost"]) for _ in range(2)] == [1, 1]
        folder.mkdir()
        assert log.write(log_file, ["kept"]) == 0
        os.close(log_file.fd)
        shutil.rmtree(folder)
    assert capsys.readouterr().err == (
        f"{log_file.path} cannot be opened: No such file or directory; going on without it\n" * 2)


def test_lines_that_could_not_be_written_are_counted_once_each(log_file):
    log = module.LogFile()
    log.point(log_file.path, [])
    for number in range(3):
        log.add(f"lost {number}", 10)
    Path(log_file.path).parent.mkdir()
    log.add("kept", 10)
    end_thread_of(log)
    assert [line.partition("Z ")[2] for line in Path(log_file.path).read_text().splitlines()] == [
        "kept", "WARNING 3 lines before this one were lost"]


def test_what_was_written_takes_no_room_any_more_in_what_may_wait(log_file, monkeypatch):
    monkeypatch.setattr(module, "MAX_BACKLOG", 60)          # characters: two lines of these
    Path(log_file.path).parent.mkdir()
    log = module.LogFile()
    log.point(log_file.path, [])
    for number in range(5):
        log.add(f"{number}", 10)
    end_thread_of(log)
    assert re.findall(r"Z (.*)\n", Path(log_file.path).read_text()) == ["0", "1", "2", "3", "4"]


def test_a_rotated_log_loses_no_line_and_is_not_kept_open(api, host):
    for number in range(5):
        api.get(f"/before{number}")
        wait_until(lambda: f"/before{number} " in api.log("access"))
        (host.root / "access.log").rename(host.root / f"access.log.{number}")
        api.get(f"/after{number}")
        wait_until(lambda: (host.root / "access.log").exists()
                   and f"/after{number} " in api.log("access"))
    text = "".join((host.root / f"access.log{suffix}").read_text()
                   for suffix in ("", ".0", ".1", ".2", ".3", ".4"))
    assert sorted(re.findall(r"GET /(\w+) 404", text)) == sorted(
        f"{word}{number}" for word in ("before", "after") for number in range(5))
    held = []
    for path in Path(f"/proc/{api.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):          # a connection's, just closed
            held.append(os.readlink(path))
    assert [path for path in held if "access.log" in path] == [f"{host.root}/access.log"]


# Settings

SCALARS = """
    5000 0 -1 +7 127.0.0.1 0.0.0.0 ::1 text two_words a-b a.b a/b /var/log/x.log \
1.5 -0.25 .5 -.5 +.5 1. 1.5e+3 1.5e3 1e3 08 09
    true True TRUE false False FALSE yes Yes YES no No NO on On ON off Off OFF y n Y N tRUE \
~ null Null NULL nULL
    "double" 'single' "" '' "5000" '5000' "true" 'yes' "a\\"b" 'it''s' \
"tab\\tnew\\nline" "\\x41\\u00e9\\U0001F600" "\\\\" "\\/" "\\0"
    "#no" '#no' a#b http://host:80/x key=value 10.0.0.0/8 2001:db8::1 1:x a:b \
-x -- a--b ?x -1x 5GB 1,5x é ü-ß 日本
""".split() + [
    '"a: b"', "'a: b'",
    "two words", "a  b", "text with spaces", "a # b", '"a b" # comment', "'x'   # comment", "1 2",
    "no way", "5000 # port", "a 'b' c", 'a "b" c',
    "x,y", "a]b", "a{b}", "50%", "a&b", "a*b", "a!b", "a|b", "a>b", "a@b", "a`b", "\\n", "C:\\dir",
    "\"\\e[0m\"", "'#'"]
ACCEPTED = [f"key: {scalar}\n" for scalar in SCALARS] + [
    f"key:\n  - {scalar}\n  - last\n" for scalar in SCALARS] + [
    "key: []\n", "key: [a]\n", "key: [a, b]\n", "key: [a, b,]\n", "key: [ a , b ]\n",
    'key: ["a", \'b\', 3, true, ~, 1.5]\n', "key: [a b, c]\n",
    'key: ["127.0.0.1", "::1"]\n', "key: [a] # comment\n", "key: [-1, x-y, 10.0.0.0/8]\n",
    "key: [5000,6000]\n", "key: ['a,b', \"c]d\"]\n", "key: [a'b, c\"d]\n",
    "a: 1\nb: 2\n", "a:\n  b: 1\n  c: 2\nd: 3\n", "a:\n    b: 1\nc:\n  d: 2\n",
    "a:\n  b:\n    c:\n      d: deep\ne: 1\n",
    "a:\n- 1\n- 2\n", "a:\n  - 1\n  - 2\nb: 3\n", "a:\n- 1\nb:\n- 2\n", "a:\n  b:\n  - 1\n  c: 2\n",
    "- a\n- b\n", "- 1\n-\n- 2\n", "-\n",
    "\"'a'\": 1\n'\"b\"': 2\n",
    "a:\nb: 1\n", "a:\n", "a: # nothing\nb: 1\n", "a: # comment\n  b: 1\n", "", "\n\n",
    "# only a comment\n", "---\na: 1\n", "--- # start\na: 1\n", "# c\n---\na: 1\n",
    "a: 1\r\nb: 2\r\n", "a: 1\rb: 2\r", "\ufeffa: 1\n", "\n\na: 1\n\n\n# end\n", "a: 1   \n",
    "  # indented comment\na: 1\n", "a:\n  # inside\n  b: 1\n\n  c: 2\n",
    '"a": 1\n', "'a': 1\n", '"a b": 1\n', "'yes': 1\n", '"1": x\n', "a : 1\n",
    "a-b: 1\na.c: 2\na_d: 3\n", "a:    1\n", "a: 1", "  a: 1\n  b: 2\n", "a: 'x'\nb: \"y\"\n",
    "#\tcomment with a tab\na: 1\n", "a:\n  - x # c\n  - 'y' # c\n",
]


def test_yaml_documents_are_read_as_pyyaml_reads_them():
    yaml = pytest.importorskip("yaml")
    assert len(set(ACCEPTED)) >= 150
    different = [
        (document, module.load_yaml(document)[0], yaml.safe_load(document))
        for document in ACCEPTED
        if repr(module.load_yaml(document)[0]) != repr(yaml.safe_load(document))]
    assert different == []


def test_what_yaml_accepts_of_random_documents_is_what_pyyaml_reads():
    yaml = pytest.importorskip("yaml")
    chance, accepted = random.Random(1), 0
    pieces = ["a", "b", "key", ": ", ":", "- ", "-", " ", "  ", "\n", "\n  ", "#", " # c", "'", '"',
              "[", "]", ", ", "1", "0", "1.5", "yes", "~", "\\", "::1", ".", "x y", "_", "?", "!",
              "&", "*", "é", "e+1", "+", "---", "\r\n", "{", "}", "%", "@", "|", ">", "=", "<<",
              "2024-01-01", "1:2"]
    for _ in range(30000):
        document = "".join(chance.choice(pieces) for _ in range(chance.randint(1, 9)))
        if chance.random() < 0.7:
            document = "k: " + document
        try:
            value = module.load_yaml(document)[0]
        except module.ConfigError:
            continue
        accepted += 1
        assert repr(value) == repr(yaml.safe_load(document)), document
    assert accepted > 5000


REFUSED = [                             # (document, line of what is refused)
    ("\ta: 1\n", 1), ("a:\n\tb: 1\n", 2), ("a: 1\nb:\t2\n", 2), ("a: &x 1\n", 1),
    ("a: 1\nb: *x\n", 2), ("a: !!str 1\n", 1), ("a: !x 1\n", 1),
    ("a: |\n  text\n", 1), ("a: >\n  text\n", 1), ("a: one\n  two\n", 2), ("a: 'one\n  two'\n", 1),
    ('a: "one\n  two"\n', 1), ("a: {b: 1}\n", 1), ("a: {}\n", 1),
    ("a: 1\na: 2\n", 2), ("a:\n  b: 1\n  b: 2\n", 3), ("a: 1\n---\nb: 2\n", 2), ("a: 1\n...\n", 2),
    ("%YAML 1.1\n---\na: 1\n", 1), ("? a\n: b\n", 1), ("---\n---\na: 1\n", 2),
    ("a: [b\n", 1), ("a: [b,\n  c]\n", 1), ("a: [[b]]\n", 1), ("a: [b: c]\n", 1),
    ("a: [{b: 1}]\n", 1), ("a: [,]\n", 1), ("a: [a b\n", 1), ("a: [a] b\n", 1),
    ("- a\nb: 1\n", 2), ("a: 1\n- b\n", 2), ("- - a\n", 1), ("- a: 1\n", 1), ("- [a]\n", 1),
    ("a:\n  - b: 1\n", 2), ("a\n", 1), ("a:1\n", 1), ("just text\n", 1),
    ("a:\n    b: 1\n  c: 2\n", 3), ("a: 1\n  b: 2\n", 2), ("a:\n  b: 1\n c: 2\n", 3),
    ("a: b: c\n", 1), ("a: 'b' c\n", 1), ('a: "b"c\n', 1), ("a: 'b'#c\n", 1),
    ('a: "\\q"\n', 1), ('a: "\\ud800"\n', 1), ('a: "\\U00110000"\n', 1), ("a: @x\n", 1),
    ("a: `x\n", 1), ("a: %x\n", 1), ("a: ,x\n", 1), ("a: ]\n", 1), ("a: }\n", 1),
    ("a: 0x1F\n", 1), ("a: 017\n", 1), ("a: 0b11\n", 1), ("a: 1_000\n", 1), ("a: 12:30\n", 1),
    ("a: 2024-12-24\n", 1), ("a: .inf\n", 1), ("a: .nan\n", 1),
    ("a: <<\n", 1), ("a: =\n", 1), ("<<: 1\n", 1), ("1: a\n", 1), ("yes: a\n", 1), ("~: a\n", 1),
    ("[a]: b\n", 1), ("a: \x1b[0m\n", 1), ("a: 1\nb: \x00\n", 2),
    ("a: b\u2028c\n", 1), ("a: - b\n", 1), ("a: ? b\n", 1), ("a: 12345678901234567890\n", 1),
    ("é: 1\n", 1), ("- a\n  b\n", 2),
]


@pytest.mark.parametrize("document, line", REFUSED)
def test_yaml_that_is_not_taken_is_refused_with_its_line(document, line):
    with pytest.raises(module.ConfigError) as refusal:
        module.load_yaml(document)
    assert refusal.value.line == line


GOOD_KEY = 'authentication:\n  api_key: "0123456789abcdef"\n'


@pytest.mark.parametrize("document, line, says", [
    ("", 1, "authentication.api_key is missing"),
    ("authentication:\n  enabled: true\n", 1, "authentication.api_key is missing"),
    ('authentication:\n  api_key: ""\n', 2, "authentication.api_key is missing"),
    ('authentication:\n  api_key: "your-secret-api-key"\n', 2, "still the sample value"),
    ('authentication:\n  api_key: "short-key"\n', 2, "at least 16 visible ASCII characters"),
    ('authentication:\n  api_key: "0123456789abcde"\n', 2,
     "at least 16 visible ASCII characters"),
    ("authentication:\n  api_key: 12345678901234567\n", 2, "must be text"),
    ('authentication:\n  api_keys: ["0123456789abcdef", "short"]\n', 2,
     "at least 16 visible ASCII characters"),
    (GOOD_KEY + '  api_keys: ["another-key-9876543210", ""]\n', 3,
     "authentication.api_keys must hold no empty key"),
    (GOOD_KEY + "  read_only_keys: ['']\n", 3,
     "authentication.read_only_keys must hold no empty key"),
    (GOOD_KEY + "  read_only_keys: [short]\n", 3,
     "authentication.read_only_keys must be at least 16 visible ASCII characters"),
    (GOOD_KEY + "  read_only_keys: [your-secret-api-key]\n", 3, "still the sample value"),
    (GOOD_KEY + '  read_only_keys: ["another-key-9876543210", "0123456789abcdef"]\n', 3,
     "authentication.read_only_keys holds a key that is also one that may change containers"),
    ("authentication:\n  read_only_keys: [another-key-9876543210]\n", 1,
     "authentication.api_key is missing"),
    (GOOD_KEY + "  metrics: closed\n", 3, "authentication.metrics must be open or key"),
    (GOOD_KEY + "  metrics: true\n", 3, "authentication.metrics must be open or key"),
    (GOOD_KEY + "server:\n  port: 0\n", 4, "server.port must be an integer between 1 and 65535"),
    (GOOD_KEY + "server:\n  port: 65536\n", 4, "server.port must be"),
    (GOOD_KEY + 'server:\n  port: "5000"\n', 4, "server.port must be"),
    (GOOD_KEY + "server:\n  port: true\n", 4, "server.port must be"),
    (GOOD_KEY + "server:\n  port: 5000.0\n", 4, "server.port must be"),
    (GOOD_KEY + "server:\n  port:\n", 4, "server.port must be"),
    (GOOD_KEY + "server:\n  host: nowhere\n", 4, "server.host must be an IP address"),
    (GOOD_KEY + "server:\n  tls_certificate: /x.pem\n", 4,
     "server.tls_certificate needs server.tls_key beside it"),
    (GOOD_KEY + 'server:\n  tls_certificate: ""\n  tls_key: /x.key\n', 5,
     "server.tls_key needs server.tls_certificate beside it"),
    (GOOD_KEY + "server:\n  tls_certificate: x.pem\n", 4,
     "server.tls_certificate must be an absolute path"),
    (GOOD_KEY + "server:\n  tls_key: false\n", 4, "server.tls_key must be text"),
    (GOOD_KEY + "server:\n  prot: 5000\n", 4, "unknown key 'server.prot'; known here: host, port"),
    (GOOD_KEY + "sever:\n  port: 5000\n", 3, "unknown key 'sever'"),
    (GOOD_KEY + "server: 5000\n", 3, "server must hold"),
    (GOOD_KEY + 'server:\n  trusted_proxies: "127.0.0.1"\n', 4, "must be a list of IP addresses"),
    (GOOD_KEY + "server:\n  trusted_proxies: [1]\n", 4, "must be a list of IP addresses"),
    (GOOD_KEY + "rate_limiting:\n  enabled: 1\n", 4, "rate_limiting.enabled must be true or false"),
    (GOOD_KEY + "rate_limiting:\n  max_requests_per_minute: 0\n", 4,
     "must be an integer between 1 and"),
    (GOOD_KEY + "logging:\n  log_level: LOUD\n", 4, "must be DEBUG, INFO"),
    (GOOD_KEY + "logging:\n  log_file: main.log\n", 4, "must be an absolute path"),
    (GOOD_KEY + "proxmox:\n  max_commands: -1\n", 4, "must be an integer between 0 and"),
    (GOOD_KEY + "proxmox:\n  cluster: on\n", 4, "proxmox.cluster must be auto or off"),
    (GOOD_KEY + "proxmox:\n  cluster: 0\n", 4, "proxmox.cluster must be auto or off"),
    (GOOD_KEY + "proxmox:\n  cluster: [auto]\n", 4, "proxmox.cluster must be auto or off"),
    (GOOD_KEY + "proxmox:\n\tmax_commands: 4\n", 4, "tab"),
    (GOOD_KEY.encode() + b"server:\n  host: \xff\n", 4, "not UTF-8"),
    ("- a\n", 1, "expected sections"),
])
def test_a_bad_configuration_stops_the_start_with_file_and_line(tmp_path, document, line, says):
    path = tmp_path / "api.yaml"
    path.write_bytes(document if isinstance(document, bytes) else document.encode())
    with pytest.raises(module.ConfigError) as refusal:
        module.read_settings(path)
    said = refusal.value.text
    assert said.startswith(f"{path}:{line}: ") and says in said
    assert "0123456789abcdef" not in said and "short-key" not in said


def check_config(tmp_path, document):
    path = tmp_path / "api.yaml"
    path.write_bytes(document if isinstance(document, bytes) else document.encode())
    done = subprocess.run(
        [sys.executable, "-c", importing({}) + "sys.exit(daemon.main())", "--config", path,
         "--check-config"], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


MANY_FAULTS = """\
sever: 1
server:
  port: 0
  prot: 5000
authentication:
  api_key: "short-key"
rate_limiting: [5]
containers:
  protected: [1]
lxc:
  node: "proxmox"
"""
ALL_FAULTS = [
    "1: unknown key 'sever'; known here: " + ", ".join(module.SETTINGS),
    "3: server.port must be an integer between 1 and 65535",
    "4: unknown key 'server.prot'; known here: " + ", ".join(module.SETTINGS["server"]),
    "6: authentication.api_key must be at least 16 visible ASCII characters without spaces, "
    "such as from: openssl rand -hex 32",
    "7: rate_limiting must hold: enabled, max_requests_per_minute, time_window_seconds",
    "9: containers.protected must be a list of container ids, such as [100, 101]",
    "10: unknown key 'lxc'; known here: " + ", ".join(module.SETTINGS),
]


def test_all_that_is_wrong_with_keys_and_values_is_told_in_one_run(tmp_path):
    path = tmp_path / "api.yaml"
    said = "".join(f"{path}:{fault}\n" for fault in ALL_FAULTS)
    assert check_config(tmp_path, MANY_FAULTS) == (78, said)
    no_key = "server:\n  port: 0\nauthentication:\n  apikey: 1\n"
    assert [line.partition(";")[0] for line in check_config(tmp_path, no_key)[1].splitlines()] == [
        f"{path}:2: server.port must be an integer between 1 and 65535",
        f"{path}:3: authentication.api_key is missing, and no credential api_key was passed",
        f"{path}:4: unknown key 'authentication.apikey'"]
    assert check_config(tmp_path, "a: 1\nb: [\nc: 1\n")[1].count("\n") == 1


def test_a_good_configuration_passes_and_a_bad_or_missing_one_stops_the_start(tmp_path):
    bad = GOOD_KEY + "server:\n  prot: 5000\n"
    said = (f"{tmp_path}/api.yaml:4: unknown key 'server.prot'; known here: "
            "host, port, tls_certificate, tls_key, trusted_proxies, max_connections\n")
    assert check_config(tmp_path, bad) == (78, said)
    started = subprocess.run([sys.executable, MODULE, "--config", tmp_path / "api.yaml"],
                             capture_output=True, text=True)
    assert (started.returncode, started.stdout, started.stderr) == (78, "", said)
    assert check_config(tmp_path, GOOD_KEY) == (
        0, f"{tmp_path}/api.yaml: ok\nauthentication.api_key: key 9f9f5111\n")
    assert check_config(tmp_path, "authentication:\n  enabled: false\nserver:\n") == (
        0, f"{tmp_path}/api.yaml: ok\n")
    done = subprocess.run([sys.executable, MODULE, "--config", tmp_path / "none.yaml"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        78, f"{tmp_path}/none.yaml: cannot be read: No such file or directory\n")


@pytest.mark.parametrize("certificate, key, line, says", [
    (CERTIFICATE, OTHER_KEY, 5, "server.tls_key {key} must hold the key of that certificate, "
     "in PEM and without a passphrase (OpenSSL says"),
    (CERTIFICATE, LOCKED_KEY, 5, "server.tls_key {key} must hold the key of that certificate, "
     "in PEM and without a passphrase"),
    (CERTIFICATE, CERTIFICATE, 5, "server.tls_key {key} must hold the key"),
    (CERTIFICATE, "", 5, "server.tls_key {key} must hold the key"),
    (CERTIFICATE, None, 5, "server.tls_key {key} cannot be read: No such file or directory"),
    (None, CERTIFICATES_KEY, 4,
     "server.tls_certificate {certificate} cannot be read: No such file or directory"),
    ("", CERTIFICATES_KEY, 4,
     "server.tls_certificate {certificate} must hold a certificate in PEM"),
    (CERTIFICATES_KEY, CERTIFICATES_KEY, 4,
     "server.tls_certificate {certificate} must hold a certificate in PEM"),
    (CERTIFICATE[:300] + CERTIFICATE[400:], CERTIFICATES_KEY, 4,
     "server.tls_certificate {certificate} must hold a certificate in PEM"),
])
def test_a_certificate_or_key_that_cannot_be_used_stops_the_start_with_its_line(
        tmp_path, certificate, key, line, says):
    files = tls_files(tmp_path, certificate or "", key or "")
    for path, text in zip(files.values(), (certificate, key)):
        if text is None:
            Path(path).unlink()
    document = GOOD_KEY + "server:\n  tls_certificate: {}\n  tls_key: {}\n".format(*files.values())
    (tmp_path / "api.yaml").write_text(document)
    with pytest.raises(module.ConfigError) as refusal:
        module.read_settings(tmp_path / "api.yaml")
    said = refusal.value.text
    assert said.startswith(f"{tmp_path}/api.yaml:{line}: " + says.format(
        certificate=files["tls_certificate"], key=files["tls_key"]))
    assert refusal.value.code == 78


def test_a_key_with_a_passphrase_asks_nobody_and_the_check_says_what_is_wrong(tmp_path):
    files = tls_files(tmp_path, key=LOCKED_KEY)
    terminal, inside = os.openpty()
    (tmp_path / "api.yaml").write_text(
        GOOD_KEY + "server:\n  tls_certificate: {}\n  tls_key: {}\n".format(*files.values()))
    done = subprocess.run(
        [sys.executable, MODULE, "--config", tmp_path / "api.yaml", "--check-config"],
        stdin=inside, stdout=inside, stderr=inside, start_new_session=True, timeout=20)
    assert (done.returncode, os.read(terminal, 1000).decode()) == (
        78, f"{tmp_path}/api.yaml:5: server.tls_key {tmp_path}/tls.key must hold the key of "
            "that certificate, in PEM and without a passphrase\r\n")
    os.close(terminal)
    os.close(inside)


HANGING = "Proxmox's files (/etc/pve) do not answer; see: systemctl status pve-cluster"


def test_a_certificate_that_hangs_or_is_not_mounted_yet_stops_the_start_in_time_and_not_for_good(
        host, tmp_path):
    files = tls_files(tmp_path)
    Path(files["tls_certificate"]).unlink()
    os.mkfifo(files["tls_certificate"])             # opening it hangs, as a FUSE file system may
    for constants, sections, says in (
            ({"FILE_SECONDS": 0.2}, {"server": files}, f"server.tls_certificate: {HANGING}"),
            ({}, {"server": {name: f"{host.root}/unmounted/{name}" for name in files},
                  "proxmox": {"pve_dir": f"{host.root}/unmounted"}},
             f"server.tls_certificate {host.root}/unmounted/tls_certificate cannot be read: "
             "No such file or directory")):
        (host.root / "unmounted").mkdir(exist_ok=True)
        done = start_daemon(host, config_text(host, free_port(), KEY, **sections), constants,
                            stderr=subprocess.PIPE, text=True)
        said = done.communicate(timeout=10)[1]
        # another than 78, which is final
        assert (done.returncode, said) == (1, f"{host.root}/api.yaml:4: {says}\n")


def test_the_check_tells_each_key_by_its_fingerprint_and_none_as_it_is(tmp_path, monkeypatch):
    keys = [f"{name}-key-0123456789" for name in ("first", "second", "third", "reading")]
    prints = [subprocess.run(["sha256sum"], input=key, capture_output=True, text=True).stdout[:8]
              for key in keys]
    told = (0, f"{tmp_path}/api.yaml: ok\nauthentication.api_key: key {prints[0]}\n"
               f"authentication.api_keys: key {prints[1]}\n"
               f"authentication.api_keys: key {prints[2]}\n"
               f"authentication.read_only_keys: key {prints[3]}, may only read\n")
    assert check_config(
        tmp_path, "authentication:\n  api_key: {}\n  api_keys: [{}, {}]\n"
                  "  read_only_keys: [{}]\n".format(*keys)) == told
    (tmp_path / "api_key").write_text(keys[0])
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert check_config(tmp_path, "server:\n") == (
        0, f"{tmp_path}/api.yaml: ok\ncredential api_key: key {prints[0]}\n")


def test_the_shipped_configuration_has_every_setting_with_its_default():
    tree, _ = module.load_yaml((HERE / "lxc_autoscale_api.yaml").read_text())
    defaults = {section: {key: default for key, (default, _) in keys.items()}
                for section, keys in module.SETTINGS.items()}
    assert tree["authentication"].pop("api_key") == module.SAMPLE_KEY
    defaults["authentication"].pop("api_key")
    assert tree == defaults


def test_the_sample_key_is_refused_as_shipped(tmp_path):
    code, said = check_config(tmp_path, (HERE / "lxc_autoscale_api.yaml").read_text())
    assert code == 78 and "authentication.api_key is still the sample value" in said


def test_a_log_level_may_be_written_in_small_letters():
    assert module.load_settings(
        GOOD_KEY + "logging:\n  log_level: info\n").logging.log_level == "INFO"


def test_version_and_help_are_told():
    run = [subprocess.run([sys.executable, MODULE, word], capture_output=True, text=True)
           for word in ("--version", "--help")]
    assert run[0].stdout == f"lxc_autoscale_api {module.VERSION}\n"
    assert all(word in run[1].stdout
               for word in ("--config PATH", "--check-config", module.CONFIG_PATH))


# Parameters

def parse(parameter, value):
    """-> what a handler gets whose endpoint takes this parameter only."""
    return module.parse_parameters([parameter], [(parameter.name, value)])[parameter.name]


INTEGERS = [104, "104", "0104"]


@pytest.mark.parametrize("value", INTEGERS)
def test_an_integer_may_be_a_number_or_digits(value):
    assert parse(module.VM_ID, value) == 104


NOT_INTEGERS = [True, 104.0, "104.0", "1e3", "+104", "-104", " 104", "104 ", "1_04", "104\n", "١٠٤",
                "", None, [104], {}, 99, 1000000, "99", "9" * 5000, 10**19]


@pytest.mark.parametrize("value", NOT_INTEGERS)
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(module.Problem, match="must be an integer between 100 and 999999"):
        parse(module.VM_ID, value)


SNAPSHOT_NAMES = ["backup_20241224", "a", "_x", "0-1", "x" * 100]
NOT_SNAPSHOT_NAMES = ["", "-x", "x" * 101, "a b", "a.b", "a/b", "ä", "x\n", "٣", "a;b",
                      None, 5, ["x"]]


def test_names_are_ascii_and_never_look_like_an_option():
    assert [parse(module.SNAPSHOT_NAME, value) for value in SNAPSHOT_NAMES] == SNAPSHOT_NAMES
    assert parse(module.NEW_VM_NAME, "web-01.example_x") == "web-01.example_x"
    for value in NOT_SNAPSHOT_NAMES:
        with pytest.raises(module.Problem, match="must be 1 to 100 letters"):
            parse(module.SNAPSHOT_NAME, value)
    for value in (1, 0, "true", None, "false"):
        with pytest.raises(module.Problem, match="must be true or false"):
            parse(module.START, value)


@pytest.mark.parametrize("parameter, good, bad", [
    (module.NEW_VM_NAME, "x" * 63, "x" * 64), (module.DESCRIPTION, "x" * 1024, "x" * 1025),
    *((module.DESCRIPTION, "a\r\nb", f"a{mark}[31m") for mark in "\t\x7f\x85\x9b"),
    (module.IP, "10.0.0.1/8", "10.0.0.1/7"), (module.IP, "2001:db8::1/8", "2001:db8::1/7")])
def test_a_text_is_taken_as_far_as_its_rule_goes(parameter, good, bad):
    assert parse(parameter, good) == good
    with pytest.raises(module.Problem) as refusal:
        parse(parameter, bad)
    assert str(refusal.value) == f"Invalid {parameter.name}: {parameter.rule}"


BOUNDS = [("/scale/cores", "cores", 1, 128), ("/scale/ram", "memory", 64, 1048576),
          ("/scale/storage/increase", "disk_size", 1, 16384),
          ("/scale/cores", "vm_id", 100, 999999)]


@pytest.mark.parametrize("path, name, low, high", BOUNDS)
def test_bounds_are_named_in_the_refusal(steady, path, name, low, high):
    given = {parameter: 64 for route, parameter, _, _ in BOUNDS if route == path}
    for value in (low - 1, high + 1, "x", 1.5, None, True):
        reply = steady.post(path, {**given, "vm_id": 104, name: value})
        assert (reply.status, reply.body) == (
            400, refused(f"Invalid {name}: must be an integer between {low} and {high}"))


@pytest.mark.parametrize("body, says", [
    ({"vm_id": 104}, "Missing cores: must be an integer between 1 and 128"),
    ({"cores": 4}, "Missing vm_id: must be an integer between 100 and 999999"),
    ({"vm_id": 104, "cores": 4, "corse": 4},
     "Unknown parameter 'corse'; this endpoint takes: vm_id, lxc_id, container_id, cores"),
    ({"vm_id": 104, "cores": 4, "api_key": "x"},
     "Unknown parameter 'api_key'; this endpoint takes: vm_id, lxc_id, container_id, cores"),
    ({"vm_id": 104, "lxc_id": 105, "cores": 4}, "Invalid lxc_id: vm_id and lxc_id must not differ"),
    ({"container_id": 104, "vm_id": 104, "lxc_id": 105, "cores": 4},
     "Invalid lxc_id: container_id and lxc_id must not differ"),
    ({"lxc_id": 104, "cores": 4, "container_id": 105},
     "Invalid container_id: lxc_id and container_id must not differ"),
    ({"lxc_id": 5, "cores": 4}, "Invalid lxc_id: must be an integer between 100 and 999999"),
    ('{"vm_id": 104, "vm_id": 104, "cores": 4}', "Invalid vm_id: must be given once"),
    ("[1]", 'Invalid JSON: must be an object, such as {"vm_id": 104}'),
    ("", 'Invalid JSON: the body must be one JSON object in UTF-8, such as {"vm_id": 104}'),
    ('{"vm_id": NaN, "cores": 1}',
     'Invalid JSON: the body must be one JSON object in UTF-8, such as {"vm_id": 104}'),
    ('{"vm_id": 104, "cores": 4} x',
     'Invalid JSON: the body must be one JSON object in UTF-8, such as {"vm_id": 104}'),
    (b'{"vm_id": 104, "cores": "\xff"}',
     'Invalid JSON: the body must be one JSON object in UTF-8, such as {"vm_id": 104}'),
    ("[" * 60000,
     'Invalid JSON: the body must be one JSON object in UTF-8, such as {"vm_id": 104}'),
    ('{"vm_id": ' + "1" * 10000 + ', "cores": 4}',
     "Invalid vm_id: must be an integer between 100 and 999999"),
    ('{"vm_id": 104, "cores": "\\ud800"}', "Invalid cores: must be an integer between 1 and 128"),
    ('{"\\ud800": 104}',
     "Unknown parameter; this endpoint takes: vm_id, lxc_id, container_id, cores"),
])
def test_a_bad_body_is_refused_by_its_rule(steady, body, says):
    reply = steady.post("/scale/cores", body, headers={"Content-Type": "application/json"})
    assert (reply.status, reply.body) == (400, refused(says))


@pytest.mark.parametrize("query, says", [
    ("", "Missing vm_id: must be an integer between 100 and 999999"),
    ("?vm_id=", "Invalid vm_id: must be an integer between 100 and 999999"),
    ("?vm_id=104&vm_id=104", "Invalid vm_id: must be given once"),
    ("?vm_id=104&x=1", "Unknown parameter 'x'; this endpoint takes: vm_id, lxc_id, container_id"),
    ("?vm_id=%ff", "Invalid query: not percent-encoded UTF-8"),
    ("?vm_id=%zz", "Invalid query: a % that is not followed by two hexadecimal digits"),
    ("?vm_id=104%00", "Invalid vm_id: must be an integer between 100 and 999999"),
    ("?" + "&".join(["a=1"] * 500), "Invalid query: Max number of fields exceeded"),
])
def test_a_bad_query_is_refused_by_its_rule(steady, query, says):
    reply = steady.get("/resource/vm/config" + query)
    assert (reply.status, reply.body) == (400, error(says))


@pytest.mark.parametrize("query", [
    "_=1732400000", "vm_id=104", "vm_id=104&vm_id=x", "api_key=wrong", "a=%zz", "a=%ff",
    "&".join(["a"] * 200)])
def test_what_monitors_add_to_an_address_is_ignored(steady, query):
    reply = steady.get(f"/health/check?{query}", key=None)
    assert (reply.status, reply.body["status"]) == (200, "healthy")
    reply = steady.get(f"/metrics?{query}", key=None)
    assert reply.status == 200 and reply.body.startswith("# HELP lxc_autoscale_api_build_info ")
    assert steady.request("OPTIONS", f"/metrics?{query}", key=None).status == 204
    assert steady.get(f"/routes?_=1&{query}").status == 400


def test_parameters_come_from_one_place_only(steady):
    assert steady.post("/scale/cores?vm_id=104", {"cores": 4}).status == 400
    assert steady.get("/resource/vm/config", body={"vm_id": 104}).status == 400
    assert steady.post(f"/scale/cores?api_key={KEY}", {"vm_id": 104, "cores": 0},
                       key=None).body["error"].startswith("Invalid cores")


@pytest.mark.parametrize("kind, status", [
    ("application/json", 400), ("application/json; charset=utf-8", 400),
    ("Application/JSON;charset=UTF-8", 400), ('application/json; charset="utf-8"', 400),
    ("application/json; charset=utf8", 400), ("application/json ; Charset = US-ASCII", 400),
    ("application/json; charset=ascii; a=b", 400), ("application/json;", 400),
    ("application/json; charset=latin-1", 415), ("application/json; charset=utf-16", 415),
    ("application/json; charset=utf-8; charset=utf-7", 415),
    ("application/json; charset=", 415), ("application / json", 415), ("text/plain", 415),
    ("application/x-www-form-urlencoded", 415), ("application/jsonx", 415), ("", 415),
    ("application/json, text/plain", 415),
])
def test_only_json_is_taken(steady, kind, status):
    assert steady.post("/scale/cores", "{}", headers={"Content-Type": kind}).status == status


def test_what_is_json_but_not_as_it_must_be_sent_is_refused_with_its_own_sentence(steady):
    body = json.dumps({"vm_id": 104, "cores": 0})
    for headers, says in (
            ({"Content-Type": "text/plain"},
             "The body must be JSON: send Content-Type: application/json"),
            ({"Content-Type": "application/json; charset=utf-16"},
             "The body must be in UTF-8: send Content-Type: application/json"),
            ({"Content-Type": "application/json", "Content-Encoding": "gzip"},
             "No Content-Encoding is taken: send the JSON object as it is"),
            ({"Content-Type": "application/json", "Content-Encoding": "identity, br"},
             "No Content-Encoding is taken: send the JSON object as it is")):
        reply = steady.post("/scale/cores", body, headers=headers)
        assert (reply.status, reply.body) == (415, refused(says))
        assert reply.headers.get("Accept-Encoding") == (
            "identity" if "Content-Encoding" in headers else None)
    assert steady.post(
        "/scale/cores", body,
        headers={"Content-Type": "application/json", "Content-Encoding": "Identity"}
    ).body == refused("Invalid cores: must be an integer between 1 and 128")


def test_a_byte_order_mark_before_the_body_is_ignored(steady):
    headers = {"Content-Type": "application/json"}
    assert steady.post(
        "/scale/cores", b'\xef\xbb\xbf{"vm_id": 104, "cores": 0}', headers=headers
    ).body == refused("Invalid cores: must be an integer between 1 and 128")
    not_json = refused(
        'Invalid JSON: the body must be one JSON object in UTF-8, such as {"vm_id": 104}')
    for body in (b"\xef\xbb\xbf\xef\xbb\xbf{}", b"\xef\xbb\xbf",
                 '{"vm_id": 104}'.encode("utf-16"), '{"vm_id": 104}'.encode("utf-32")):
        assert steady.post("/scale/cores", body, headers=headers).body == not_json


# What Proxmox and the kernel write

def transcript(name):
    """What the real commands printed, shortened to what is parsed."""
    return {
        "listsnapshot":
            "`-> backup_20241224             2026-11-23 19:10:31     no-description\n"
            " `-> second                     2026-11-23 19:12:51     line one\n"
            "  `-> current                                           You are here!\n",
        "conf":
            "#first line\n#second%3A line\n"
            "arch: amd64\ncores: 4\nhostname: web-01\nmemory: 4096\nparent: second\n"
            "rootfs: local-lvm:vm-504-disk-0,size=8G\nsearchdomain: example.org\nswap: 512\n"
            "lxc.apparmor.profile: unconfined\n\n"
            "[pve:pending]\ncores: 6\ndelete: swap,!searchdomain\n\n"
            "[backup_20241224]\ncores: 2\nsnaptime: 1795461031\nmemory: 2048\n\n"
            "[second]\n#line one\n#line two\n"
            "cores: 2\nparent: backup_20241224\nsnaptime: 1795461171\n",
    }[name]


def test_a_configuration_file_is_read_with_its_pending_changes_and_snapshots():
    conf = module.parse_config(transcript("conf"))
    assert (conf.current["cores"], conf.current["swap"]) == ("4", "512")
    assert conf.values == {
        "arch": "amd64", "cores": "6", "hostname": "web-01", "memory": "4096", "parent": "second",
        "rootfs": "local-lvm:vm-504-disk-0,size=8G", "description": "first line\nsecond: line"}
    assert module.snapshots_of(conf) == [
        {"name": "backup_20241224", "timestamp": "2026-11-23T19:10:31Z", "description": None,
         "parent": None, "state": None},
        {"name": "second", "timestamp": "2026-11-23T19:12:51Z",
         "description": "line one\nline two", "parent": "backup_20241224", "state": None}]


def test_the_section_of_pending_changes_may_be_in_capitals_and_a_special_one_is_no_snapshot():
    """PVE::LXC::Config, parse_pct_config, looks for [pve:pending] so; a snapshot's name has no
    colon."""
    assert module.parse_config("cores: 4\n\n[PVE:PENDING]\ncores: 6\n\n[special:fleecing]\n"
                               "cores: 9\n\n[s1]\ncores: 2\n") == (
        {"cores": "6"}, {"cores": "4"}, {"s1": {"cores": "2"}})


def test_what_somebody_has_written_by_hand_counts_as_it_does_for_proxmox():
    """A key with nothing behind its colon is passed over; what is deleted counts after what is set
    (PVE::LXC::Config, parse_pct_config; PVE::AbstractConfig, load_current_config). There are no
    other mount points than mp0 to mp255."""
    conf = module.parse_config(
        "cores: 2\nmemory: 1024\nmemory:\nmp01: a:b,mp=/x\nmp256: a:b,mp=/x\nmp0:\ntags: \n"
        "net0: bridge=vmbr0,ip=192.0.2.4/24\nnet0:\n[pve:pending]\ncores: 8\ndelete: cores\n")
    assert conf == (
        {"memory": "1024", "mp01": "a:b,mp=/x", "mp256": "a:b,mp=/x", "tags": "",
         "net0": "bridge=vmbr0,ip=192.0.2.4/24"}, {"cores": "2", **conf.values}, {})
    assert module.static_addresses(conf.values) == [("vmbr0", None, "192.0.2.4")]
    assert module.mount_points(conf.values) == []


def test_a_description_that_an_older_proxmox_wrote_as_a_key_is_read_as_such():
    conf = module.parse_config("description: f%C3%BCr web\ncores: 2\n\n[s1]\n"
                               "description: before%0Aupdate \nsnaptime: 1\n")
    assert conf == ({"cores": "2", "description": "für web"},
                    {"cores": "2", "description": "für web"},
                    {"s1": {"description": "before\nupdate", "snaptime": "1"}})


@pytest.mark.parametrize("zone, hours", [
    ("UTC", 0), ("Europe/Berlin", -1), ("America/New_York", 5)])
def test_a_snapshot_tree_in_local_time_is_told_in_utc(zone, hours, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        found = module.parse_snapshots(transcript("listsnapshot"))
    finally:
        monkeypatch.undo()
        time.tzset()
    first, second = (module.utc(moment + hours * 3600) for moment in (1795461031, 1795461171))
    assert found == [
        {"name": "backup_20241224", "timestamp": first, "description": None, "parent": None,
         "state": None},
        {"name": "second", "timestamp": second, "description": "line one",
         "parent": "backup_20241224", "state": None}]


def test_a_tree_with_branches_gives_each_snapshot_its_parent():
    tree = ("`-> a    2026-01-01 00:00:00     x\n `-> b   2026-01-02 00:00:00     x\n"
            "  `-> c  2026-01-03 00:00:00     x\n"
            " `-> d   2026-01-04 00:00:00     x\n`-> e    2026-01-05 00:00:00     x\n")
    assert [(row["name"], row["parent"]) for row in module.parse_snapshots(tree)] == [
        ("a", None), ("b", "a"), ("c", "b"), ("d", "a"), ("e", None)]


@pytest.mark.parametrize("text, gigabytes", [
    ("8G", 8), ("512M", 0.5), ("1T", 1024), ("921602G", 921602), ("1073741824", 1), ("1.5G", 1.5),
    ("8GiB", 8), ("512MiB", 0.5), ("8iB", None),
    (None, None), ("", None), ("big", None)])
def test_volume_sizes_are_told_in_gb(text, gigabytes):
    assert module.size_in_gb(text) == gigabytes


def test_an_option_is_found_and_set_by_its_whole_name():
    """A mount point's path may hold what looks like another option."""
    disk = "local-lvm:vm-104-disk-1,mp=/srv/size=1M,size=4G"
    assert (module.option(disk, "size"), module.option(disk, "siz")) == ("4G", None)
    net = "name=eth0,ip=dhcp,ip6=auto"
    assert module.with_option(net, "ip", "192.0.2.5/24") == "name=eth0,ip6=auto,ip=192.0.2.5/24"
    assert module.with_option(net, "ip", None) == "name=eth0,ip6=auto"


def test_static_addresses_are_told_with_their_bridge_and_vlan():
    assert module.static_addresses({
        "net0": "name=eth0,bridge=vmbr0,ip=192.0.2.7/24,ip6=auto,tag=5",
        "net1": "name=eth1,bridge=vmbr1,ip=dhcp,ip6=2001:DB8:0::1/64",
        "net10": "name=eth2,bridge=vmbr0,ip=manual,ip6=dhcp",
        "nets": "name=eth3,bridge=vmbr0,ip=192.0.2.8/24"}) == [
        ("vmbr0", "5", "192.0.2.7"), ("vmbr1", None, "2001:db8::1")]


@pytest.mark.parametrize("written, clustered", [
    ("auto", True), ('"auto"', True), ("off", False), ('"off"', False), ("false", False)])
def test_a_cluster_is_looked_at_or_not(written, clustered):
    assert module.load_settings(
        GOOD_KEY + f"proxmox:\n  cluster: {written}\n").proxmox.cluster is clustered


def test_members_are_read():
    document = """{
"nodename": "pve1",
"version": 21,
"cluster": { "name": "lab", "version": 3, "nodes": 3, "quorate": 1 },
"nodelist": {
  "pve1": { "id": 1, "online": 1, "ip": "192.0.2.1"},
  "pve2": { "id": 2, "online": 0, "ip": "192.0.2.2"},
  "pve3": { "id": 3, "online": 0}
  }
}
"""
    assert module.parse_members(document) == ("pve1", module.Cluster("lab", True, {
        "pve1": module.Node("pve1", True, True, "192.0.2.1"),
        "pve2": module.Node("pve2", False, False, "192.0.2.2"),
        "pve3": module.Node("pve3", False, False, None)}))
    assert module.parse_members(
        document.replace('"quorate": 1', '"quorate": 0'))[1].quorate is False
    alone = module.parse_members(document.replace('"online": 1', '"online": 0'))[1]
    assert [node.online for node in alone.nodes.values()] == [True, False, False], (
        "this node is, whatever corosync says")
    assert module.parse_members('{\n"nodename": "pve",\n"version": 0\n}\n') == ("pve", None)


@pytest.mark.parametrize("document", [
    "", "{", "[]", "null", "7", '""', "{}", '{"ids": []}x', '{"ids": 7}', '{"version": 1',
    '{"version": 1, "ids": null}', '{"version": 1, "ids": [1]}',
    '{"ids": {"104": {"node": "pve1", "type": "lxc"}, "105": null}}'])
def test_a_list_of_guests_that_is_garbled_is_503_and_a_broadcast_is_empty_then(document):
    with pytest.raises(module.Problem) as refusal:
        module.parse_vmlist(document)
    assert (refusal.value.status, refusal.value.error) == (
        503, "Proxmox's file .vmlist cannot be understood")
    assert module.parse_broadcast(document) == module.parse_broadcast(None) == {}


def test_a_host_without_any_guest_has_a_list_without_ids(tmp_path):
    """So pmxcfs writes it (pve-cluster, cfs_create_vmlist_msg)."""
    host = Host(tmp_path / "host")
    assert (host.pve / ".vmlist").read_text() == '{\n"version": 1\n\n}\n'
    api = Daemon(host)
    says = "VM 104 does not exist on node 'proxmox'"
    assert api.get("/resource/vm/list").body == ok("Found 0 containers", [])
    for path in ("status", "config"):
        reply = api.get(f"/resource/vm/{path}?vm_id=104")
        assert (reply.status, reply.body) == (404, error(says))
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 2})
    assert (reply.status, reply.body) == (404, refused(says))
    host.add(104)
    assert api.delete("/clone/delete", {"vm_id": 104}).body == ok("Deleted VM 104")
    assert "ids" not in json.loads((host.pve / ".vmlist").read_text())      # with the last of them
    reply = api.get("/resource/vm/status?vm_id=104")
    assert (reply.status, reply.body) == (404, error(says)) and api.stop() == 0


def test_what_nodes_broadcast_is_read():
    news = module.parse_broadcast(
        "pve2-node/pve-2:864000::1700000000:0.1:48:0.02:0:137438953472:1\n"
        "pve-node-9.0/pve3:1:c:2:3:4\n"
        "pve2.3-vm/204:3600:web-2:running:0:1700000000:2\n"
        "pve-vm-9.0/304:0:x:stopped:0:1700000000:2\n"
        "pve2-storage/pve2/local:1:2:3\nnonsense\n")
    assert set(news) == {("node", "pve-2"), ("node", "pve3"), ("vm", "204"), ("vm", "304")}
    assert news["node", "pve-2"][4:8] == ["48", "0.02", "0", "137438953472"]
    assert module.broadcast_state(news["vm", "204"]) == (None, None), "it is years old"
    recently, ahead = (str(int(time.time()) + seconds) for seconds in (-10, 3600))
    assert module.broadcast_state(["3600", "web-2", "running", "0", recently, "2"]) == (
        "running", 3600)
    assert module.broadcast_state(["3600", "web-2", "running", "0", ahead, "2"]) == (None, None)
    assert (module.broadcast_state(None) == module.broadcast_state(["3600"])
            == module.broadcast_state(["1", "x", "running", "0", "U"]) == (None, None))


def test_of_two_broadcasts_the_later_one_counts():
    """pmxcfs keeps what a container's node said before an upgrade or a migration for five minutes
    more, and in no order (pve-cluster, status.c, rrd_entry_is_old)."""
    lines = ["pve2.3-vm/204:3600:web-2:running:0:1700000000:2\n",
             "pve-vm-9.0/204:0:web-2:stopped:0:1700000090:2\n",
             "pve2-node/pve2:9:c:1700000000:0.1:8:0:0:1024:1\n",
             "pve-node-9.0/pve2:9:c:1700000090:0.1:16:0:0:2048:1\n", "pve2-node/pve3:9\n"]
    for document in ("".join(lines), "".join(lines[::-1])):
        news = module.parse_broadcast(document)
        assert (news["vm", "204"][2], news["node", "pve2"][4], news["node", "pve3"]) == (
            "stopped", "16", ["9"])


@pytest.mark.parametrize("status, first", [
    ("Name:\tinit\nNSpid:\t837\t1\nNSpgid:\t837\t1\n", True),
    ("Name:\tsh\nNSpid:\t899\t12\nNSpgid:\t899\t1\n", False),
    ("NSpid:\t950\t40\t1\n", False),           # of a container inside it
    ("Name:\tNSpid:\t8\t1\nNSpid:\t1\n", False), ("NSpid:\t837\t11\n", False), ("", False),
    (None, False)])
def test_the_init_of_a_container_is_told_by_its_numbers(status, first):
    assert module.is_init(status) == first


ALL = os.cpu_count()


@pytest.mark.parametrize("values, cores, memory, swap, cpus", [
    ({}, None, 512, 0, ALL),
    ({"cores": "4", "memory": "2048", "swap": "512"}, 4, 2048, 512, 4),
    ({"cpulimit": "0"}, None, 512, 0, ALL), ({"cores": "2", "cpulimit": "0"}, 2, 512, 0, 2),
    ({"cores": "0", "memory": "0", "swap": "0"}, None, 512, 0, ALL),
    ({"cpulimit": "1.5"}, None, 512, 0, 1.5), ({"cpulimit": "0.0"}, None, 512, 0, ALL),
    ({"cores": "4.0", "memory": "2048.5", "swap": "x"}, None, None, None, None),
    ({"cores": "-1", "memory": "1e3", "swap": "\u0663"}, None, None, None, None),
    ({"cpulimit": "much", "memory": "9" * 20}, None, None, 0, None),
    ({"cores": "", "memory": "", "swap": ""}, None, 512, 0, ALL),
])
def test_what_is_allotted_has_the_defaults_of_proxmox_or_is_null(
        host, values, cores, memory, swap, cpus):
    host.path(107).write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    proxmox = proxmox_of(host)
    assert (module.allotted(values), module.processors(values)) == ((cores, memory, swap), cpus)
    row, = (row for row in proxmox.list() if row["vm_id"] == 107)
    assert (row["cores"], row["memory"], row["name"]) == (cores, memory, "CT107")
    status = proxmox.status(107)
    assert (status["cpu"], status["memory"], status["swap"]) == (cpus, memory, swap)
    config = proxmox.config(107, 128, 1048576)
    assert (config["cores"], config["memory_mb"], config["swap_mb"]) == (cores, memory, swap)
    gauges = proxmox.gauges()
    assert gauges["lxc_autoscale_container_cpu_cores"].get(one(107)) == cores
    assert gauges["lxc_autoscale_container_memory_limit_bytes"].get(one(107)) == (
        memory and memory * 2**20)


@pytest.mark.parametrize("name", ["1234", "00012", "1e5", "true", "null", "0x10", "1.50"])
def test_a_name_that_looks_like_a_number_is_text(host, name):
    host.add(107, name)
    proxmox = proxmox_of(host)
    assert [row["name"] for row in proxmox.list() if row["vm_id"] == 107] == [name]
    assert proxmox.status(107)["name"] == proxmox.config(107, 128, 1048576)["hostname"] == name
    values = module.parse_status(
        f"name: {name}\nlock: {name}\ntags: {name}\ncpus: 1.5\nmem: 7\nswap: none\nuptime: 0\n")
    assert values == {
        "name": name, "lock": name, "tags": name, "cpus": 1.5, "mem": 7, "swap": None, "uptime": 0}


def test_a_snapshot_without_a_time_that_can_be_has_none():
    conf = module.parse_config("[a]\nsnaptime: soon\n[b]\nsnaptime: 1234567890123456789\n"
                               "[c]\nsnaptime: 1795461031\n")
    assert [(row["name"], row["timestamp"]) for row in module.snapshots_of(conf)] == [
        ("a", None), ("b", None), ("c", "2026-11-23T19:10:31Z")]


@pytest.mark.parametrize("values, marks", [
    ({}, (None, False, [])), ({"lock": "", "template": "0", "tags": ""}, (None, False, [])),
    ({"lock": "snapshot-delete", "template": "1", "tags": "a;b"},
     ("snapshot-delete", True, ["a", "b"])),
    ({"template": 1, "tags": "b,a c\td\0e"}, (None, True, ["b", "a", "c", "d", "e"])),
    ({"tags": " ;,x; "}, (None, False, ["x"])),
])
def test_lock_template_and_tags_are_read_as_proxmox_writes_them(values, marks):
    assert module.marks(values) == marks


@pytest.mark.parametrize("text, waited", [
    ("some avg10=2.38 avg60=1.64 avg300=0.43 total=7508914\n"
     "full avg10=1.93 avg60=1.23 avg300=0.31 total=6\n", (2.38, 7.508914)),
    # no line `full`, as before Linux 5.13
    ("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", (0, 0)),
    ("full avg10=1.93 avg60=1.23 avg300=0.31 total=6\n", (None, None)),
    ("some avg10=2.38 avg60=1.64\n", (None, None)),
    ("some avg10=much avg60=1 avg300=1 total=5\n", (None, 5e-6)), ("", (None, None)),
    (None, (None, None))])
def test_pressure_is_read(text, waited):
    assert module.parse_pressure(text) == waited


# What pct fails with

# What pct prints when it fails, by what its caller is told: (status, error): ["command: stderr"],
# or ("command: stderr", stdout). Where error is None, it is the last line of what pct said.
PCT_SAYS = {
    (409, "The container is just starting or stopping; look at its state and try again"): [
        "set: unable to get PID for CT 104 (not running?)",
        "rollback: unable to rollback vm 104: vm is running",
        "rollback: container did not stop",
        "clone: unexpected state change",
        "destroy: container did not stop"],
    (503, "/etc/pve is read-only: the cluster has no quorum; see: pvecm status"): [
        "set: unable to open file '/etc/pve/nodes/pve/lxc/104.conf.tmp.31337' - Permission denied"],
    (503, "Proxmox's cluster file system does not answer; see: systemctl status pve-cluster"): [
        "set: unable to open file '/etc/pve/nodes/pve/lxc/104.conf.tmp.31337' - Transport "
        "endpoint is not connected",
        "set: unable to write '/etc/pve/nodes/pve/lxc/104.conf.tmp.31337' - No space left on "
        "device",
        "set: ipcc_send_rec[1] failed: Transport endpoint is not connected\nUnable to load "
        "access control list: Transport endpoint is not connected",
        "set: ipcc_send_rec[4] failed: Connection reset by peer",
        "set: pve cluster filesystem not online."],
    (409, "Another Proxmox command holds the container; try again when it has ended"): [
        "set: trying to acquire lock...\ncan't lock file '/run/lock/lxc/pve-config-104.lock' "
        "- got timeout"],
    (409, "The storage has too little free space"): [
        "set: can't lock file '/run/lock/lxc/pve-config-104.lock' - can't open file - No "
        "space left on device",
        "resize: Insufficient free space: 1280 extents needed, but only 12 available",
        "resize: error resizing volume '/dev/pve/vm-104-disk-0':   Insufficient free space: "
        "1280 extents needed, but only 12 available",
        ("snapshot: zfs error: cannot create snapshot 'rpool/data/subvol-104-disk-0@a1': out "
         "of space",
         "snapshot create failed: starting cleanup"),
        ("snapshot: lvcreate snapshot 'pve/snap_vm-104-disk-0_a1' error:   Cannot create new "
         "thin volume, free space in thin pool pve/data reached threshold.",
         "snapshot create failed: starting cleanup"),
        ("snapshot: rbd snapshot 'vm-104-disk-0' error: rbd: failed to create snapshot: "
         "(122) Disk quota exceeded",
         "snapshot create failed: starting cleanup"),
        ("clone: clone failed: lvcreate 'pve/vm-105-disk-0' error:   Cannot create new thin "
         "volume, free space in thin pool pve/data reached threshold.",
         "creating a clone of container 104 with ID 105\ncreate full clone of mountpoint "
         "rootfs (local-lvm:vm-104-disk-0)"),
        ("clone: clone failed: not enough free space (1073741824 < 8589934592)",
         "creating a clone of container 104 with ID 105"),
        ("clone: clone failed: command 'rsync --stats -X -A --numeric-ids -aH --whole-file "
         "--sparse --one-file-system --bwlimit=0 /var/lib/lxc/104/.copy-volume-2/ "
         "/var/lib/lxc/104/.copy-volume-1' failed: exit code 11",
         'rsync: [receiver] write failed on "/var/lib/lxc/105/.copy-volume-1/x": No space '
         "left on device (28)")],
    (409, "The container is locked by Proxmox (fstrim); try again when that has ended"): [
        "set: CT is locked (fstrim)"],
    (409, "The container has too many unused volumes; delete some in Proxmox"): [
        "set: Too many unused volumes - please delete them first."],
    (409, "This kind of disk cannot be grown by Proxmox"): [
        "resize: can't resize this image format",
        "resize: cannot resize subvolume - btrfs quotas are currently not supported",
        "resize: unable to parse volume ID '/srv/ct/104'"],
    (503, "The storage is not reachable now"): [
        "resize: storage 'nas' is not online",
        "clone: storage 'nas' is not online",
        "destroy: storage 'nas' is not online",
        "destroy: error during cfs-locked 'storage-nas' operation: storage 'nas' is not online"],
    (409, "The storage cannot be used here"): [
        "resize: storage 'nas' is not available on node 'pve'",
        "resize: storage 'nas' does not exist",
        ("clone: clone failed: content type 'rootdir' is not available or configured on "
         "storage 'local'",
         "creating a clone of container 104 with ID 105")],
    (409, "The container's volume is missing on its storage"): [
        "resize: Could not determine current size of volume 'local-zfs:subvol-104-disk-0'",
        "resize: no such logical volume pve/vm-104-disk-0",
        "resize: rbd error: rbd: error opening image vm-104-disk-0: (2) No such file or directory",
        "start: volume 'BigNas:100/vm-100-disk-0.raw' does not exist"],
    (500, None): [
        "resize: got timeout",
        "rollback: startup for container '104' failed",
        "clone: clone failed: unsupported Ubuntu version '26.04'",
        "clone: clone failed: cannot mount subvol snapshots for storage type 'btrfs'",
        "start: command 'systemctl start pve-container@105' failed: exit code 1",
        "start: bridge 'vmbr1' does not exist",
        "list: Can't locate PVE/LXC/Create.pm in @INC (you may need to install the "
        "PVE::LXC::Create module)\nBEGIN failed--compilation aborted at /usr/sbin/pct line 8.",
        "start: explicitly configured lxc.apparmor.profile overrides the following settings: "
        "features:nesting\nstartup for container '105' failed",
        "snapshot: missing snapshot lock",
        "start: Quotas are not supported by unprivileged containers."],
    (503, "The storage is busy with another Proxmox command; try again"): [
        "resize: cfs-lock 'storage-ceph' error: got lock request timeout",
        "clone: clone failed: 'storage-thin-pool'-locked command timed out - aborting",
        "clone: clone failed: cfs-lock 'storage-x' error: got lock request timeout"],
    (409, "The container's storage (or a bind mount) cannot take snapshots"): [
        "snapshot: snapshot feature is not available"],
    (409, "This kind of disk has no snapshots"): [
        "snapshot: can't snapshot this image format",
        "rollback: can't rollback snapshot this image format"],
    (409, "The volume or snapshot is in use (a backup, a replication, a linked clone or a "
          "mount)"): [
        "delsnapshot: zfs error: cannot destroy 'rpool/data/subvol-104-disk-0@a1': snapshot "
        "has dependent clones use '-R' to destroy the following datasets: "
        "rpool/data/subvol-105-disk-0",
        "delsnapshot: rbd snap rm error: rbd: snapshot 'a1' is protected from removal.",
        "destroy: base volume 'base-104-disk-0' is still in use by linked clones",
        "destroy: zfs error: cannot destroy 'rpool/data/subvol-104-disk-0': dataset is busy",
        "destroy: rbd snap purge 'vm-100-disk-1' error: Removing all snapshots: 0% "
        "complete...failed."],
    (409, "The snapshot is in the configuration but no longer on the storage"): [
        "delsnapshot: zfs error: could not find any snapshots to destroy; check snapshot names.",
        "rollback: can't rollback, snapshot 'a1' does not exist on 'local-zfs:subvol-104-disk-0'"],
    (409, "A replication runs or needs this snapshot; try again after it"): [
        "delsnapshot: snapshot 'a1' needed by replication job '104-0' - run replication first"],
    (409, "The container is a template"): [
        "delsnapshot: you can't delete a snapshot if vm is a template",
        "rollback: you can't rollback if vm is a template",
        "start: you can't start a CT if it's a template"],
    (409, "Proxmox cannot clone a container with a bind mount (mp0)"): [
        "clone: unable to clone mountpoint 'mp0' (type bind)"],
    (409, "Proxmox cannot clone a container with a device mount (mp1)"): [
        "clone: unable to clone mountpoint 'mp1' (type device)"],
    (409, "The volume 'local:104/vm-104-disk-0.raw' cannot be cloned as a linked clone"): [
        "clone: Linked clone feature for 'local:104/vm-104-disk-0.raw' is not available"],
    (503, "The Proxmox cluster has no quorum, so nothing can be changed"): [
        "clone: cluster not ready - no quorum?"],
    (409, "The container is protected (protection: 1); lift that in Proxmox first"): [
        "destroy: can't remove CT 104 - protection mode enabled"],
    (409, "The container is under Proxmox HA; remove it there first"): [
        "destroy: unable to remove CT 104 - used in HA resources and purge parameter not set."],
    (404, "VM 104 does not exist on node 'pve'"): [
        "status: Configuration file 'nodes/pve/lxc/104.conf' does not exist",
        "config: Configuration file 'nodes/pve/lxc/104.conf' does not exist"],
    (409, "The container is locked by Proxmox (disk); try again when that has ended"): [
        "clone: CT is locked (disk)"],
    (409, "The container is locked by Proxmox (create); try again when that has ended"): [
        "clone: clone failed: CT is locked (create)"],
    (409, "Newer snapshots exist on the storage; it can go back to the newest one only: "
          "delete those first"): [
        "rollback: can't rollback, 'a1' is not most recent snapshot on "
        "'local-zfs:subvol-104-disk-0'"],
    (409, "That snapshot is incomplete (delete); delete it"): [
        "rollback: unable to rollback to incomplete snapshot (snapstate = delete)"],
    (409, "The storage already has something of that name, which Proxmox does not list"): [
        ("snapshot: rbd snapshot 'vm-104-disk-0' error: rbd: failed to create snapshot: (17) "
         "File exists",
         "snapshot create failed: starting cleanup")],
    (409, "Proxmox could not apply memory to the running container: trying to change memory "
          "cgroup values: container not running"): [
        "set: 400 Parameter verification failed.\nmemory: unable to hotplug memory: trying to "
        "change memory cgroup values: container not running\npct set <vmid> [OPTIONS]"],
}

# More texts of the same kinds: each after the source that has it, in the repositories of Proxmox
# (pve-container, pve-guest-common, pve-storage, pve-cluster, pve-common) or of the tool.
RELATIVES = {
    (503, "The node has no room on its own disk for the log of a task"): [
        ("UPID", "start: unable to create file '/var/log/pve/tasks/B/UPID:pve:0001:0002:6:vzstart:"
                 "104:root@pam:' - No space left on device"),
        ("Tools 8.0", "start: unable to create output file '/var/log/pve/tasks/B/UPID:pve:0001:"
                      "0002:6:vzstart:104:root@pam:' - Disk quota exceeded")],
    (503, "The node cannot start a process for a task now"): [
        ("RESTEnvironment", "start: unable to fork worker - Cannot allocate memory at "
                            "/usr/share/perl5/PVE/RESTEnvironment.pm line 542.")],
    (404, "VM 105 does not exist on node 'pve2'"): [
        ("AbstractConfig",
         "snapshot: Configuration file 'nodes/pve2/lxc/105.conf' does not exist")],
    (404, "Snapshot 'nosuch' does not exist"): [
        ("AbstractConfig", "rollback: snapshot 'nosuch' does not exist"),
        ("API2/LXC", "clone: snapshot 'nosuch' does not exist")],
    (404, "Node 'nosuch' does not exist"): [
        ("Cluster", "get: no such cluster node 'nosuch'"),
        ("pvesh", "get: hostname lookup 'nosuch' failed - failed to get address info for: nosuch: "
                  "Name or service not known")],
    (400, "Invalid snapshot_name: Proxmox reserves the name 'vzdump'"): [
        ("API2/LXC/Snapshot", "snapshot: unable to use snapshot name 'vzdump' (reserved name)")],
    (400, "Invalid storage: a linked clone stays on its template's; ask for a full one"): [
        ("API2/LXC", "clone: parameter 'storage' not allowed for linked clones")],
    (503, "/etc/pve is read-only: the cluster has no quorum; see: pvecm status"): [
        ("File", "set: closing file '/etc/pve/nodes/pve/lxc/104.conf.tmp.9' failed - "
                 "Permission denied"),
        # as pmxcfs 9.1.6 said in a real cluster of three, of which two were cut off meanwhile
        ("Tools", "set: unable to open file '/etc/pve/nodes/pve/lxc/104.conf.tmp.9' - "
                  "Operation not permitted"),
        ("File", "set: close (rename) atomic file '/etc/pve/nodes/pve/lxc/104.conf' failed: "
                 "Permission denied"),
        ("AbstractConfig", "destroy: failed to remove config file: Permission denied")],
    (503, "Proxmox's cluster file system does not answer; see: systemctl status pve-cluster"): [
        ("Cluster", "list: ipcc_send_rec[1] failed: Connection refused"),
        ("Cluster", "list: pve configuration filesystem (pmxcfs) not mounted"),
        ("Cluster", "resize: cfs-lock 'storage-nas' error: pve cluster filesystem not online."),
        ("File", "set: closing file '/etc/pve/nodes/pve/lxc/104.conf.tmp.9' failed - "
                 "Input/output error")],
    (503, "The Proxmox cluster has no quorum, so nothing can be changed"): [
        ("Cluster", "clone: clone failed: cfs-lock 'storage-nas' error: no quorum!"),
        ("Cluster 6.0", "resize: error during cfs-locked 'storage-nas' operation: no quorum!"),
        ("API2/LXC", "clone: unable to create CT 105 - cluster not ready - no quorum?")],
    (409, "The storage has too little free space"): [
        ("Plugin", "clone: clone failed: unable to create subvol "
                   "'/srv/images/105/subvol-105-disk-0.subvol' - No space left on device"),
        ("BTRFSPlugin", "clone: clone failed: failed to set file size for '/srv/x/disk.raw' - "
                        "No space left on device"),
        ("LXC", "clone: clone failed: failed to create directory /var/lib/lxc/105: "
                "No space left on device"),
        ("File", "start: unable to write '/var/lib/lxc/104/config.tmp.9' - Disk quota exceeded"),
        ("File", "start: closing file '/var/lib/lxc/104/config.tmp.9' failed - No space left on "
                 "device"),
        ("Plugin", "delsnapshot: rename '/srv/images/104/snap-a1-x.qcow2' to "
                   "'/srv/images/104/x.qcow2' failed - No space left on device"),
        ("BTRFSPlugin, btrfs-progs subvolume.c",
         "snapshot: command 'btrfs subvolume snapshot -r -- /srv/x /srv/x@a1' failed: "
         "ERROR: cannot snapshot '/srv/x': No space left on device"),
        ("RBDPlugin", "resize: rbd resize 'vm-104-disk-0' error: rbd: resize error: (28) "
                      "No space left on device"),
        ("Common", "clone: clone failed: unable to create image: qemu-img: /srv/105/disk.raw: "
                   "Could not resize file: No space left on device"),
        ("lvm2 lv_manip.c", "clone: clone failed: lvcreate 'pve/vm-105-disk-0' error:   Volume "
                            'group "pve" has insufficient free space (12 extents): 1280 required.'),
        ("lvm2 lv_manip.c", "resize: error resizing volume '/dev/pve/vm-104-disk-0':   "
                            "Insufficient suitable allocatable extents for logical volume x: "
                            "5 more required"),
        ("libzfs_dataset.c", "resize: zfs error: cannot set property for "
                             "'rpool/data/vm-104-disk-0': size is greater than available space"),
        ("libzfs_util.c", "clone: clone failed: zfs error: cannot create "
                          "'rpool/data/vm-105-disk-0': out of space"),
        ("mke2fs.c", "clone: clone failed: command 'mkfs.ext4 -O mmp /dev/x' failed: exit code 1",
         "mkfs.ext4: No space left on device while writing out and closing file system"),
        ("lvm2 lv_manip.c", "clone: clone failed: command '/sbin/lvcreate x' failed: exit code 5",
         '  Volume group "pve" has insufficient free space (12 extents): 1280 required.')],
    (503, "The storage is busy with another Proxmox command; try again"): [
        ("Cluster 6.0", "clone: error during cfs-locked 'storage-nas' operation: got lock timeout "
                        "- aborting command"),
        ("Tools",
         "destroy: can't lock file '/var/lock/pve-manager/pve-storage-local' - got timeout")],
    (503, "Proxmox is busy with another command; try again"): [
        ("Cluster", "destroy: cfs-lock 'file-user_cfg' error: got lock request timeout"),
        ("Cluster 6.0", "destroy: error during cfs-locked 'file-user_cfg' operation: got lock "
                        "timeout - aborting command"),
        ("Cluster", "destroy: 'domain-ha'-locked command timed out - aborting")],
    **{(409, f"The container is locked by Proxmox ({lock}); try again when that has ended"): [
        ("AbstractConfig", f"set: CT is locked ({lock})")]
       for lock in ("backup", "migrate", "mounted")},
    **{(409, f"The container is locked by Proxmox ({lock}); try again when that has ended, or, "
             "if no task of it runs, end it on its node with: pct unlock 104"): [
        ("AbstractConfig", f"set: CT is locked ({lock})")]
       for lock in ("snapshot", "snapshot-delete", "rollback", "create", "destroyed")},
    (409, "Another Proxmox command holds the container; try again when it has ended"): [
        ("Tools", "set: can't lock file '/run/lock/lxc/pve-config-104.lock' - can't acquire lock "
                  "'/run/lock/lxc/pve-config-104.lock' - Interrupted system call")],
    (409, "A replication runs or needs this snapshot; try again after it"): [
        ("API2/LXC/Snapshot", "delsnapshot: Failed to obtain guest migration lock - replication "
                              "running?")],
    (409, "The container is replicated; remove the replication job first"): [
        ("ReplicationConfig", "destroy: There is a replication job '104-0' for guest '104' - "
                              "Please remove that first.")],
    (409, "Snapshot 'a1' exists already"): [
        ("AbstractConfig", "snapshot: snapshot name 'a1' already used")],
    (409, "The id 105 is taken"): [
        ("Cluster", "clone: unable to create CT 105 - CT 105 already exists on node 'pve'"),
        ("Cluster", "clone: unable to create CT 105 - VM 105 already exists on node 'pve'"),
        ("Cluster", "clone: CT 105 already exists on node 'pve'")],
    (409, "VM 104 is not running"): [
        ("API2/LXC/Status", "stop: CT 104 not running"),
        ("API2/LXC/Status", "reboot: VM 104 not running")],
    (409, "VM 104 is already running"): [("API2/LXC/Status", "start: CT 104 already running")],
    (409, "VM 104 is running"): [
        ("API2/LXC", "destroy: unable to destroy CT 104 - container is running")],
    (409, "The container is just starting or stopping; look at its state and try again"): [
        ("CGroup", "snapshot: trying to freeze container: container not running"),
        ("LXC", "set: failed to open /proc/837 pid fd"),
        ("LXC", "stop: failed to open container 104's command socket: Connection reset by peer"),
        ("LXC", "clone: clone failed: unable to get PID for CT 104 (not running?)"),
        ("LXC", "start: unable to get PID for CT 104 (not running?)",
         "problem with monitor socket, but continuing anyway: got timeout")],
    (409, "The container is a template"): [
        ("AbstractConfig", "snapshot: you can't take a snapshot if it's a template")],
    (409, "The container runs, and its storage can clone it from a snapshot only"): [
        ("API2/LXC", "clone: Full clone of a running container is only possible from a snapshot"),
        ("API2/LXC 4.0", "clone: Cannot do full clones on a running container without snapshots")],
    (409, "A disk cannot shrink"): [("API2/LXC", "resize: unable to shrink disk size")],
    (409, "The disk has this size already"): [
        ("API2/LXC", "resize: disk is already at specified size")],
    (409, "The disk belongs to container 105"): [
        ("API2/LXC", "resize: can't resize mount point owned by another container (105) at "
                     "/usr/share/perl5/PVE/API2/LXC.pm line 2386.")],
    (409, "This kind of disk cannot be grown by Proxmox"): [
        ("Storage", "resize: resize file/device '/dev/sdb1' is not possible"),
        ("ISCSIDirectPlugin", "resize: volume resize is not possible on iscsi device"),
        ("API2/LXC 4.0", "resize: can't resize volume: rootfs if snapshot exists")],
    (409, "This kind of disk has no snapshots"): [
        ("Plugin", "delsnapshot: can't delete snapshot for this image format"),
        ("LVMPlugin", "snapshot: can't snapshot 'raw' volume"),
        ("LVMPlugin", "rollback: can't rollback snapshot for 'raw' volume"),
        ("LVMPlugin",
         "snapshot: snapshot is working with qcow2 format only at LVMPlugin.pm line 567."),
        ("ISCSIPlugin", "snapshot: snapshot is not possible on iscsi storage"),
        ("ISCSIDirectPlugin", "snapshot: volume snapshot is not possible on iscsi device"),
        ("ISCSIDirectPlugin", "rollback: volume snapshot rollback is not possible on iscsi device"),
        ("ISCSIDirectPlugin",
         "delsnapshot: volume snapshot delete is not possible on iscsi device"),
        ("Storage", "snapshot: snapshot file/device '/dev/sdb1' is not possible"),
        ("Storage", "rollback: snapshot rollback file/device '/dev/sdb1' is not possible"),
        ("Storage", "delsnapshot: snapshot delete file/device '/dev/sdb1' is not possible")],
    (409, "That snapshot is incomplete (prepare); delete it"): [
        ("AbstractConfig", "rollback: unable to rollback to incomplete snapshot "
                           "(snapstate = prepare)")],
    (409, "Newer snapshots exist on the storage; it can go back to the newest one only: "
          "delete those first"): [
        ("LVMPlugin",
         "rollback: can't rollback, 'a1' is not most recent snapshot on 'vm-104-disk-0'"),
        ("libzfs, zfs_main.c", "rollback: zfs error: cannot rollback to 'rpool/data/x@a1': more "
                               "recent snapshots or bookmarks exist")],
    (409, "The snapshot is in the configuration but no longer on the storage"): [
        ("Plugin", "rollback: can't rollback, snapshot 'a1' does not exist on 'vm-104-disk-0'"),
        ("LvmThinPlugin", "clone: clone failed: no such logical volume pve/snap_vm-104-disk-0_a1"),
        ("lvm2 toollib.c", "delsnapshot: lvremove snapshot 'pve/snap_vm-104-disk-0_a1' error:   "
                           'Failed to find logical volume "pve/snap_vm-104-disk-0_a1"'),
        ("rbd Snap.cc", "delsnapshot: rbd snapshot 'vm-104-disk-0' error: rbd: failed to remove "
                        "snapshot: (2) No such file or directory"),
        ("lvm2 lvcreate.c", "rollback: lvm rollback 'pve/snap_vm-104-disk-0_a1' error:   Snapshot "
                            "origin LV snap_vm-104-disk-0_a1 not found in Volume group pve."),
        ("libzfs_dataset.c", "clone: clone failed: zfs error: cannot open 'rpool/x@a1': dataset "
                             "does not exist")],
    (409, "The container's volume is missing on its storage"): [
        ("LvmThinPlugin", "start: no such logical volume pve/base-104-disk-0"),
        ("Plugin",
         "delsnapshot: volume /srv/images/104/x.qcow2 is missing at Plugin.pm line 1499."),
        ("Plugin", "clone: clone failed: volume 'local:104/vm-104-disk-0.raw' does not exist"),
        ("libzfs_dataset.c", "resize: zfs error: cannot open 'rpool/data/subvol-104-disk-0': "
                             "dataset does not exist"),
        ("lvm2 toollib.c", "resize: can't get size of '/dev/pve/vm-104-disk-0':   Failed to find "
                           'logical volume "pve/vm-104-disk-0"')],
    (409, "The volume or snapshot is in use (a backup, a replication, a linked clone or a "
          "mount)"): [
        ("Storage", "clone: clone failed: volume deactivation failed: local-lvm:vm-104-disk-0"),
        ("lvm2 activate.c", "destroy: lvremove 'pve/vm-104-disk-0' error:   Logical volume "
                            "pve/vm-104-disk-0 in use."),
        ("lvm2 activate.c", "destroy: lvremove 'pve/vm-104-disk-0' error:   Logical volume "
                            "pve/vm-104-disk-0 contains a filesystem in use."),
        ("lvm2 activate.c", "destroy: lvremove 'pve/vm-104-disk-0' error:   Logical volume "
                            "pve/vm-104-disk-0 is used by another device."),
        ("libzfs_util.c",
         "rollback: zfs error: cannot unmount '/rpool/x': pool or dataset is busy"),
        ("libzfs_dataset.c", "delsnapshot: zfs error: cannot destroy snapshot "
                             "rpool/data/subvol-104-disk-0@a1: dataset is busy"),
        ("libzfs_dataset.c", "delsnapshot: zfs error: cannot destroy snapshot "
                             "rpool/data/basevol-104-disk-0@a1: snapshot is cloned"),
        ("zfs_main.c",
         "destroy: zfs error: cannot destroy 'rpool/x': filesystem has dependent clones"),
        ("zfs_main.c", "destroy: zfs error: cannot destroy 'rpool/x': volume has dependent clones"),
        ("zfs_main.c", "destroy: zfs error: cannot destroy 'rpool/x': filesystem has children"),
        ("rbd Remove.cc", "destroy: rbd rm 'vm-104-disk-0' error: rbd: error: image still has "
                          "watchers"),
        ("rbd Remove.cc", "destroy: rbd rm 'vm-104-disk-0' error: rbd: image has snapshots - these "
                          "must be deleted with 'rbd snap purge' before the image can be removed."),
        ("rbd Snap.cc", "destroy: rbd unprotect vm-104-disk-0 snap '__base__' error: rbd: "
                        "unprotecting snap failed: (16) Device or resource busy"),
        ("umount", "clone: clone failed: command 'umount -d /x' failed: exit code 32",
         "umount: /var/lib/lxc/104/.copy-volume-1: target is busy."),
        ("lvm2 activate.c", "rollback: command '/sbin/lvremove -f x' failed: exit code 5",
         "  Logical volume pve/vm-104-disk-0 in use.")],
    (409, "The storage already has something of that name, which Proxmox does not list"): [
        ("Plugin", "clone: clone failed: disk image '/srv/images/105/x.raw' already exists"),
        ("lvm2 lv_manip.c", "snapshot: lvcreate snapshot 'pve/snap_x_a1' error:   Logical Volume "
                            '"snap_x_a1" already exists in volume group "pve"'),
        ("zfs_main.c", "snapshot: zfs error: cannot create snapshot 'rpool/x@a1': dataset already "
                       "exists")],
    (409, "The storage cannot be used here"): [
        ("Storage", "start: storage 'nas' is disabled"),
        ("Storage", "start: unable to use volume nas:iso/x - content type needs to be 'images'"),
        ("ISCSIPlugin", "start: error: no iscsi support - please install open-iscsi"),
        ("rbd Utils.cc",
         "start: rbd error: rbd: error opening pool 'x': (2) No such file or directory"),
        ("lvm2 toollib.c",
         "start: can't activate LV '/dev/pve/x':   Volume group \"pve\" not found"),
        ("API2/LXC", "clone: storage 'local' does not support CT rootdirs"),
        ("LXC", "start: storage 'iso' does not support containers"),
        ("Config", "set: storage 'nas' does not allow content type 'rootdir' (Container)"),
        ("LVMPlugin", "clone: clone failed: no such volume group 'pve'"),
        ("LvmThinPlugin", "resize: no such logical volume pve/data"),
        ("ISCSIPlugin", "clone: clone failed: can't allocate space in iscsi storage"),
        ("CIFSPlugin", "start: connection check for storage 'nas' failed - session setup failed: "
                       "NT_STATUS_LOGON_FAILURE"),
        ("NFSPlugin", "start: mount error: mount.nfs: access denied by server while mounting x:/y"),
        ("ZFSPoolPlugin", "start: could not activate storage 'tank', zfs error: cannot import "
                          "'tank': no such pool available"),
        ("libzfs_pool.c", "start: zfs error: cannot open 'tank': no such pool")],
    (503, "The storage is not reachable now"): [
        ("Storage", "start: connection check for storage 'nas' failed - got timeout"),
        ("Plugin", "snapshot: unable to activate storage 'nas' - directory '/mnt/pve/nas' does not "
                   "exist or is unreachable"),
        ("DirPlugin", "start: unable to activate storage 'usb' - directory is expected to be a "
                      "mount point but is not mounted: '/mnt/usb'"),
        ("NFSPlugin", "start: mount error: mount.nfs: Connection timed out"),
        ("rbd.cc", "resize: rbd error: rbd: couldn't connect to the cluster!")],
    (409, "Proxmox could not apply cpulimit to the container: no such thing"): [
        ("Config", "set: 400 Parameter verification failed.\n"
                   "cpulimit: unable to apply pending change cpulimit : no such thing\npct set")],
    (400, "Invalid cores: value must have a maximum value of 8192"): [
        ("JSONSchema", "set: 400 Parameter verification failed.\n"
                       "cores: value must have a maximum value of 8192\npct set <vmid> [OPTIONS]")],
    (400, "Invalid snapshot_name: Proxmox takes 2 to 40 characters: a letter, then letters, "
          "digits, _ and -"): [
        ("JSONSchema", "snapshot: 400 Parameter verification failed.\nsnapname: invalid format - "
                       "invalid configuration ID 'x'\n\npct snapshot <vmid> <snapname> [OPTIONS]")],
    (400, "Invalid new_vm_name: Proxmox takes a DNS name: labels of letters, digits and inner "
          "hyphens, joined by dots"): [
        ("JSONSchema", "clone: 400 Parameter verification failed.\nhostname: invalid format - "
                       "value does not look like a valid DNS name\n\n"
                       "pct clone <vmid> <newid> [OPTIONS]")],
    (500, "The daemon must run as root"): [("RESTEnvironment", "set: please run as root")],
}

# Words that mean something else here: names, places, notes. The last line is told as it is.
UNRELATED = [
    "set: something new",
    "clone: clone failed: command 'cp /srv/you can't take a snapshot if it's a template' failed: 1",
    "clone: clone failed: unsupported version 'cluster not ready - no quorum?'",
    "start: hookscript error for 104 on pre-start: CT is locked (backup)",
    "start: script 'local:snippets/x' does not exist",
    "start: directory '/srv/storage 'nas' does not exist",
    "start: bridge 'storage 'nas' is not online' does not exist",
    "set: unable to open file '/tmp/x - No space left on device' - Permission denied",
    "set: can't lock file '/run/lock/lxc/pve-config-104.lock' - can't open file - "
    "Permission denied",
    "destroy: encountered invalid lock, expected 'CT is locked (snapshot)'",
    "start: vm 104 - unable to parse config: x failed: no quorum!",
    "set: storage 'nas' is not online\ngot timeout",
    ("clone: clone failed: command 'rsync x' failed: exit code 23",
     'rsync: [sender] send_files failed to open "/x/you can\'t do that if it\'s a template": '
     "Permission denied (13)\nyou can't start a CT if it's a template\n"
     'rsync: [receiver] mkstemp "/x/a: No space left on device (28)" failed: '
     "Permission denied (13)\n"
     "file: No space left on device\nstorage 'nas' is not online\nCT is locked (backup)"),
    ("destroy: got timeout", "zero out finished (note: 'No space left on device' is ok here): x"),
]


def flat(table, first=0):
    """The rows of one of the tables above, from their part `first` on."""
    return [(row if isinstance(row, str) else row[first:], status, says)
            for (status, says), rows in table.items() for row in rows]


@pytest.mark.parametrize("row, status, says", [
    *flat(PCT_SAYS), *flat(RELATIVES, first=1), *((row, 500, None) for row in UNRELATED)])
def test_each_text_of_pct_has_its_status_and_sentence(row, status, says):
    said, *stdout = (row,) if isinstance(row, str) else row
    (command, _, stderr), stdout = said.partition(": "), "".join(stdout)
    result = module.Result(255, stdout, stderr + "\n", False)
    problem = module.explain_failure(["pct", command, "104"], result)
    last = stderr.splitlines()[-1]
    assert (problem.status, problem.error) == (status, says or f"pct {command} 104 failed: {last}")
    assert problem.headers == ({"Retry-After": "30"} if status == 503 else {})
    assert problem.fields == {"details": f"{stdout.strip()}\n{stderr}".strip()}


def test_what_pct_does_not_say_is_told_by_its_exit_status():
    def told(code, stdout="", stderr="", argv=("pct", "list")):
        problem = module.explain_failure(argv, module.Result(code, stdout, stderr, False))
        return problem.status, problem.error
    assert told(255) == (500, "pct list failed with exit status 255")
    assert told(255, " \n", "\n \n") == (500, "pct list failed with exit status 255")
    assert told(-9, "x") == (500, "pct list was ended by SIGKILL")
    assert told(255, "one\ntwo\n") == (500, "pct list failed: two")
    assert told(
        0, "  Size is too big\n", "error resizing volume 'x':   Insufficient free space: 1\n",
        ("pct", "resize", "104")) == (409, "The storage has too little free space")


@pytest.mark.parametrize("piece", [
    "unable to ", "clone failed: ", "can't ", "'", "rsync: ", "cannot x '", "a ", "/etc/pve/'",
    "\n",
    "a\n", ": ", " - ", "unable to write '/etc/pve/'", "rbd: (", "x error: ", "volume "])
def test_the_time_to_explain_a_failure_is_bounded(piece):
    """A pattern that backtracks would take minutes for this."""
    started = time.perf_counter()
    for head in ("", "rsync: ", "unable to ", "cannot x 'y': ", "mount error: "):
        text = head + piece * (131072 // len(piece))
        module.explain_failure(["pct", "clone", "104"], module.Result(255, text, text, False))
    assert time.perf_counter() - started < 5


# Time in proportion to length

NOTES = [" ", "\t", '"', "'", "\\", ",", "[", "]", "{", ":", ";", "=", "%", "#", "-", "/",
         "0", "1", "x", "E", "\x01", "\x80", "\r", "\n",
         " \t", " x", "a, ", "''", '\\"', "1,", "1:", " #", ": ", "a:\r\n", "a: x\n", "%41"]


def request_with(body=b"{}", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return module.Request("POST", "/scale/cores", "", headers, len(body), lambda: body, None)


def log_line(line):
    log, file = module.LogFile(), module.SimpleNamespace(path=os.devnull, fd=None, torn=False)
    log.keys = [KEY, "x" * 15 + "y", "1" * 16]
    assert log.write(file, [line]) == 0
    os.close(file.fd)


def failed(text):
    return module.Result(255, "", text, False)


# what is read, by what, what may stand before the filling, fillings of its own,
# what may stand behind
READERS = [
    ("request line", lambda text: module.parse_request_line(text.encode("latin-1")),
     ["", "GET /", "GET / HTTP/1.", "GET http://", "GET http://[", "GET http://x:"],
     ["/ ", "x:"], ["", " HTTP/1.1"]),
    ("head", lambda text: module.parse_head(text.encode("latin-1"), 1),
     ["", "A:", "Host: x\r\nA: b", "Content-Length:", "Host:", "A"],
     ["Host: x\r\n", "x\x01", "b,"], ["", "\x01"]),
    ("query", module.parse_query, ["", "a="], ["&a=", "%4"], ["", "%"]),
    ("body", lambda text: module.read_object(
        request_with(text.encode(), content_type="application/json")),
     ["", '{"a": ', '{"a": "', '{"a": 1.', '{"a": 1e'],
     ['{"a":', '"a":1,', "[1],", "\\u0041"], ["", "}"]),
    ("content type", lambda text: module.read_object(request_with(content_type=text)),
     ["", "application/json", "application/json;", 'application/json; charset="'],
     [";charset=", "; a=b", '";'], ["", "x"]),
    ("X-Forwarded-For", lambda text: module.client_of(
        {"x-forwarded-for": text}, "127.0.0.1", module.networks(["127.0.0.1", "10.0.0.0/8"])),
     ["", "["], ["10.0.0.1,", "::1,", "1.", "a:"], ["", "x", ",10.0.0.1"]),
    ("path in a log", module.loggable_path, ["", "/"], ["/a"], ["", "?"]),
    ("line in a log", log_line, ["", KEY[:-1]], [KEY, KEY[:-1]], [""]),
    ("settings", module.load_yaml, ["", "a: ", "a: x", "a: [", 'a: "', "a: 1:1"],
     ["a,", "'a',", '"a",', "a   ,", "- 'x'\n", "\\x41", "1_", "a:\n- b\n"], ["", "]"]),
    ("container", module.parse_config, ["", "a:", "a: x", "[", "delete: "],
     ["#x\n", "[a]\n", "a: x \t", "!a,"], ["", "x"]),
    ("state", module.parse_status, ["", "a: ", "mem: 1"], ["a: 1\n"], ["", "x"]),
    ("members", module.parse_members, ["", '{"nodename": ', '{"nodename": "'],
     ['{"a":', "[", "11"], ["", "}"]),
    ("guests", module.parse_vmlist, ["", '{"ids": '], ['{"a":', "[", "11"], ["", "}"]),
    ("broadcast", module.parse_broadcast, ["", "pve2-node/", "pve-vm-9.0/1:", "pve"],
     ["pve-vm/", "pve2-node/x:1\n", "pve2-node/x\n", "pve1.-"], ["", "x"]),
    ("snapshots", module.parse_snapshots,
     ["", "`-> ", "`-> a ", "`-> a 2026-01-01 00:00:00 "],
     ["`-> a\n", "`-> ", " `-> a 2026-01-01 00:00:00 x\n"], ["", "x"]),
    ("traffic", module.parse_net_dev,
     ["", "veth104i0:", "veth104i0: 1 1 1 1 1 1 1 1 1", " veth104i"],
     ["veth104i0:\n", "veth104i", " 1"], ["", "x"]),
    ("pressure", module.parse_pressure,
     ["", "some avg10=", "some avg10=1 avg60=1 avg300=1 total=1"],
     [" total=", "1.", "some avg10=1 "], ["", "\n"]),
    ("marks", lambda text: module.marks({"tags": text}), ["", "a"], [";", "a;", " ,"], ["", "x"]),
    ("option", lambda text: module.option(text, "size"), ["", "x,size="],
     ["size=", ",size", ",size=,"], ["", "x"]),
    ("mount point", lambda text: module.mount_points({"mp0": text}), ["", "a:b,mp="],
     ["mp=", ",mp", ",volume=,", ",size="], ["", "x"]),
    ("size", module.size_in_gb, ["", "1."], [], ["", "G"]),
    ("failure", lambda text: module.explain_failure(["pct", "set", "104"], failed(text)),
     ["", "400 Parameter verification failed.\n", "ipcc_send_rec"],
     [word for rules in (module.FAILURE_RULES, module.REASON_RULES) for pattern, *_ in rules
      for word in re.findall(r"[\w' ]{9,}", pattern)]
     + ["CT is locked (", "CT 1 ", "CT 1", "CT 1 already", "'/"], ["", "x"]),
    ("reply", lambda text: module.parse_reply(text.encode()), ["", "\n", "\n1 1 1"],
     ["\n1 1 1", "1 "], ["", "\n"]),
    ("number", lambda text: module.find_number(r"^file (\d+)", text), ["", "file 1"],
     ["file ", "file x\n"], ["", "x"]),
    ("row", lambda text: module.row_number("file", text), ["", "file 1"],
     ["file ", "file x\n", "\nfile", "file"], ["", "x"]),
    ("disks", module.parse_io, ["", "8:0 rbytes=1"],
     ["8:0", " rbytes=", " rbytes=1", "\n", "rbytes"], ["", "\n"]),
    ("number", module.number, ["", "1", "-1."], [], [""]),
    ("decimal", module.decimal, ["", "1", "-1."], [], [""]),
]
SIZES = (4096, 32768)


@pytest.fixture
def long_numbers():
    """Let int() take time in the square of the digits, as it does in the first releases of Python
    3.9."""
    limit = getattr(sys, "get_int_max_str_digits", lambda: 0)()
    set_limit = getattr(sys, "set_int_max_str_digits", lambda digits: None)
    set_limit(0)
    yield
    set_limit(limit)


def seconds_for(read, text):
    started = time.thread_time()
    with contextlib.suppress(module.Problem, module.ConfigError, ValueError):
        read(text)
    return time.thread_time() - started


def grows_in_proportion(read, short, long):
    """Eight times the text takes eight times as long, and 64 times where each character costs a
    look at all others."""
    def is_straight(first, second):
        return second < max(0.002, 20 * first)
    longest = seconds_for(read, long)
    if is_straight(0, longest) or is_straight(seconds_for(read, short), longest):
        return True
    return is_straight(*(min(seconds_for(read, text) for _ in range(3)) for text in (short, long)))


@pytest.mark.parametrize("read, before, own, behind", [row[1:] for row in READERS],
                         ids=[row[0] for row in READERS])
def test_what_others_write_is_read_in_time_in_proportion_to_its_length(
        read, before, own, behind, long_numbers):
    for start, filling, end in itertools.product(before, NOTES + own, behind):
        texts = [start + filling * ((size - len(start)) // len(filling)) + end for size in SIZES]
        straight = grows_in_proportion(read, *texts)
        assert straight, (start, filling, end)


# Reading

@pytest.fixture
def process():
    """A process with two numbers, as the init of a container is seen by its host, or a skip."""
    flags = ["--pid", "--fork", "--kill-child"] + (
        [] if os.geteuid() == 0 else ["--user", "--map-root-user"])
    outer = subprocess.Popen(["unshare", *flags, "sleep", "100"], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    wait_until(lambda: outer.poll() is not None or children.read_text())
    if outer.poll() is not None:
        pytest.skip("unshare makes no process namespace here")
    yield int(children.read_text())
    outer.kill()
    outer.wait()


def test_a_file_that_comes_in_pages_is_read_to_its_end(tmp_path, monkeypatch):
    """So the kernel hands over its own (Linux, fs/seq_file.c, seq_read_iter)."""
    path, read = tmp_path / "file", os.read
    path.write_text("x" * 10000)
    monkeypatch.setattr(module.os, "read", lambda fd, size: read(fd, min(size, 4096)))
    assert module.read_text(str(path)) == "x" * 10000


@pytest.mark.parametrize("number", [errno.ESRCH, errno.ENODEV, errno.EOPNOTSUPP])
def test_a_file_that_goes_while_it_is_read_is_not_there(tmp_path, monkeypatch, number):
    (tmp_path / "file").write_text("x")

    def fail(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(module.os, "read", fail)
    assert module.read_text(str(tmp_path / "file")) is None


def test_an_init_that_is_no_systemd_is_the_one_that_is_process_1_inside(api, host, process):
    """Its processes are all in ns/cgroup.procs, as those of a busybox are, the init not always
    first."""
    folder = host.cgroup / "lxc/104/ns"
    shutil.rmtree(folder / "init.scope")
    (folder / "cgroup.procs").write_text(f"0\n{os.getpid()}\n{process}\n")
    data = api.get("/resource/vm/status?vm_id=104").body["data"]
    assert 0 <= data["uptime"] < 30 and data["disk_used"] > 0
    assert 0 <= api.get("/resource/vm/list").body["data"][0]["uptime"] < 30
    (folder / "cgroup.procs").write_text(f"{os.getpid()}\n")
    data = api.get("/resource/vm/status?vm_id=104").body["data"]
    assert (data["status"], data["uptime"], data["disk_used"]) == ("running", None, None)


def test_what_no_process_tells_is_not_guessed(host):
    """The files of a busybox (103) and of a systemd (101), as a host had them."""
    proxmox = proxmox_of(host)
    for vm_id, files in ((101, {"init.scope/cgroup.procs": f"{os.getpid()}\n", "cgroup.procs": "",
                                "system.slice/systemd-journald.service/cgroup.procs": "1\n"}),
                         (103, {"cgroup.procs": "999999998\n999999999\n"})):
        host.add(vm_id)
        for name, text in {**{f"ns/{name}": text for name, text in files.items()},
                           "cpu.stat": "usage_usec 1\n"}.items():
            (host.cgroup / f"lxc/{vm_id}/{name}").parent.mkdir(parents=True, exist_ok=True)
            (host.cgroup / f"lxc/{vm_id}/{name}").write_text(text)
    assert tuple(map(proxmox.cgroups.init_pid, (101, 103, 999))) == (
        os.getpid(), None, None)
    rows = {row["vm_id"]: (row["status"], row["uptime"]) for row in proxmox.list()}
    assert rows[103] == ("running", None) and rows[106] == ("stopped", 0)
    assert rows[101][0] == "running" and 0 <= rows[101][1] < 3600
    assert module.process_uptime(999999999) is None
    assert proxmox.read_status(106)["uptime"] == 0


# What a real host (pve-manager 9.2.11) told of itself: pvesh, and files of /proc with the same
# numbers.
TOLD_BY_PVESH = {
    "cpu": 0, "cpuinfo": {"cores": 2, "cpus": 2, "sockets": 1}, "idle": 0, "ksm": {"shared": 0},
    "loadavg": ["3.09", "2.80", "1.88"],
    "memory": {"available": 3552903168, "free": 3543830528, "total": 4112306176, "used": 559403008},
    "pveversion": "pve-manager/9.2.11/14a22df3",
    "rootfs": {"avail": 4547010560, "free": 4885909504, "total": 6249086976, "used": 1363177472},
    "swap": {"free": 1073287168, "total": 1073737728, "used": 450560}, "uptime": 1232, "wait": 0}
TOLD_BY_PROC = {
    "stat": "cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 2 3 4 5 6 7 8 9 10\ncpu1 1 2 3 4 5 6 7 8 9 10\n"
            "intr 1 2\n",
    "loadavg": "3.09 2.80 1.88 2/136 2904\n", "uptime": "1232.99 2000.11\n",
    "meminfo": "MemTotal:        4015924 kB\nMemFree:         3460772 kB\n"
               "MemAvailable:    3469632 kB\nBuffers:           20000 kB\n"
               "Cached:           180000 kB\nSwapCached:            8 kB\n"
               "SwapTotal:       1048572 kB\nSwapFree:        1048132 kB\n",
    "pvecfg.pm": "package PVE::pvecfg;\n\nuse strict;\nuse warnings;\n\n"
                 "sub package {\n    return 'pve-manager';\n}\n\n"
                 "sub version {\n    return '9.2.11';\n}\n\n"
                 "sub release {\n    return '9.2';\n}\n\n"
                 "sub repoid {\n    return '14a22df3';\n}\n\n"
                 "sub version_text {\n    return '9.2.11/14a22df3';\n}\n",
}


def test_proc_tells_of_a_node_what_its_pvesh_tells(launch, host):
    for name, text in TOLD_BY_PROC.items():
        (host.proc / name).write_text(text)
    host.faults(get={"stdout": json.dumps(TOLD_BY_PVESH), "exit": 0})
    disk = Code(
        "lambda path: daemon.SimpleNamespace(f_frsize=4096, f_blocks=1525656, f_bfree=1192849)")
    here = launch(constants={**host.as_node(), "os.statvfs": disk}).get(
        "/resource/node/status?node_name=proxmox").body["data"]
    assert host.calls() == []
    asked = launch(proxmox={"pve_dir": "/nowhere"}).get(
        "/resource/node/status?node_name=other").body["data"]
    assert host.calls() == ["pvesh get /nodes/other/status --output-format json"]
    assert (here.pop("node"), asked.pop("node"), here.pop("cpu_usage"), asked.pop("cpu_usage")) == (
        "proxmox", "other", 0.0, None)
    assert here == asked == {
        "cpu_count": 2, "load_average": [3.09, 2.8, 1.88], "memory_usage": 13.6,
        "memory_total": 3921.8, "memory_used": 533.49, "swap_total": 1024, "swap_used": 0.43,
        "disk_total": 5.82, "disk_used": 1.27, "uptime": 1232, "version": "9.2.11"}


def test_of_a_node_that_proc_says_nothing_of_nothing_is_told(launch, host):
    for name in TOLD_BY_PROC:
        (host.proc / name).write_text("?\n")
    reply = launch(constants=host.as_node()).get("/resource/node/status?node_name=proxmox")
    assert (reply.status, host.calls()) == (200, []) and reply.body["data"] == {
        "node": "proxmox", **dict.fromkeys((
            "cpu_usage", "cpu_count", "load_average", "memory_usage", "memory_total",
            "memory_used", "swap_total", "swap_used", "uptime", "version")),
        "disk_total": 100, "disk_used": 20}


def threads(daemon):
    """The number of threads that are there for requests: not the main one, those that look after
    connections and wait for the next, and three for the logs."""
    return len(os.listdir(f"/proc/{daemon.process.pid}/task")) - 6


def test_a_file_of_proxmox_that_hangs_is_503_and_all_else_works(launch, host):
    os.mkfifo(host.path(110))                       # whoever reads it waits for a writer
    api = launch(proxmox={"read_timeout_seconds": 1}, constants={
        "FILE_SECONDS": 0.3, "MAX_HUNG": 5, "WORKER_SECONDS": 0.2})

    def hangs(path):
        started = time.monotonic()
        reply = api.get(path)
        assert (reply.status, reply.body, reply.headers["Retry-After"]) == (
            503, error(HANGING), "30")
        assert 0.2 < time.monotonic() - started < 1.5
    health, *_ = side_by_side((api.get, "/health/check"), *((hangs, path) for path in (
        "/resource/vm/config?vm_id=110", "/resource/vm/list", "/metrics")))
    for path in ("/resource/vm/config?vm_id=104", "/resource/vm/status?vm_id=104", "/routes"):
        assert api.get(path).status == 200
    # pct list reads that file, too
    assert (health.status, health.body["checks"]["lxc_commands"]) == (503, {
        "ok": False, "detail": "pct list did not finish in 1 s and was ended"})
    assert api.post("/scale/cores", {"vm_id": 106, "cores": 4}).status == 200
    assert api.get("/resource/vm/status?vm_id=110").status == 503
    # the same is not read again, and another not while five hang
    started = time.monotonic()
    assert (api.get("/resource/vm/config?vm_id=110").body == error(HANGING)
            and time.monotonic() - started < 0.2)
    # five hang: the start's look for snapshots, and these four
    started = time.monotonic()
    assert (api.get("/resource/vm/config?vm_id=104").body == error(HANGING)
            and time.monotonic() - started < 0.2)
    pipe = host.path(110).rename(host.root / "pipe")

    def released():
        with contextlib.suppress(OSError):          # nobody reads it just now
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return (api.get("/resource/vm/list").status
                == api.get("/resource/vm/config?vm_id=104").status == 200)
    wait_until(released)
    assert [row["vm_id"] for row in api.get("/resource/vm/list").body["data"]] == [104, 106]
    wait_until(lambda: threads(api) == 0)


def test_a_daemon_whose_host_hangs_stops_all_the_same(launch, host):
    os.mkfifo(host.path(110))
    api = launch(constants={"FILE_SECONDS": 0.3})
    assert api.get("/metrics").status == 503
    started = time.monotonic()
    assert api.stop() == 0 and time.monotonic() - started < 2


def test_a_container_s_disk_that_does_not_answer_is_null(launch, host):
    api = launch(constants={
        "FILE_SECONDS": 0.3, "space": Code("lambda path: daemon.time.sleep(5)")})
    (host.cgroup / "lxc/104/ns/init.scope/cgroup.procs").write_text(f"{os.getpid()}\n")
    reply = api.get("/resource/vm/status?vm_id=104")
    assert (reply.status, reply.body["data"]["disk_used"], reply.body["data"]["memory_used"]) == (
        200, None, 500)


def test_disks_that_hang_do_not_stand_for_the_files_of_proxmox(launch, host):
    api = launch(constants={"FILE_SECONDS": 0.1, "MAX_HUNG": 2, "STOP_SECONDS": 5.1,
                            "space": Code("lambda path: daemon.time.sleep(60)")})
    for pid in (os.getpid(), os.getppid(), 1):
        (host.cgroup / "lxc/104/ns/init.scope/cgroup.procs").write_text(f"{pid}\n")
        assert api.get("/resource/vm/status?vm_id=104").body["data"]["disk_used"] is None
    assert api.get("/resource/vm/config?vm_id=104").status == 200
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 4}).status == 200


def framed(line="GET /routes HTTP/1.1", *headers, body=""):
    return "\r\n".join([line, *headers, "", body]).encode("latin-1")


LOGIN = f"X-API-Key: {KEY}"
JSON_KIND = "Content-Type: application/json"


def test_what_cannot_be_read_is_not_taken_for_what_is_not_there(launch, host):
    import resource
    api = launch(constants={"WORKER_SECONDS": 0.05})
    with api.connect() as sock:
        sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
        assert read_answer(sock).status == 200
        wait_until(lambda: threads(api) == 1)       # what the start has opened is closed
        taken = set(os.listdir(f"/proc/{api.process.pid}/fd"))
        lowest = next(number for number in range(1000) if str(number) not in taken)
        resource.prlimit(api.process.pid, resource.RLIMIT_NOFILE, (lowest, 4096))
        for line, body in (
                ("GET /resource/vm/list", ""), ("GET /resource/vm/config?vm_id=104", ""),
                ("GET /snapshot/list?vm_id=104", ""),
                ("POST /scale/cores", '{"vm_id": 104, "cores": 4}')):
            sock.sendall(framed(f"{line} HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                                f"Content-Length: {len(body)}", body=body))
            reply = read_answer(sock)
            done = "Nothing was done: " * line.startswith("POST")
            assert reply.status == 503 and re.fullmatch(
                done + r"\S+ cannot be read: Too many open files", reply.body["error"]
            ), (line, reply)
        resource.prlimit(api.process.pid, resource.RLIMIT_NOFILE, (1024, 4096))
    assert host.calls() == [] and len(api.get("/resource/vm/list").body["data"]) == 2


def test_a_cluster_file_system_that_is_not_mounted_is_503(api, host):
    away = host.pve.rename(host.root / "away")
    host.pve.mkdir()
    says = (f"Proxmox's cluster file system is not mounted at {host.pve}; "
            "see: systemctl status pve-cluster")
    for path in ("/resource/vm/list", "/resource/vm/config?vm_id=104",
                 "/resource/vm/status?vm_id=104", "/snapshot/list?vm_id=104", "/metrics"):
        reply = api.get(path)
        assert (reply.status, reply.body, reply.headers["Retry-After"]) == (503, error(says), "30")
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 4}).body == refused(
        "Nothing was done: " + says)
    host.pve.rmdir()
    away.rename(host.pve)
    assert api.get("/resource/vm/list").status == 200 and host.calls() == []


MEMBERS = {"nodename": "proxmox", "cluster": {"name": "lab", "quorate": 1}, "nodelist": {
    "proxmox": {"id": 1, "online": 1, "ip": "192.0.2.1"},
    "pve2": {"id": 2, "online": 1, "ip": "192.0.2.2"}, "pve3": {"id": 3, "online": 1}}}


# A file system with one file, like those of pmxcfs that are no configuration: its text, a number,
# is made when the kernel asks for its attributes, and read past the kernel's cache. Run with the
# folder where it is to be mounted and what is to be printed of the file's path. The kernel keeps
# attributes for a second with pmxcfs, here for a minute.
LIKE_PMXCFS = r'''
import ctypes, os, struct, threading

folder, asked = sys.argv[1:]
try:
    fuse, made = os.open("/dev/fuse", os.O_RDWR), 0
except OSError as error:
    sys.exit(f"unshare: {error}")
if ctypes.CDLL(None).mount(b"like pmxcfs", folder.encode(), b"fuse", 0,
                           b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse):
    sys.exit("unshare: no FUSE here")


def attributes(node):
    global made
    made += node == 2
    return struct.pack("=6Q10I", node, 1, 0, 0, 0, 0, 0, 0, 0, 0o100444 if node == 2 else 0o40755,
                       1, 0, 0, 0, 4096, 0)


def answer(code, node):
    if code == 26:                                      # INIT
        return struct.pack("=4I2H2I2H8I", 7, 31, 65536, 0, 9, 9, 65536, 1, 32, 0, *[0] * 8)
    if code == 1:                                       # LOOKUP
        return struct.pack("=4Q2I", 2, 0, 60, 60, 0, 0) + attributes(2)
    if code == 3:                                       # GETATTR
        return struct.pack("=Q2I", 60, 0, 0) + attributes(node)
    if code == 14:                                      # OPEN, with FOPEN_DIRECT_IO
        return struct.pack("=Q2I", 1, 1, 0)
    if code == 15:                                      # READ
        return b"%d" % made


def serve():
    try:
        while True:
            request = os.read(fuse, 1 << 20)
            _, code, unique, node = struct.unpack_from("=2I2Q", request)
            if code in (2, 42):                         # FORGET wants no answer
                continue
            reply = answer(code, node)
            body, error = (b"", -38) if reply is None else (reply, 0)       # ENOSYS
            os.write(fuse, struct.pack("=IiQ", 16 + len(body), error, unique) + body)
    finally:
        os.close(fuse)              # else whoever waits for an answer could not even be killed


threading.Thread(target=serve, daemon=True).start()
print(eval(asked, {"path": folder + "/.vmlist", "os": os, "read": daemon.read_text}), flush=True)
os._exit(0)
'''


@pytest.mark.parametrize("asked, told", [
    ("[read(path) for _ in range(2)]", ["1", "1"]),
    ("[read(path), read(path, anew=True), read(path), read(path, anew=True)]",
     ["1", "2", "2", "3"]),
    ("[os.stat(path).st_size, read(path, anew=True)]", [1, "2"]),
    ("[read(path, anew=True)]", ["2"])])
def test_what_pmxcfs_makes_itself_can_be_read_as_it_is_now(tmp_path, asked, told):
    if os.geteuid() or not os.access("/dev/fuse", os.W_OK) or not shutil.which("unshare"):
        pytest.skip("needs root, /dev/fuse and unshare")
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", importing({}) + LIKE_PMXCFS, tmp_path, asked],
        capture_output=True, text=True, timeout=20)
    if done.stderr.startswith("unshare: "):
        pytest.skip(done.stderr)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"{told}\n")


def test_who_has_a_guest_is_read_as_it_is_now(host, monkeypatch):
    """Else a container that was made on another node, or has moved there, is not found for a
    second."""
    read, anew = module.read_text, []

    def note(path, *more, **named):
        if path.endswith("/.vmlist"):
            anew.append(named)
        return read(path, *more, **named)
    monkeypatch.setattr(module, "read_text", note)
    host.list(204)
    files = proxmox_of(host).pve
    assert files.find(204) is None
    with pytest.raises(module.Problem):
        files.texts([104, 204], None)
    assert anew == [{"anew": True}] * 2


def test_files_follow_a_container_that_moves_while_they_are_read(host, monkeypatch):
    other = Host(host.root / "other", "pve2", host.shared)
    other.add(204, "far")
    host.write("pve/.members", MEMBERS)
    proxmox, real = proxmox_of(host), module.read_text

    def move_first(path, **named):
        if path.endswith("nodes/pve2/lxc/204.conf"):
            other.path(204).rename(host.path(204))
            host.list(204)
        return real(path, **named)
    monkeypatch.setattr(module, "read_text", move_first)
    assert (proxmox.pve.find(204).address == "192.0.2.2"
            and proxmox.config(204, 128, 1048576)["hostname"] == "far")
    assert proxmox.pve.find(204) is None


@pytest.mark.parametrize("members", [
    "", "{", "[]", '{"nodename": "proxmox", "cluster": {"name": "x"}}',
    '{"nodename": "proxmox", "cluster": {"quorate": 0}, "nodelist": []}'])
def test_a_garbled_file_of_the_cluster_is_503_and_not_taken_for_a_single_host(
        host, launch, members):
    (host.pve / ".members").write_text(members)
    api, says = launch(), "Proxmox's file .members cannot be understood"
    for reply in (api.get("/resource/vm/list"), api.get("/resource/cluster/status"),
                  api.get("/resource/vm/config?vm_id=300")):
        assert (reply.status, reply.body) == (503, error(says))
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    assert (reply.status, reply.body, host.calls()) == (
        503, refused("Nothing was done: " + says), [])


def test_a_host_without_the_files_of_a_cluster_is_a_single_one(host):
    for name in (".members", ".vmlist"):
        (host.pve / name).unlink()
    proxmox = proxmox_of(host)
    assert [proxmox.pve.find(vm_id) for vm_id in (104, 106, 105)] == [None] * 3
    assert ([row["vm_id"] for row in proxmox.list()] == [104, 106]
            and proxmox.pve.members() == (None, None))


def test_an_id_is_taken_by_a_virtual_machine_and_by_a_file_that_is_not_listed_yet(host):
    host.list(300, kind="qemu")
    host.path(107).write_text("cores: 2\n")
    pve = proxmox_of(host).pve
    for vm_id in (300, 107, 106):
        with pytest.raises(module.Problem) as refusal:
            pve.texts((104, vm_id), None)
        assert (refusal.value.status, refusal.value.error) == (409, f"The id {vm_id} is taken")
    assert pve.texts((104, 105), None) == {104: host.path(104).read_text(), 105: None}
    with pytest.raises(module.Problem) as refusal:
        pve.texts((108, 106), None)
    assert refusal.value.status == 404, "that of the source comes first"


def test_an_id_that_is_taken_while_a_clone_waits_for_a_slot_is_found_before_its_first_step(
        launch, host):
    host.faults(set={"delay": True})
    api, later = launch(proxmox={"max_commands": 1}), {"Prefer": "respond-async"}
    assert api.post("/scale/cores", {"vm_id": 106, "cores": 4}, headers=later).status == 202
    wait_until(host.calls)
    clone = api.post("/clone/create", {"vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"},
                     headers=later).body["operation"]
    wait_until(lambda: "\nlxc_autoscale_api_commands_waiting 1\n" in api.get("/metrics").body)
    host.add(105)
    host.go()
    row = wait_until(lambda: next((
        row for row in operations(api) if row["id"] == clone and row["ended"]), None))
    assert (row["status"], row["outcome"], row["error"]) == (
        409, "nothing_done", "The id 105 is taken")
    assert host.calls() == []               # since the id was added


def test_clones_of_a_container_whose_file_hangs_hang_as_one(host, monkeypatch):
    proxmox, released, there = proxmox_of(host), threading.Event(), module.is_there
    monkeypatch.setattr(module, "FILE_SECONDS", 0.05)
    monkeypatch.setattr(module, "is_there", lambda path: (
        released.wait(10) if path.endswith("/104.conf") else there(path)))
    changes = module.Changes(proxmox, proxmox.files.workers, None)
    for new_vm_id in (201, 202, 203):
        change = change_of("/clone/create", vm_id=104, new_vm_id=new_vm_id)
        change.host = proxmox
        changes.take(change)
        with pytest.raises(module.Problem, match="do not answer"):
            changes.answer(change, module.Client(None, "127.0.0.1"), 10)
        assert len(proxmox.files.hung) == 1
    released.set()
    wait_until(lambda: not proxmox.files.hung)


def test_of_what_pct_says_of_a_state_one_line_counts():
    change = change_of("/power/start", vm_id=104)
    for said, state in (("status: running\n", "running"), ("status: \n", ""), ("odd\n", None),
                        ("odd status: x\nstatus: stopped\nmore\n", "stopped")):
        change.host = module.SimpleNamespace(commands=module.SimpleNamespace(
            run=lambda *_, **__: module.Result(0, said, "", False)))
        assert change.state() == state


def test_a_template_holds_no_address(host):
    net = "name=eth0,bridge=vmbr0,ip=192.0.2.{}/24,type=veth"
    for vm_id, values in ((107, {"template": 1}), (108, {"template": 0}), (109, {})):
        host.add(vm_id, net0=net.format(vm_id), **values)
    assert proxmox_of(host).pve.address_holders(109) == {("vmbr0", None, "192.0.2.108"): 108}


# Waiting

def test_a_gate_lets_in_as_many_as_it_is_wide_and_the_others_in_order():
    semaphore, order = module.Semaphore(2), []

    def wait(number):
        with semaphore.held(10):
            order.append(number)
    threads = []
    with semaphore.held(0):
        with semaphore.held(0):
            with pytest.raises(TimeoutError), semaphore.held(0.001):
                order.append("too many")
            for number in range(5):
                threads.append(threading.Thread(target=wait, args=(number,)))
                threads[-1].start()
                wait_until(lambda: len(semaphore.queue) == number + 1)
        for thread in threads:
            thread.join(10)
        assert order == [0, 1, 2, 3, 4] and semaphore.free == 1 and not semaphore.queue
    assert semaphore.free == 2


def test_a_place_that_is_handed_over_as_the_waiting_ends_is_taken_and_not_lost(monkeypatch):
    semaphore, first = module.Semaphore(1), contextlib.ExitStack()
    first.enter_context(semaphore.held(0))

    class Late(threading.Event):
        def wait(self, seconds=None):
            first.close()
            return False                    # as if the time had been over just before
    monkeypatch.setattr(module.threading, "Event", Late)
    with semaphore.held(1):
        assert semaphore.free == 0 and not semaphore.queue
    assert semaphore.free == 1


def test_no_more_threads_stay_for_further_work_than_may_be_idle(monkeypatch):
    monkeypatch.setattr(module, "MAX_IDLE", 2)
    workers, go, ended = module.Workers(), threading.Event(), [module.Future() for _ in range(6)]
    for future in ended:
        workers.start(go.wait, 10, future=future)
    go.set()
    assert [future.result(10) for future in ended] == [True] * 6 and len(workers.idle) == 2


def test_work_that_fails_and_that_nobody_waits_for_is_logged(monkeypatch):
    workers, told = module.Workers(), module.SimpleQueue()
    monkeypatch.setattr(module.log, "error", lambda *values, exc_info: told.put(
        (values, type(exc_info), workers.idle[:])))
    workers.start(int, "x")
    # not idle yet, for a log's disk may hang
    assert told.get(timeout=10) == (("internal error in %s", int), ValueError, [])


def test_a_further_question_is_refused_while_too_many_are_being_answered(monkeypatch):
    monkeypatch.setattr(module, "MAX_FLIGHTS", 1)
    flights, go = module.SingleFlight(module.Workers()), threading.Event()
    first = flights.join("one", lambda: go.wait(10))
    with pytest.raises(module.Problem) as refusal:
        flights.join("two", lambda: 2)
    assert (refusal.value.status, refusal.value.error, refusal.value.headers) == (
        503, "Too many questions are being answered; try again later", {"Retry-After": "1"})
    go.set()
    assert first.result(10) is True


def test_a_question_for_which_no_thread_is_left_is_refused_and_may_be_asked_again(monkeypatch):
    flights = module.SingleFlight(module.Workers())
    with no_thread_left(monkeypatch):
        error = flights.join("one", lambda: 1).exception(1)
    assert (error.status, error.error) == (503, "The host has no thread left; try again later")
    assert flights.join("one", lambda: 1).result(10) == 1


def test_identical_reads_share_a_process_and_none_sees_the_past(asking, host):
    host.faults(status={"pause": True})
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        first = pool.submit(asking.get, "/resource/vm/status?vm_id=106")
        wait_until(host.calls)
        later = [pool.submit(asking.get, "/resource/vm/status?vm_id=106") for _ in range(10)]
        other = pool.submit(asking.get, "/resource/vm/status?vm_id=104")
        # these twelve, and this question itself
        wait_until(lambda: "_requests_in_progress 13\n" in asking.get("/metrics").body)
        host.path(106).write_text(
            host.path(106).read_text().replace("memory: 2048", "memory: 4096"))
        host.go()
        assert [each.result().body["data"]["memory"] for each in later] == [4096] * 10
        assert (first.result().status, other.result().status) == (200, 200)
    assert Counter(host.calls()) == {"pct status 106 --verbose": 2, "pct status 104 --verbose": 1}


# Limits and metrics

def test_the_limiter_agrees_with_a_recount_of_all_requests():
    chance, now, history = random.Random(2), [0.0], []
    limiter = module.RateLimiter(5, 10, clock=lambda: now[0])
    for _ in range(5000):
        now[0] += chance.choice([0, 0.1, 0.5, 3])
        address, client = chance.choice([
            ("192.0.2.1", "a"), ("192.0.2.2", "b"), ("2001:db8:0:1::1", "c"),
            ("2001:db8:0:1:f::2", "c"), ("2001:db8:0:2::1", "d"), ("fe80::1", "e")])
        counted = [moment for who, moment in history if who == client and moment > now[0] - 10]
        admitted, remaining, wait = limiter.admit(address)
        assert admitted == (len(counted) < 5)
        if admitted:
            history.append((client, now[0]))
            counted.append(now[0])
        assert (remaining, wait) == (5 - len(counted), counted[0] + 10 - now[0])


def test_a_limiter_without_room_agrees_with_a_recount_by_networks(monkeypatch):
    """The same rule once more, slow and plain: no client is forgotten while a request of it
    counts."""
    monkeypatch.setattr(module, "MAX_CLIENTS", 20)
    chance, now, counted, seen = random.Random(3), [0.0], {}, set()
    limiter = module.RateLimiter(3, 10, clock=lambda: now[0])
    for _ in range(5000):
        now[0] += chance.choice([0, 0.01, 0.1, 0.3])
        network = module.ipaddress.ip_network(chance.choice([
            "192.0.2.0/28", "198.51.0.0/16", "10.0.0.0/8",
            "2001:db8::/62", "2001:db8::/40", "::/0"]))
        address = network[chance.randrange(network.num_addresses)]
        counted = {who: [moment for moment in moments if moment > now[0] - 10]
                   for who, moments in counted.items()}
        counted = {who: moments for who, moments in counted.items() if moments}
        wider = [module.ipaddress.ip_network((address, bits), strict=False)
                 for bits in ((32, 24, 16, 0) if address.version == 4 else (64, 48, 32, 0))]
        who = next(each for each, room in zip(wider, (20, 30, 40, 9999))
                   if each in counted or len(counted) < room)
        moments = counted.get(who) or list(
            next((counted[each] for each in wider if each in counted), []))
        admitted = len(moments) < 3
        if admitted:
            counted[who] = [*moments, now[0]]
            moments = counted[who]
        assert limiter.admit(str(address)) == (admitted, 3 - len(moments), moments[0] + 10 - now[0])
        assert len(limiter.clients) == len(counted) <= 42
        seen.add((who.prefixlen, admitted))
    assert seen == {
        (bits, admitted) for bits in (64, 48, 32, 24, 16, 0) for admitted in (True, False)}


def test_who_was_refused_in_a_crowd_is_not_free_when_the_crowd_has_gone(monkeypatch):
    monkeypatch.setattr(module, "MAX_CLIENTS", 10)
    now = [0.0]
    limiter = module.RateLimiter(5, 20, clock=lambda: now[0])
    for number in range(10):
        limiter.admit(f"10.{number}.0.1")
    now[0] = 15                             # counted as its network, for there is no room
    assert [limiter.admit("192.0.2.7")[0] for _ in range(6)] == [True] * 5 + [False]
    now[0] = 21                             # the crowd is forgotten
    assert [limiter.admit("192.0.2.7") for _ in range(2)] == [(False, 0, 14)] * 2
    assert limiter.admit("198.51.100.7") == (True, 4, 20)
    now[0] = 35.5
    assert limiter.admit("192.0.2.7") == (True, 4, 20)
    assert set(limiter.clients) == {(4, b"\xc6\x33\x64\x07"), (4, b"\xc0\x00\x02\x07")}


def test_the_limiter_forgets_idle_clients_and_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_CLIENTS", 100)
    now = [0.0]
    limiter = module.RateLimiter(5, 10, clock=lambda: now[0])
    for number in range(100000):
        limiter.admit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        limiter.admit(f"{number:x}:{number * 7 & 65535:x}::1" if number < 65536 else "::1")
    assert len(limiter.clients) == 202
    now[0] = 11
    limiter.admit("192.0.2.1")
    assert list(limiter.clients) == [(4, b"\xc0\0\2\1")]


def test_one_ipv6_network_is_one_client():
    chance = random.Random(4)
    limiter = module.RateLimiter(120, 60)
    network = module.ipaddress.ip_network("2001:db8:1:2::/64")
    guesses = (str(network[chance.getrandbits(64)]) for _ in range(100000))
    assert sum(limiter.admit(guess)[0] for guess in guesses) == 120
    assert limiter.admit("2001:db8:1:3::1")[0] and limiter.admit("192.0.2.1")[0]


@pytest.mark.parametrize("crowd", [
    [f"2001:db8:1:{number:x}::1" for number in range(65536)],               # the /64s of a /48
    [f"10.1.{number >> 8}.{number & 255}" for number in range(65536)],   # a network of 65,536 hosts
    [f"2001:{number:x}:{number:x}::1" for number in range(65536)],          # 65,536 providers
])
def test_no_crowd_makes_a_refused_client_free_again(crowd):
    now = [0.0]
    limiter = module.RateLimiter(120, 60, clock=lambda: now[0])
    refused = ("198.51.100.7", "2001:db8:ffff:1::1")
    for client in refused:
        assert [limiter.admit(client)[0] for _ in range(121)] == [True] * 120 + [False]
    for client in crowd:
        now[0] += 59 / len(crowd)
        limiter.admit(client)
    assert [limiter.admit(each)[0] for each in refused] == [False, False]
    assert limiter.admit("203.0.113.1") == (True, 119, 60)      # a newcomer is served beside them
    assert len(limiter.clients) <= 2 * module.MAX_CLIENTS + 2
    now[0] = 120
    assert [limiter.admit(each) for each in refused] == [(True, 119, 60)] * 2


def test_an_admission_costs_the_same_with_many_clients():
    def seconds(count):
        limiter = module.RateLimiter(120, 3600)
        for number in range(count):
            limiter.admit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        addresses = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
                     for number in range(count - 10, count)] * 10
        times = []
        for _ in range(50):
            started = time.perf_counter()
            for address in addresses:
                limiter.admit(address)
            times.append(time.perf_counter() - started)
        return min(times) / len(addresses)
    few, many = seconds(10), seconds(100000)
    assert many < 5 * few


def limited(launch, tls=False, **rates):
    """A daemon whose limiter counts its only client: from behind a trusted proxy nobody is
    local."""
    return launch(
        tls=tls, rate_limiting={"max_requests_per_minute": 3, "time_window_seconds": 60, **rates})


def test_a_client_over_its_limit_is_told_when_to_come_back(launch):
    api = limited(launch)
    via = {"X-Forwarded-For": "198.51.100.7"}
    replies = [api.get("/resource/cluster/status", headers=via, key=key)
               for key in (KEY, "wrong-key-wrong-key", KEY, KEY)]
    # a wrong key counts as well
    assert [reply.status for reply in replies] == [200, 401, 200, 429]
    assert [reply.headers["X-RateLimit-Remaining"] for reply in replies] == ["2", "1", "0", "0"]
    last = replies[-1]
    seconds = last.body["retry_after_seconds"]
    assert last.body == error(
        "Rate limit exceeded", retry_after_seconds=seconds, limit=3, window_seconds=60)
    assert 55 <= seconds <= 60 and last.headers["Retry-After"] == str(seconds)
    assert abs(int(last.headers["X-RateLimit-Reset"]) - time.time() - seconds) < 3
    assert last.headers["X-RateLimit-Limit"] == "3"
    assert api.get("/metrics", headers=via, key=None).status == 200
    assert "X-RateLimit-Limit" not in api.get("/metrics", headers=via).headers
    assert api.get("/nowhere", headers=via).status == 429
    assert api.get("/routes", headers={"X-Forwarded-For": "198.51.100.8"}).status == 200


def test_a_proxied_ipv6_client_is_limited_by_its_network_and_logged_by_its_address(launch):
    api = limited(launch)
    said = [f"[2001:db8:0:1::{number}]:{40000 + number}" for number in range(1, 5)] + [
        "2001:db8:0:2::1", "198.51.100.7:1", "198.51.100.7:2"]
    assert [api.get("/routes", headers={"X-Forwarded-For": each}).status for each in said] == [
        200, 200, 200, 429, 200, 200, 200]
    wait_until(lambda: api.log("access").count(" GET /routes ") == 7)
    # of two connections either may be logged first
    assert sorted(re.findall(r"(\S+) GET /routes (\d+)", api.log("access"))) == [
        ("198.51.100.7", "200"), ("198.51.100.7", "200"), ("2001:db8:0:1::1", "200"),
        ("2001:db8:0:1::2", "200"), ("2001:db8:0:1::3", "200"),
        ("2001:db8:0:1::4", "429"), ("2001:db8:0:2::1", "200")]


def test_the_window_slides(launch):
    api = limited(launch, max_requests_per_minute=1, time_window_seconds=1)
    via = {"X-Real-IP": "198.51.100.7"}
    assert [api.get("/health/check", headers=via).status for _ in range(2)] == [200, 429]
    wait_until(lambda: api.get("/health/check", headers=via).status == 200, 5)


def test_an_unknown_path_is_limited_even_where_no_key_is_needed(launch):
    api = launch(authentication={"enabled": False}, rate_limiting={"max_requests_per_minute": 1})
    via = {"X-Forwarded-For": "198.51.100.7"}
    assert [api.get("/nowhere", headers=via).status for _ in range(2)] == [404, 429]


def test_a_local_client_is_never_limited_and_a_proxied_one_always(launch):
    api = limited(launch)
    assert [api.get("/routes").status for _ in range(10)] == [200] * 10
    assert "X-RateLimit-Limit" not in api.get("/routes").headers
    codes = [api.get("/routes", headers={"X-Forwarded-For": "127.0.0.1"}).status for _ in range(4)]
    assert codes == [200, 200, 200, 429]


@pytest.mark.parametrize("peer, headers, client", [
    ("127.0.0.1", {}, ("127.0.0.1", True)),
    ("::1", {}, ("::1", True)),
    ("192.0.2.1", {}, ("192.0.2.1", False)),
    ("192.0.2.1", {"x-forwarded-for": "198.51.100.1"}, ("192.0.2.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "198.51.100.1"}, ("198.51.100.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "203.0.113.9, 198.51.100.1"}, ("198.51.100.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "198.51.100.1, 127.0.0.1, ::1"}, ("198.51.100.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, ("127.0.0.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "nonsense"}, ("127.0.0.1", False)),
    ("127.0.0.1", {"x-forwarded-for": ""}, ("127.0.0.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "198.51.100.1, nonsense"}, ("127.0.0.1", False)),
    ("127.0.0.1", {"x-real-ip": "198.51.100.2"}, ("198.51.100.2", False)),
    ("127.0.0.1", {"x-forwarded-for": "198.51.100.1", "x-real-ip": "198.51.100.2"},
     ("198.51.100.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "127.0.0.1, ::1", "x-real-ip": "198.51.100.2"},
     ("198.51.100.2", False)),
    ("127.0.0.1", {"x-forwarded-for": "", "x-real-ip": "198.51.100.2"}, ("198.51.100.2", False)),
    ("127.0.0.1", {"x-forwarded-for": "unknown", "x-real-ip": "198.51.100.2"},
     ("127.0.0.1", False)),
    ("192.0.2.1", {"x-forwarded-for": "", "x-real-ip": "198.51.100.2"}, ("192.0.2.1", False)),
    ("127.0.0.1", {"x-forwarded-for": "::ffff:198.51.100.1"}, ("198.51.100.1", False)),
    ("127.0.0.2", {"x-forwarded-for": "198.51.100.1"}, ("127.0.0.2", True)),
    *((peer, {name: said}, (client, False))
      for peer in ("127.0.0.1", "::1") for name in ("x-forwarded-for", "x-real-ip")
      for said, client in (
        ("198.51.100.1:5678", "198.51.100.1"), ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"), ("2001:DB8:0::1", "2001:db8::1"),
        ("[::ffff:198.51.100.1]:443", "198.51.100.1"), ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%25eth0]:5", "fe80::1"),
        ("203.0.113.9:1, 198.51.100.1:5678, [::1]:443, 127.0.0.1:80", "198.51.100.1"),
        ("\t198.51.100.1:1 , ::1", "198.51.100.1"),
        *((said, peer) for said in (
            "198.51.100.1:", "198.51.100.1:x", "198.51.100.1:123456", "[2001:db8::1]443",
            "[2001:db8::1", "2001:db8::1]:443", "[]", "[]:1", "198.51.100.1:5678:9",
            '"[2001:db8::1]"', "unknown", "unix:", "_hidden", "198.51.100.01", "3325256705",
            ",", "," * 30000, " " * 30000, "[" * 30000, "1" * 30000,
            "198.51.100.1," + " " * 30000, "[::1]:4" + "4" * 30000)),
        ("203.0.113.9," + "127.0.0.1," * 31 + "::1", "127.0.0.1"),
        ("203.0.113.9," + "127.0.0.1," * 30 + "::1", "203.0.113.9"))),
])
def test_only_a_trusted_proxy_speaks_for_others(peer, headers, client):
    trusted = module.networks(["127.0.0.1", "::1"])
    assert module.client_of(headers, peer, trusted) == client


def test_a_proxy_whose_ipv4_address_is_written_as_ipv6_is_trusted():
    trusted = module.networks(["::ffff:192.0.2.1", "::ffff:198.51.100.0/120", "::/0"])
    assert [str(each) for each in trusted] == ["192.0.2.1/32", "198.51.100.0/24", "::/0"]
    said = {"x-forwarded-for": "203.0.113.1"}
    assert [module.client_of(said, peer, trusted)[0] for peer in (
        "192.0.2.1", "192.0.2.2", "198.51.100.9")] == ["203.0.113.1", "192.0.2.2", "203.0.113.1"]


def test_an_ipv4_address_in_ipv6_clothes_is_the_same_client():
    assert str(module.plain_address("::ffff:127.0.0.9")) == "127.0.0.9"
    assert str(module.plain_address("fe80::1%eth0")) == "fe80::1"


def test_a_long_header_of_addresses_costs_little():
    trusted = module.networks(["127.0.0.1", "::1"])

    def seconds(said):
        times = []
        for _ in range(20):
            started = time.perf_counter()
            module.client_of({"x-forwarded-for": said}, "127.0.0.1", trusted)
            times.append(time.perf_counter() - started)
        return min(times)
    for hop in (
            ",", " ,", "127.0.0.1,", "[::1]:1,", "[", "]", "1", ".", ":", "[1:", " ", " x", "%"):
        short, long = (hop * (size // len(hop)) + "127.0.0.1" for size in (4000, 32000))
        assert seconds(long) < 16 * seconds(short) + 0.0005 and seconds(long) < 0.005, hop


@functools.lru_cache(maxsize=10000)             # most lines of a scrape were in the last one
def parse_series(line):
    """A line of Prometheus text -> its series, the value, and the names that may have its type."""
    name, value = re.fullmatch(
        r'([a-z_]+(?:\{(?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+\})?) (\S+)', line).groups()
    return name, float(value), {
        re.sub(r"\{.*|_(bucket|sum|count)(?=\{|$)", "", name), name.split("{")[0]}


def parse_exposition(text):
    """Prometheus text -> {name: type}, {series: value}; asserts the format on the way."""
    types, values = {}, {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value, families = parse_series(line)
            assert name not in values
            values[name] = value
            assert not families.isdisjoint(types)
            continue
        kind = re.fullmatch(r"# TYPE (\S+) (counter|gauge|histogram)", line)
        if kind:
            assert kind[1] not in types
            types[kind[1]] = kind[2]
        else:
            assert re.fullmatch(r"# HELP \S+ .+", line)
    return types, values


def test_histograms_are_cumulative_and_labels_are_escaped():
    metrics = module.Metrics()
    metrics.add("lxc_autoscale_api_requests_total", 'a"b\\c\nd', "/x", "200")
    for value in (0.0005, 0.001, 0.02, 7200):
        metrics.add("lxc_autoscale_api_request_duration_seconds", "GET", "/x", value=value)
    _, values = parse_exposition(metrics.render({}))
    buckets = [value for name, value in values.items() if "_bucket" in name]
    assert buckets == [2, 2, 3] + [3] * (len(module.REQUEST_BUCKETS) - 3) + [4]
    assert values[
        'lxc_autoscale_api_request_duration_seconds_count{method="GET",endpoint="/x"}'] == 4
    assert values[
        'lxc_autoscale_api_request_duration_seconds_sum{method="GET",endpoint="/x"}'
    ] == pytest.approx(7200.0215)
    assert values[
        'lxc_autoscale_api_requests_total{method="a\\"b\\\\c\\nd",endpoint="/x",status="200"}'] == 1


@pytest.mark.parametrize(
    "value", ["", "max", None, [], float("nan"), float("inf"), -float("inf"), 10 ** 400])
def test_what_is_no_number_is_left_out_of_the_exposition(value):
    metrics, pids = module.Metrics(), "lxc_autoscale_container_pids"
    whole = metrics.render({})
    # a family without samples is not named either
    assert metrics.render({pids: {one(104): value}}) == whole
    help_and_type = f"# HELP {pids} Processes and threads.\n# TYPE {pids} gauge\n"
    told = metrics.render({pids: {one(104): value, one(105): 7}})
    assert help_and_type + f'{pids}{{container_id="105"}} 7\n' in told and "104" not in told
    metrics.add("lxc_autoscale_api_command_duration_seconds", "pct set", value=0.5)
    metrics.series["lxc_autoscale_api_command_duration_seconds"]["pct set",][-1] = value
    assert metrics.render({}) == whole


def test_what_the_kernel_does_not_measure_is_null_and_no_metric(api, host, monkeypatch):
    for name in ("cpu", "memory"):
        (host.cgroup / f"lxc/104/{name}.pressure").unlink()
    data = api.get("/resource/vm/status?vm_id=104").body["data"]
    assert data["pressure"] == {"cpu": None, "memory": None, "io": 0.63}
    (host.cgroup / "lxc/104/io.pressure").unlink()
    assert api.get("/resource/vm/status?vm_id=104").body["data"]["pressure"] is None
    assert "_pressure_" not in api.get("/metrics").body
    real = os.open

    def refuse(path, *rest, **options):
        if str(path).endswith(".pressure"):         # so says a kernel that was started with psi=0
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, *rest, **options)
    monkeypatch.setattr(module.os, "open", refuse)
    proxmox = proxmox_of(host)
    assert proxmox.status(104)["pressure"] is None


def test_a_scrape_opens_no_file_that_this_kernel_does_not_have(host, monkeypatch):
    for vm_id in (107, 108):
        host.add(vm_id, running=True)
    for vm_id in (104, 107, 108):
        (host.cgroup / f"lxc/{vm_id}/io.pressure").unlink()
    proxmox = proxmox_of(host)
    real, opened = module.read_text, []

    def note(path, folder=None):
        opened.append((folder and os.readlink(f"/proc/self/fd/{folder}"), path))
        return real(path, folder)
    monkeypatch.setattr(module, "read_text", note)
    gauges = proxmox.gauges()
    names = [name for name in module.CGROUP_FILES if name != "io.pressure"]
    confs = [(str((host.pve / "lxc").resolve()), f"{vm_id}.conf")
             for vm_id in (104, 106, 107, 108)]
    assert opened == [(None, "/proc/net/dev"), *confs, *(
        (f"{host.cgroup}/lxc", f"{vm_id}/{name}") for vm_id in (104, 107, 108) for name in names)]
    waiting = "lxc_autoscale_container_pressure_{}_waiting_seconds_total"
    assert set(gauges[waiting.format("cpu")]) == {one(104), one(107), one(108)}
    assert gauges["lxc_autoscale_container_up"] == {
        one(104): 1, one(106): 0, one(107): 1, one(108): 1}
    for vm_id in (104, 107, 108):           # as a cgroup is that goes while it is read
        for path in (host.cgroup / f"lxc/{vm_id}").iterdir():
            path.unlink() if path.is_file() else shutil.rmtree(path)
    assert proxmox.cgroups.files([104, 107]) == list(module.CGROUP_FILES)
    assert set(proxmox.gauges()["lxc_autoscale_container_up"].values()) == {0}


@pytest.mark.parametrize("name", ["104.conf", "104/cpu.stat"])
def test_a_scrape_names_the_file_that_it_cannot_read(api, host, name):
    folder = host.pve / "lxc" if name.endswith(".conf") else host.cgroup / "lxc"
    (folder / name).unlink()
    (folder / name).mkdir()
    reply = api.get("/metrics")
    assert (reply.status, reply.body) == (503, {
        "status": "error", "error": f"{folder}/{name} cannot be read: Is a directory"})
    fds = f"/proc/{api.process.pid}/fd"
    wait_until(lambda: str(folder.resolve()) not in [       # a look for old snapshots may hold it
        os.path.realpath(f"{fds}/{fd}") for fd in os.listdir(fds)])


def test_a_container_whose_pressure_is_hidden_hides_no_other_one_s(host):
    """Whoever writes 0 to cgroup.pressure hides these files of one cgroup."""
    for vm_id in (107, 108, 109):
        host.add(vm_id, running=True)
    for vm_id in (104, 107, 108):
        for name in ("cpu", "memory", "io"):
            (host.cgroup / f"lxc/{vm_id}/{name}.pressure").unlink()
    gauges = proxmox_of(host).gauges()
    waiting = "lxc_autoscale_container_pressure_{}_waiting_seconds_total"
    for name in ("cpu", "memory", "io"):
        assert set(gauges[waiting.format(name)]) == {one(109)}


def test_traffic_is_told_from_inside_the_container():
    text = ("Inter-|   Receive                                                |  Transmit\n"
            " face |bytes    packets errs drop fifo frame compressed multicast"
            "|bytes    packets errs drop fifo colls carrier compressed\n"
            "    lo:     5    1    0    0    0     0          0         0"
            "       5       1    0    0    0     0       0          0\n"
            "veth104i0:  100    1    0    0    0     0          0         0"
            "     7000    1    0    0    0     0       0          0\n"
            "veth104i1: 1    1    0    0    0     0          0         0"
            "     2    1    0    0    0     0       0          0\n"
            "veth1040i0: 9    1    0    0    0     0          0         0"
            "     9    1    0    0    0     0       0          0\n")
    assert module.parse_net_dev(text) == {104: (7002, 101), 1040: (9, 9)}


def test_scaling_and_requests_are_counted(api, host):
    api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    api.post("/scale/ram", {"vm_id": 104, "memory": 4096})
    api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 1})
    api.post("/scale/cores", {"vm_id": 999, "cores": 4})
    host.faults(set={"exit": 255, "stderr": "CT is locked (backup)\n"})
    api.post("/scale/ram", {"vm_id": 104, "memory": 4096})
    api.get("/nowhere/" + "x" * 50)
    api.get("/resource/lxc/list")
    api.get("/resource/vm/list")
    api.get("/resource/vm/list")
    api.request("BREW", "/routes")
    types, values = parse_exposition(api.get("/metrics").body)
    assert {name: value for name, value in values.items()
            if "scaling" in name or "cpu_cores" in name or "memory_mb" in name} == {
        'lxc_autoscale_scaling_actions_total{container_id="104",resource="cpu",action="set"}': 1,
        'lxc_autoscale_scaling_actions_total{container_id="104",resource="ram",action="set"}': 1,
        'lxc_autoscale_scaling_actions_total'
        '{container_id="104",resource="storage",action="increase"}': 1,
        'lxc_autoscale_scaling_failures_total'
        '{container_id="unknown",resource="cpu",reason="not_found"}': 1,
        'lxc_autoscale_scaling_failures_total'
        '{container_id="104",resource="ram",reason="conflict"}': 1,
        'lxc_autoscale_container_cpu_cores{container_id="104"}': 4,
        'lxc_autoscale_container_cpu_cores{container_id="106"}': 2,
        'lxc_autoscale_container_memory_mb{container_id="104"}': 4096,
        'lxc_autoscale_container_memory_mb{container_id="106"}': 2048}
    assert values['lxc_autoscale_api_requests_total'
                  '{method="POST",endpoint="/scale/ram",status="409"}'] == 1
    assert values['lxc_autoscale_api_requests_total'
                  '{method="GET",endpoint="unknown",status="404"}'] == 1
    assert [values['lxc_autoscale_api_requests_total'
                   f'{{method="GET",endpoint="/resource/{word}/list",status="200"}}']
            for word in ("lxc", "vm")] == [1, 2]
    assert values['lxc_autoscale_api_request_duration_seconds_count'
                  '{method="GET",endpoint="/resource/lxc/list"}'] == 1
    assert values['lxc_autoscale_api_requests_total'
                  '{method="other",endpoint="/routes",status="405"}'] == 1
    assert values['lxc_autoscale_api_request_duration_seconds_count'
                  '{method="POST",endpoint="/scale/ram"}'] == 2
    assert (types["lxc_autoscale_api_requests_total"] == "counter"
            and types["lxc_autoscale_api_request_duration_seconds"] == "histogram")


def test_ids_that_no_container_has_make_no_series_of_their_own(api, host):
    host.list(300)                                      # in the cluster's list, without a file here
    host.list(301, kind="qemu")
    refusals = [("400 Parameter verification failed.\nvmid: no\n", "refused"),
                ("CT is locked (backup)\n", "conflict"),
                ("cluster not ready - no quorum?\n", "unavailable"), ("something else\n", "failed")]
    for number, (said, _) in enumerate(refusals):
        host.faults(set={"exit": 255, "stderr": said})
        for vm_id in (104, 300, 301, 900 + number, 999999 - number):
            api.post("/scale/cores", {"vm_id": vm_id, "cores": 4})
    host.faults()
    assert api.post("/scale/ram", {"vm_id": 800, "memory": 512}).status == 404
    (host.root / "bin/pct").unlink()
    # its file is not there: no pct is asked
    assert api.post("/scale/ram", {"vm_id": 801, "memory": 512}).status == 404
    assert api.post("/scale/ram", {"vm_id": 104, "memory": 512}).status == 503
    name = "lxc_autoscale_scaling_failures_total"
    values = {
        series: value for series, value in parse_exposition(api.get("/metrics").body)[1].items()
        if series.startswith(name)}
    expected = {f'{name}{{container_id="104",resource="cpu",reason="{reason}"}}': 1
                for _, reason in refusals}
    assert values == {
        **expected, f'{name}{{container_id="300",resource="cpu",reason="not_found"}}': 4,
        f'{name}{{container_id="unknown",resource="cpu",reason="not_found"}}': 12,
        f'{name}{{container_id="unknown",resource="ram",reason="not_found"}}': 2,
        f'{name}{{container_id="104",resource="ram",reason="unavailable"}}': 1}


def test_containers_are_measured_without_a_process(api, host):
    host.add(107, "batch", cores=None, lock="backup")
    types, values = parse_exposition(api.get("/metrics").body)
    assert host.calls() == []
    found = {name: value for name, value in values.items()
             if 'container_id="104"' in name or 'container_id="107"' in name}
    assert found == {
        'lxc_autoscale_container_info{container_id="104",name="web-01"}': 1,
        'lxc_autoscale_container_info{container_id="107",name="batch"}': 1,
        'lxc_autoscale_container_up{container_id="104"}': 1,
        'lxc_autoscale_container_up{container_id="107"}': 0,
        'lxc_autoscale_container_locked{container_id="107",lock="backup"}': 1,
        'lxc_autoscale_container_swap_usage_bytes{container_id="104"}': 0,
        'lxc_autoscale_container_memory_shared_bytes{container_id="104"}': 52428800,
        'lxc_autoscale_container_pressure_cpu_waiting_seconds_total{container_id="104"}': 1.25,
        'lxc_autoscale_container_pressure_memory_waiting_seconds_total{container_id="104"}': 0,
        'lxc_autoscale_container_pressure_io_waiting_seconds_total{container_id="104"}': 2.5,
        'lxc_autoscale_container_cpu_cores{container_id="104"}': 2,
        'lxc_autoscale_container_memory_mb{container_id="104"}': 2048,
        'lxc_autoscale_container_memory_mb{container_id="107"}': 2048,
        'lxc_autoscale_container_memory_limit_bytes{container_id="104"}': 2**31,
        'lxc_autoscale_container_memory_limit_bytes{container_id="107"}': 2**31,
        'lxc_autoscale_container_memory_usage_bytes{container_id="104"}': 524288000,
        'lxc_autoscale_container_cpu_seconds_total{container_id="104"}': 5,
        'lxc_autoscale_container_disk_read_bytes_total{container_id="104"}': 1048576,
        'lxc_autoscale_container_disk_write_bytes_total{container_id="104"}': 2097152,
        'lxc_autoscale_container_oom_kills_total{container_id="104"}': 0,
        'lxc_autoscale_container_pids{container_id="104"}': 42}
    assert (types["lxc_autoscale_container_cpu_seconds_total"] == "counter"
            and types["lxc_autoscale_container_pids"] == "gauge")
    (host.cgroup / "lxc/104/io.stat").write_text(
        "253:1 rbytes=1 wbytes=2\n253:2 rbytes=10 wbytes=20 rios=1\n8:0\n")
    # a file that is not there is a family less
    (host.cgroup / "lxc/104/pids.current").unlink()
    _, values = parse_exposition(api.get("/metrics").body)
    assert values['lxc_autoscale_container_disk_write_bytes_total{container_id="104"}'] == 22
    assert not any("_pids" in name for name in values)
    shutil.rmtree(host.cgroup)
    assert "lxc_autoscale_container_up" not in api.get("/metrics").body


def test_a_template_is_no_stopped_container(api, host):
    host.add(107, "golden", template=1)
    _, values = parse_exposition(api.get("/metrics").body)
    assert {name: value for name, value in values.items()
            if "container_up" in name or "_locked" in name} == {
        'lxc_autoscale_container_up{container_id="104"}': 1,
        'lxc_autoscale_container_up{container_id="106"}': 0}
    assert values['lxc_autoscale_container_info{container_id="107",name="golden"}'] == 1


def test_the_traffic_of_all_containers_is_read_once(host, monkeypatch):
    read, real = Counter(), module.read_text
    net_dev = "".join(f"veth{vm_id}i0: {vm_id} 1 0 0 0 0 0 0 {vm_id * 2} 1 0 0 0 0 0 0\n"
                      for vm_id in (104, 106, 900))

    def note(path, folder=None):
        read[os.path.basename(path)] += 1
        return net_dev if path == "/proc/net/dev" else real(path, folder)
    monkeypatch.setattr(module, "read_text", note)
    host.add(107, running=True)
    gauges = proxmox_of(host).gauges()
    assert gauges["lxc_autoscale_container_network_receive_bytes_total"] == {
        one(104): 208, one(106): 212}
    assert gauges["lxc_autoscale_container_network_transmit_bytes_total"] == {
        one(104): 104, one(106): 106}
    assert (read["dev"], read["memory.stat"]) == (1, 2)         # of 104 and 107; 106 is stopped


def test_a_scrape_parses_what_has_changed_and_nothing_else(host, monkeypatch):
    parsed, real = [], module.parse_config
    monkeypatch.setattr(
        module, "parse_config", lambda document: parsed.append(document) or real(document))
    proxmox, cores = proxmox_of(host), "lxc_autoscale_container_cpu_cores"
    assert (proxmox.gauges()[cores] == proxmox.gauges()[cores] == {one(104): 2, one(106): 2}
            and len(parsed) == 2)
    before, stat = host.path(104).read_text(), host.path(104).stat()
    host.path(104).write_text(before.replace("cores: 2", "cores: 3"))
    # as within one second on pmxcfs
    os.utime(host.path(104), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = host.path(104).stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        stat.st_ino, stat.st_size, stat.st_mtime_ns)
    host.path(106).unlink()
    assert (proxmox.gauges()[cores] == {one(104): 3} and len(parsed) == 3
            and list(proxmox.described) == [104])


# file of a cgroup: what stands on it in /metrics, and in the status
USED = {
    "cpu.stat": (["cpu_seconds_total"], []),
    "memory.current": (["memory_usage_bytes"], ["memory_used"]),
    "memory.stat": (["memory_usage_bytes", "memory_shared_bytes"],
                    ["memory_used", "memory_shared"]),
    "memory.swap.current": (["swap_usage_bytes"], ["swap_used"]),
    **{f"{name}.pressure": ([f"pressure_{name}_waiting_seconds_total"], [f"pressure_{name}"])
       for name in ("cpu", "memory", "io")},
    "io.stat": (["disk_read_bytes_total", "disk_write_bytes_total"], ["disk_read", "disk_write"]),
    "memory.events": (["oom_kills_total"], []), "pids.current": (["pids"], []),
    "memory.max": ([], []), "cpu.max": ([], []),
    "ns/init.scope/cgroup.procs": ([], []),
}
GARBAGE = ["letters\n", "max\n", "-5\n", "7" * 5000 + "\n", "\0\xff\n", "\u0663\n",
           "\n", "nan\n", "inf\n", "1e999\n", " 7\n",
           "usage_usec -1\nfile x\noom_kill nan\n8:0 rbytes=max wbytes=\n",
           "8:0 rbytes=" + "9" * 5000 + " wbytes=1e9\n"]


def test_a_cgroup_file_that_is_missing_empty_cut_short_or_garbage_costs_its_own_value_only(
        launch, host):
    # or none of a file's kind is read if the one that is looked at first does not have it
    api = launch(constants={"Cgroups.files": Code("lambda *_: daemon.CGROUP_FILES")})
    whole, cut = host.cgroup / "lxc/104", {}
    for name in USED:
        text = (whole / name).read_text()
        cut.update({(name, damaged): text
                    for damaged in [None, *GARBAGE, *(text[:end] for end in range(len(text)))]})
    damages = dict(enumerate(cut, 1000))
    conf = host.path(104).read_text()
    for vm_id, (name, damaged) in damages.items():
        folder = host.cgroup / f"lxc/{vm_id}"
        shutil.copytree(whole, folder, copy_function=os.link)
        (folder / name).unlink()
        if damaged is not None:
            (folder / name).write_text(
                damaged, encoding="latin-1" if "\xff" in damaged else "utf-8")
        host.path(vm_id).write_text(conf)
    values = parse_exposition(api.get("/metrics").body)[1]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        replies = dict(zip(damages, pool.map(
            lambda vm_id: api.get(f"/resource/vm/status?vm_id={vm_id}"), damages)))

    def measured(vm_id):
        return {key: values.get(f'lxc_autoscale_container_{key}{{container_id="{vm_id}"}}')
                for families, _ in USED.values() for key in families}

    def flat(data):
        pressure = data.pop("pressure") or {}
        return {**data, **{f"pressure_{name}": pressure.get(name)
                           for name in ("cpu", "memory", "io")}}
    intact, status = measured(104), flat(api.get("/resource/vm/status?vm_id=104").body["data"])
    assert None not in intact.values()
    for vm_id, (name, damaged) in damages.items():
        families, keys = USED[name]
        found, reply = measured(vm_id), replies[vm_id]
        # no I/O yet, often for ever on ZFS
        nothing = 0 if (name, damaged) == ("io.stat", "") else None
        for key in families:
            assert found[key] in (nothing, intact[key]), (name, damaged, key)
        assert {**intact, **{key: found[key] for key in families}} == found, (name, damaged)
        assert reply.status == 200, (name, damaged)
        data = flat(reply.body["data"])
        for key in keys:
            assert data[key] in (nothing, status[key]), (name, damaged, key)
        # the last two hang on some process of this host
        free = [*keys, "vm_id", "lxc_id", "cpu_usage", "uptime", "disk_used"]
        assert {key: data[key] for key in data if key not in free} == {
            key: status[key] for key in status if key not in free}, (name, damaged)
        assert all(data[key] is None or type(data[key]) in (int, float)
                   for key in ("cpu_usage", "uptime", "disk_used", *keys)), (name, damaged)
    nothing_yet, = (vm_id for vm_id, damage in damages.items() if damage == ("io.stat", ""))
    assert [replies[nothing_yet].body["data"][key] for key in ("disk_read", "disk_write")] == [0, 0]
    assert measured(nothing_yet) == {
        **intact, "disk_read_bytes_total": 0, "disk_write_bytes_total": 0}
    assert ("NaN" not in json.dumps([reply.body for reply in replies.values()])
            and api.log("error") == "")


def descriptors(daemon):
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def test_the_descriptor_with_which_the_open_ones_are_counted_is_not_counted():
    assert module.process_metrics()["process_open_fds"][""] == len(os.listdir("/proc/self/fd")) - 1


def descriptors_at_rest(daemon):
    """The number without a connection. It is taken while one is open, for the thread that takes
    that one has closed all others."""
    wait_until(lambda: threads(daemon) == 0)
    with daemon.connect() as sock:
        sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
        assert read_answer(sock).status == 200
        return descriptors(daemon) - 1


def resident_kb(daemon):
    return int(re.search(
        r"VmRSS:\s+(\d+)", Path(f"/proc/{daemon.process.pid}/status").read_text())[1])


def test_the_daemon_tells_about_itself(launch, host):
    api = launch(rate_limiting={"max_requests_per_minute": 1}, **ASKING)
    via = {"X-Forwarded-For": "198.51.100.7"}
    api.get("/resource/vm/status?vm_id=104", headers=via)
    api.get("/routes", headers=via)
    api.get("/routes", key="wrong")
    host.faults(set={"delay": 0.7})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        change = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 3})
        wait_until(lambda: len(host.calls()) == 2)
        busy = parse_exposition(api.get("/metrics").body)[1]
        change.result()
    (host.root / "bin/pct").unlink()
    api.post("/scale/cores", {"vm_id": 104, "cores": 3})
    name = "lxc_autoscale_api_"

    def settled():
        types, values = parse_exposition(api.get("/metrics").body)
        # a tick is 10 ms, and the request before has ended a little after its answer came
        return (values["process_cpu_seconds_total"]
                and values[name + "requests_in_progress"] == 1 and (types, values))
    types, values = wait_until(settled)
    assert (busy[name + "commands_in_progress"], busy[name + "commands_waiting"],
            busy[name + "requests_in_progress"]) == (1, 0, 2)
    assert (values[name + "commands_in_progress"], values[name + "requests_in_progress"]) == (0, 1)
    assert (values[name + "rate_limited_total"], values[name + "auth_failures_total"]) == (1, 1)
    assert (values[name + 'commands_total{command="pct status",result="ok"}']
            == values[name + 'commands_total{command="pct set",result="ok"}'] == 1)
    assert values[name + 'commands_total{command="pct set",result="not_started"}'] == 1
    assert values[name + 'command_duration_seconds_bucket{command="pct set",le="0.6"}'] == 0
    assert values[name + 'command_duration_seconds_count{command="pct set"}'] == 1
    assert values[f'{name}build_info{{version="{module.VERSION}",'
                  f'python_version="{".".join(map(str, sys.version_info[:3]))}"}}'] == 1
    assert values["process_resident_memory_bytes"] == pytest.approx(
        resident_kb(api) * 1024, rel=0.2)
    assert (values["process_open_fds"] == pytest.approx(descriptors(api), abs=3)
            and values["process_max_fds"] > 100)
    assert (abs(values["process_start_time_seconds"] - time.time()) < 60
            and 0 < values["process_cpu_seconds_total"] < 60)
    assert values["process_virtual_memory_bytes"] > values["process_resident_memory_bytes"]
    assert ([kind for name, kind in types.items() if name.endswith("_total")]
            == ["counter"] * sum(name.endswith("_total") for name in types))


def test_promtool_has_nothing_to_say_but_of_the_kept_name(api, host):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    api.post("/scale/cores", {"vm_id": 104, "cores": 3})
    done = subprocess.run(["promtool", "check", "metrics"],
                          input=api.get("/metrics").body, capture_output=True, text=True)
    assert [line for line in (done.stdout + done.stderr).splitlines()
            if "lxc_autoscale_container_memory_mb" not in line] == []


README = (HERE / "README.md").read_text()


def readme_block(language, start):
    """The one block of code in the README that begins so."""
    block, = (block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
              if block.startswith(start))
    return block


def panels():
    """The panels of the README's Grafana dashboard."""
    return json.loads(readme_block("json", '{"title": "LXC containers"'))["panels"]


def test_a_real_prometheus_scrapes_it_and_has_what_the_readme_s_panels_show(api, host, tmp_path):
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed")
    host.faults(resize={"exit": 255, "stderr": "something odd\n"})
    assert api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 1}).status == 500
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 3}).status == 200
    port = free_port()
    (tmp_path / "prometheus.yml").write_text(
        "scrape_configs:\n  - job_name: lxc_autoscale_api\n    scrape_interval: 200ms\n"
        "    scrape_timeout: 200ms\n    static_configs:\n"
        f"      - targets: ['127.0.0.1:{api.port}']\n")
    soon = "--scrape.discovery-reload-interval=100ms"           # not 5 s; older ones do not know it
    known = subprocess.run(["prometheus", soon, "--version"], capture_output=True).returncode == 0
    server = subprocess.Popen(
        ["prometheus", f"--config.file={tmp_path}/prometheus.yml",
         f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{port}",
         *([soon] if known else [])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(query, label="container_id"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/api/v1/query?query=" + urllib.parse.quote(query))
            return [(row["metric"].get(label), row["value"][1])
                    for row in json.loads(connection.getresponse().read())["data"]["result"]]
    try:
        assert wait_until(lambda: ask("up"), 30) == [(None, "1")]
        assert sorted(ask("lxc_autoscale_container_memory_limit_bytes")) == [
            ("104", "2147483648"), ("106", "2147483648")]
        shown = {}
        for panel in panels():
            target, = panel["targets"]
            label = (re.findall(r"{{(\w+)}}", target["legendFormat"]) or ["none"])[0]
            if "network" not in target["expr"]:         # a simulated container has no traffic
                shown[panel["title"]] = [
                    name for name, _ in wait_until(lambda: ask(target["expr"], label))]
        assert shown == {
            "Processors in use": ["web-01"], "Memory in use": ["web-01"],
            "Waiting for a processor": ["web-01"], "Waiting for memory": ["web-01"],
            "Waiting for a disk": ["web-01"], "Scaled in an hour": ["104"],
            "Requests that failed": [None]}
    finally:
        server.kill()
        server.wait(20)


def test_a_thousand_containers_are_scraped_and_listed_soon(api, host):
    text = host.path(106).read_text()
    for vm_id in range(1000, 2000):
        host.path(vm_id).write_text(text)
        shutil.copytree(
            host.cgroup / "lxc/104", host.cgroup / f"lxc/{vm_id}", copy_function=os.link)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        lines = api.get("/metrics").body.count("\n")
        times.append(time.perf_counter() - started)
    # a bound for any machine; the figure is in the README
    assert lines > 11000 and min(times) < 0.5
    assert len(api.get("/resource/vm/list").body["data"]) == 1002


def test_a_container_that_vanishes_during_a_scrape_is_left_out(api, host, monkeypatch):
    proxmox = proxmox_of(host)
    real = module.read_text

    def vanish(path, folder=None):
        return None if path == "106.conf" or path.startswith("104/") else real(path, folder)
    monkeypatch.setattr(module, "read_text", vanish)
    gauges = proxmox.gauges()
    assert (gauges["lxc_autoscale_container_up"] == {one(104): 0}
            and gauges["lxc_autoscale_container_pids"] == {})


@pytest.mark.parametrize("folder", ["pve", "cgroup"])
def test_a_folder_that_goes_with_its_last_container_during_a_scrape_is_no_error(
        host, monkeypatch, folder):
    proxmox, real = proxmox_of(host), module.os.listdir
    gone = {"pve": proxmox.pve.lxc, "cgroup": proxmox.cgroups.lxc}[folder]

    def vanish(path):
        names = real(path)
        if path == gone:
            Path(path).resolve().rename(host.root / "gone")
        return names
    monkeypatch.setattr(module.os, "listdir", vanish)
    gauges = proxmox.gauges()
    assert (gauges["lxc_autoscale_container_up"], gauges["lxc_autoscale_container_pids"]) == (
        {"pve": {}, "cgroup": {one(104): 0, one(106): 0}}[folder], {})


# Processes

def test_a_command_for_another_node_is_one_argument_of_ssh():
    node = module.Node("pve2", False, True, "192.0.2.2")
    hostile = ["pct", "set", "104; id", "$(id)", "a b", "'", "-o"]
    command = module.over_ssh(node, hostile, None)
    assert command[:-1] == [
        "ssh", "-e", "none", "-o", "BatchMode=yes", "-o", "HostKeyAlias=pve2",
        "-o", "ConnectTimeout=3", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3",
        "-o", "ControlMaster=auto", "-o", "ControlPath=/run/lxc_autoscale_api/%C",
        "-o", "ControlPersist=300", "root@192.0.2.2", "--"]
    assert shlex.split(command[-1]) == ["sh", "-c", module.REMOTE, "sh", *hostile]
    command = module.over_ssh(
        node._replace(known_hosts="/pve2/ssh_known_hosts"), ["pct", "list"], 15)
    assert {"UserKnownHostsFile=/pve2/ssh_known_hosts", "GlobalKnownHostsFile=none"} < set(command)
    assert shlex.split(command[-1])[4:] == ["timeout", "-s", "KILL", "15", "pct", "list"]


def run_as_remote(folder, *argv, before="", remote=module.REMOTE, **options):
    """Run a command as another node would, with its files in a folder -> the ended process."""
    return subprocess.run(
        ["sh", "-c", before + remote.replace("/run/", f"{folder}/"), "sh", *argv],
        capture_output=True, **options)


@pytest.mark.parametrize("script", [
    "true", "exit 255", "echo out; echo err >&2; exit 2", "printf 'no end of line'",
    "printf '\\n1 2 3\\n'", "printf '\\xff\\x00'; printf '1 0 0\\n' >&2", "kill -9 $$",
    "head -c 3000000 /dev/zero"])
def test_what_ran_on_another_node_comes_back_as_it_was(script, tmp_path):
    there = run_as_remote(tmp_path, "sh", "-c", script)
    here = subprocess.run(["sh", "-c", script], capture_output=True)
    code = here.returncode if here.returncode >= 0 else 128 - here.returncode
    # what has begun never ends with 1 or 2, whatever becomes of the shell
    assert there.returncode == 3
    said = here.stderr if here.returncode >= 0 else b"Killed\n"        # the shell there says so
    assert module.parse_reply(b"a greeting from .bashrc\n" + there.stdout) == (
        code, here.stdout, said)
    assert module.parse_reply(there.stdout[:-1]) is None, "an answer that was cut short is none"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("tool", ["head", "stat"])
def test_what_another_node_could_not_bring_back_is_no_answer(tool, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    real = shutil.which(tool)
    (tools / tool).write_text(     # as with too many open files; before the command, it works
        f'#!/bin/sh\ncase "$*" in *-fc*) exec {real} "$@" ;; esac\nprintf o\nexit 1\n')
    (tools / tool).chmod(0o755)
    there = run_as_remote(
        tmp_path, "sh", "-c", "echo out", env={"PATH": f"{tools}:{os.environ['PATH']}"})
    assert (module.parse_reply(there.stdout), there.returncode) == (None, 3)
    assert module.parse_reply(b"ou\n0 4 0\n") is None, "some of it is missing"


def test_what_a_command_s_child_still_prints_there_does_not_make_its_answer_incomplete(tmp_path):
    script = "(i=0; while [ $i -lt 4000 ]; do echo x; i=$((i + 1)); done) & echo done"
    for _ in range(5):
        there = run_as_remote(tmp_path, "sh", "-c", script)
        code, out, err = module.parse_reply(there.stdout)
        assert (code, set(out.split()), err) == (0, set(out.split()) & {b"done", b"x"}, b"")


def test_what_is_printed_there_after_the_sizes_were_taken_is_left_out(tmp_path):
    sized = "set -- $size"
    assert module.REMOTE.count(sized) == 1
    there = run_as_remote(tmp_path, "sh", "-c", "echo done; echo odd >&2", remote=(
        module.REMOTE.replace(sized, f"echo late >&3; echo late >&4; {sized}")))
    assert module.parse_reply(there.stdout) == (0, b"done\n", b"odd\n")


def test_a_shell_that_cannot_fork_says_whether_the_command_had_begun(tmp_path):
    """dash ends with 2 then."""
    for place, code in (('"$@"', 2), ("size=$(stat", 3)):
        assert module.REMOTE.count(place) == 1
        there = run_as_remote(          # as if that could not be forked
            tmp_path, "true", remote=module.REMOTE.replace(place, f"exit 2; {place}"))
        assert (there.returncode, module.parse_reply(there.stdout)) == (code, None)


def test_a_change_that_prints_too_much_on_another_node_is_as_done_as_here(lab):
    lab.hosts["pve2"].faults(set={"stderr": 120000 * f"{'rsync: a file has vanished':<39}\n"})
    reply = lab.api.post("/scale/cores", {"vm_id": 204, "cores": 4})
    assert (reply.status, set(reply.body["data"]["warnings"])) == (
        200, {"rsync: a file has vanished"})


def test_a_command_on_another_node_has_the_umask_of_root_s_shell(tmp_path):
    there = run_as_remote(tmp_path, "sh", "-c", "umask", before="umask 077; ")
    assert module.parse_reply(there.stdout) == (0, b"0022\n", b"")


def test_a_pct_without_a_byte_on_another_node_is_no_success(tmp_path):
    """A shell takes it for a script that ends well; so a host that crashed may have left it."""
    (tmp_path / "pct").touch(0o755)
    there = subprocess.run(
        ["sh", "-c", module.REMOTE, "sh", "pct", "start", "104"], capture_output=True, text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (there.returncode, there.stdout, there.stderr) == (1, "", f"{tmp_path}/pct is empty\n")


def test_pct_that_is_missing_or_cannot_run_is_503(asking, host):
    api = asking
    pct = host.root / "bin/pct"
    text = pct.read_text()
    pct.unlink()
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    assert (reply.status, reply.body["error"], reply.headers["Retry-After"]) == (
        503, "Nothing was done: pct is not installed, or not on the daemon's PATH", "60")
    pct.write_text("no program")
    pct.chmod(0o644)
    assert api.get("/resource/vm/status?vm_id=104").body == error(
        "pct cannot be started: Permission denied")
    pct.chmod(0o755)
    assert api.get("/resource/vm/status?vm_id=104").body == error(
        "pct cannot be started: Exec format error")
    pct.write_text(text)
    assert api.get("/resource/vm/status?vm_id=104").status == 200


@pytest.mark.parametrize("fault, status, says", [
    ({"signal": 9}, 500, "pct status 104 was ended by SIGKILL"),
    ({"signal": 11}, 500, "pct status 104 was ended by SIGSEGV"),
    ({"exit": 7, "stderr": "first line\nsecond line\n"}, 500, "pct status 104 failed: second line"),
    ({"exit": 127, "stderr": "odd\n"}, 500, "pct status 104 failed: odd"),
    ({"spew": 100_000_000, "exit": 0}, 500, "pct status 104 printed more than 4 MiB"),
    ({"exit": 1, "bytes": "fffe80", "stderr": ""}, 500,
     "pct status 104 failed: \ufffd\ufffd\ufffd"),
    ({"exit": 255, "stderr": "cluster not ready - no quorum?\n"}, 503,
     "The Proxmox cluster has no quorum, so nothing can be changed"),
])
def test_a_read_that_fails_is_told_and_the_next_one_works(steady, fault, status, says):
    steady.host.faults(status=fault)
    try:
        reply = steady.get("/resource/vm/status?vm_id=104")
    finally:
        steady.host.faults()
    assert reply.status == status
    assert reply.body["error"] == says
    if "spew" in fault:                             # it could not print on: its end was never noted
        assert steady.host.rows()[-1]["pid"] not in [row["pid"] for row in steady.host.rows("end")]
    assert steady.get("/resource/vm/status?vm_id=104").status == 200


def test_a_change_may_print_what_it_likes(api, host):
    host.faults(set={"spew": 100_000_000, "bytes": "fffe80"})
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 4}).status == 200
    assert host.conf(104)["cores"] == "4" and resident_kb(api) < 60000


def test_an_output_that_was_cut_off_is_an_error_though_its_command_ended_well():
    commands = module.Commands(1, 15, module.Workers(), module.Metrics())
    with pytest.raises(module.Problem) as caught:
        commands.read(None, "sh", "-c", "yes 2>&-; exit 0", check=True)
    assert (caught.value.status, caught.value.error) == (
        500, "sh -c yes 2>&-; exit 0 printed more than 4 MiB")


def cpu_ticks(daemon):
    return sum(map(int, Path(f"/proc/{daemon.process.pid}/stat").read_text().split()[13:15]))


def test_without_descriptors_left_it_waits_and_recovers(host, launch):
    import resource
    api = launch(**ASKING)
    resource.prlimit(api.process.pid, resource.RLIMIT_NOFILE, (descriptors(api) + 3, 4096))
    held = [api.connect() for _ in range(20)]
    before, begun = cpu_ticks(api), time.monotonic()
    wait_until(lambda: time.monotonic() - begun > 0.5)
    assert cpu_ticks(api) - before < 20             # of 50: it does not spin
    for sock in held:
        sock.close()
    reply = wait_until(lambda: api.get("/resource/vm/status?vm_id=104"))
    assert reply.status in (200, 503)
    resource.prlimit(api.process.pid, resource.RLIMIT_NOFILE, (1024, 4096))
    assert api.get("/resource/vm/status?vm_id=104").status == 200


# as one that hangs in the kernel is
UNKILLABLE = {"os.killpg": Code("lambda *_: None"), "KILL_SECONDS": 0.2}


def test_a_probe_that_cannot_be_killed_is_unhealthy_and_nobody_waits_behind_it(launch, host):
    host.faults(list={"pause": True})
    api = launch(proxmox={"read_timeout_seconds": 1},
                 constants={**UNKILLABLE, "PROBE_SECONDS": 0.1})
    for longest in (2, 0.5):
        started = time.monotonic()
        reply = api.get("/health/check")
        assert (reply.status, reply.body["checks"]["lxc_commands"]) == (503, {
            "ok": False,
            "detail": f"pct list hangs and cannot be ended (process {host.rows()[0]['pid']}); "
                      "the storage or /etc/pve behind it does not answer"})
        assert time.monotonic() - started < longest
        wait_until(lambda: time.monotonic() - started > 0.2)
    assert (host.calls() == ["pct list"]
            and api.post("/scale/cores", {"vm_id": 106, "cores": 4}).status == 200)
    host.go()
    wait_until(lambda: api.get("/health/check").status == 200)


def test_the_place_of_a_command_that_cannot_be_killed_is_free_when_it_has_gone(launch, host):
    host.faults(status={"pause": True})
    api = launch(
        proxmox={"read_timeout_seconds": 1, "max_commands": 1, "cgroup_dir": "/nowhere"},
        constants={**UNKILLABLE, "SLOT_SECONDS": 0.3})
    reply = api.get("/resource/vm/status?vm_id=104")
    assert (reply.status, reply.body) == (504, error(
        f"pct status 104 hangs and cannot be ended (process {host.rows()[0]['pid']}); "
        "the storage or /etc/pve behind it does not answer"))
    assert api.get("/resource/vm/status?vm_id=106").body == error(
        "Too many commands run on this host; try again later")
    host.go()
    wait_until(lambda: api.get("/resource/vm/status?vm_id=106").status == 200)
    assert "ran pct status 104 --verbose: it cannot be ended in " in api.log()


def test_the_place_of_a_command_that_cannot_be_killed_is_free_where_no_thread_is_left(monkeypatch):
    commands = module.Commands(1, 1, module.Workers(), module.Metrics())
    monkeypatch.setattr(module, "ended", lambda *_: False)
    monkeypatch.setattr(module.os, "killpg", lambda *_: None)
    process = module.SimpleNamespace(pid=1, wait=lambda: None)
    with no_thread_left(monkeypatch), commands.slot(None) as slot:
        assert commands.kill(process, (None, "pct", "list"), slot) is False
    assert commands.hung == {} and commands.own.semaphore.free == 1


def test_waiting_for_the_end_of_a_command_leaves_no_descriptor_open():
    process = subprocess.Popen(["true"])
    before = len(os.listdir("/proc/self/fd"))
    assert module.ended(process, 10) and len(os.listdir("/proc/self/fd")) == before


def test_long_changes_leave_places_to_others_and_health_needs_none(launch, host):
    for vm_id in range(110, 115):
        host.add(vm_id)
    host.faults(clone={"delay": True})
    api = launch(proxmox={"max_commands": 4}, constants={"PROBE_SECONDS": 0, "SLOT_SECONDS": 5})
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        clones = [pool.submit(api.post, "/clone/create", {
            "vm_id": vm_id, "new_vm_id": vm_id + 100, "new_vm_name": "x"})
            for vm_id in range(110, 115)]
        wait_until(lambda: len([call for call in host.calls() if " clone " in call]) == 3)
        wait_until(lambda: "lxc_autoscale_api_commands_waiting 2\n" in api.get("/metrics").body)
        started = time.monotonic()
        assert api.post("/scale/cores", {"vm_id": 106, "cores": 4}).status == 200
        assert api.get("/resource/cluster/status").status == 200        # a read that asks pvesh
        assert api.get("/health/check").status == 200
        assert time.monotonic() - started < 2
        host.go()
        assert [each.result().status for each in clones] == [200] * 5


def children(daemon):
    return Path(
        f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()


def commands_alive(host):
    """The ids of all processes that were started as a simulated command of this host, and of their
    children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{host.root}/bin/".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_a_read_that_hangs_is_killed_with_its_group(launch, host):
    host.faults(status={"grandchild": 60, "pause": 60})
    api = launch(proxmox={"read_timeout_seconds": 1, "cgroup_dir": "/nowhere"})
    started = time.monotonic()
    reply = api.get("/resource/vm/status?vm_id=104")
    assert (reply.status, reply.body["error"]) == (
        504, "pct status 104 did not finish in 1 s and was ended")
    assert 0.9 < time.monotonic() - started < 3
    row, = host.rows()
    assert row["group"] == row["session"] == row["pid"]
    wait_until(lambda: not commands_alive(host))
    assert children(api) == []


def kill_rest(host):
    """End what the simulated commands left running on purpose."""
    for pid in commands_alive(host):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def test_a_grandchild_that_holds_the_output_open_delays_nothing(asking, host):
    api = asking
    host.faults(status={"grandchild": 3}, set={"grandchild": 3})
    started = time.monotonic()
    assert api.get("/resource/vm/status?vm_id=104").status == 200
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 3}).status == 200
    assert time.monotonic() - started < 2
    kill_rest(host)


def test_at_most_so_many_commands_run_at_once_and_others_wait_in_order(launch, host):
    for vm_id in range(110, 122):
        host.add(vm_id)
    host.faults(status={"pause": 0.15}, set={"delay": 0.15})
    api = launch(proxmox={"max_commands": 3, "cgroup_dir": "/nowhere"})
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        reads = [pool.submit(api.get, f"/resource/vm/status?vm_id={vm_id}")
                 for vm_id in range(110, 116)]
        changes = [pool.submit(api.post, "/scale/cores", {"vm_id": vm_id, "cores": 3})
                   for vm_id in range(116, 122)]
        assert {each.result().status for each in reads + changes} == {200}
    ends = {row["pid"]: row["at"] for row in host.rows("end")}
    spans = [(row["at"], ends[row["pid"]]) for row in host.rows()]
    assert len(spans) == 12
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) <= 3


def test_a_change_does_not_wait_for_a_read_that_waits_for_it(launch, host):
    host.faults(resize={"delay": 0.5})
    api = launch(proxmox={"max_commands": 1, "pve_dir": "/nowhere"}, constants={"SLOT_SECONDS": 3})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        change = pool.submit(api.post, "/scale/storage/increase", {"vm_id": 104, "disk_size": 1})
        wait_until(lambda: any("resize" in call for call in host.calls()))
        # asks what the change will ask in a moment
        read = pool.submit(api.get, "/resource/vm/config?vm_id=104")
        assert (change.result().status, read.result().status) == (200, 200)


def test_who_waits_too_long_for_a_place_gets_503(launch, host):
    host.faults(status={"pause": True})
    api = launch(proxmox={"max_commands": 1, "cgroup_dir": "/nowhere"},
                 constants={"SLOT_SECONDS": 0.2})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(api.get, "/resource/vm/status?vm_id=104")
        wait_until(host.calls)
        says = "Too many commands run on this host; try again later"
        for reply, body in (
                (api.get("/resource/vm/status?vm_id=106"), error(says)),
                (api.post("/scale/cores", {"vm_id": 106, "cores": 3}),
                 refused("Nothing was done: " + says))):
            assert (reply.status, reply.body, reply.headers["Retry-After"]) == (503, body, "0.2")
        host.go()
        assert first.result().status == 200


# Stands in for pct: notes what it was started with, and goes on as the simulated one.
WITNESS = r"""#!/bin/sh
see() {
    echo "umask: $(umask)"
    names='Uid|Gid|Groups|Sig(Blk|Ign|Cgt)|Cap...|NoNewPrivs|Seccomp.*|Cpus_allowed|Mems_allowed'
    grep -E "^($names):" /proc/self/status      # the shell blocks signals as it forks
    sed '1d; s/  */ /g; s/ \([^ ]* [^ ]* [a-z]* *\)$/: \1/' /proc/$$/limits
    for name in oom_score_adj coredump_filter personality timerslack_ns loginuid; do
        echo "$name: $(cat /proc/$$/$name 2>&1)"
    done
    for name in cgroup ipc mnt net pid time user uts; do
        echo "$name namespace: $(readlink /proc/$$/ns/$name)"
    done
    echo "cgroups: $(tr '\n' ' ' </proc/$$/cgroup)"
    echo "working directory: $(readlink /proc/$$/cwd)"
    set -- $(sed 's/.*) //' /proc/$$/stat)
    echo "session: $([ "$4" = $$ ] && echo own || echo shared)"
    echo "terminal: $5"
    shift 16
    echo "nice: $1"
    shift 21
    echo "real-time priority, policy: $1 $2"
    tr '\0' '\n' </proc/$$/environ | sed 's/=/: /; s/^/environment /'
}
descriptors=$(
    cd /proc/$$/fd && for each in *; do
        [ "$each" -gt 2 ] || echo "descriptor $each: $(readlink "$each")"
    done
    echo "descriptors: $(ls /proc/$$/fd | wc -l)")
{ echo "$descriptors"; see "$@"; } >"$0.$1.new"
mv "$0.$1.new" "$0.$1"
[ "$1" = plain ] || exec REAL "$@"
"""


def surroundings(path):
    """What a WITNESS noted -> ({name: value}, the environment)."""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    seen = {name: " ".join(value.split()) for name, _, value in lines}
    own = {name: seen.pop(name) for name in sorted(seen) if name.startswith("environment ")}
    return seen, {name[12:]: value for name, value in own.items()}


# What systemd gives a service and a login shell does not have: systemd.exec(5).
FROM_SYSTEMD = {
    "NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "60000000",
    "CREDENTIALS_DIRECTORY": "/nowhere", "JOURNAL_STREAM": "8:1",
    "INVOCATION_ID": "0" * 32, "SYSTEMD_EXEC_PID": "1", "LISTEN_FDS": "0", "LISTEN_PID": "1",
    "MEMORY_PRESSURE_WATCH": "/nowhere",
    "FDSTORE": "1", "RUNTIME_DIRECTORY": "/nowhere", "PYTHONUNBUFFERED": "1",
    "LVM_SYSTEM_DIR": "/nowhere", "TZ": "UTC"}


def test_a_command_has_what_a_shell_has_except_what_is_listed(launch, host):
    """umask 077, an ignored SIGPIPE and 700 descriptors stand for what a unit may bring about."""
    pct, real = host.root / "bin/pct", host.root / "real/pct"
    real.parent.mkdir()
    pct.rename(real)
    pct.write_text(WITNESS.replace("REAL", str(real)))
    pct.chmod(0o755)
    subprocess.run(["sh", "-c", f"umask 022; exec {pct} plain"], check=True, cwd=host.root, env={},
                   stdin=subprocess.DEVNULL)
    shell, _ = surroundings(host.root / "bin/pct.plain")
    api = launch(
        inside=["sh", "-c", "umask 077; trap '' PIPE; ulimit -Sn 700; exec \"$@\"", "sh"],
        env=FROM_SYSTEMD, **ASKING)
    assert api.get("/resource/vm/status?vm_id=104").status == 200
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 4}).status == 200
    assert api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": "one"}).status == 200
    hard = shell["Max open files"].split()[1]
    wanted = {
        # a stop of the daemon's group leaves it alone
        "session": "own",
        "terminal": "0",                                # and so none that could hang up
        "working directory": "/",                       # and no unmount waits for it
        "descriptor 1": "/memfd:output (deleted)",      # never a pipe, which could break
        "descriptor 2": "/memfd:output (deleted)",
        "Max open files": f"700 {hard} files"}          # the daemon's own, which does no harm
    for command in ("status", "set", "snapshot"):
        seen, own = surroundings(host.root / f"bin/pct.{command}")
        assert seen == {**shell, **wanted}, command
        assert own == {
            "HOME": "/root", "LOGNAME": "root", "SHELL": "/bin/bash", "USER": "root",
            "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "TZ": "UTC",
            "PATH": f"{host.root}/bin:{os.environ['PATH']}"}, command


def test_the_folder_of_shared_connections_is_private_whatever_the_umask(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", str(tmp_path))
    old = os.umask(0)
    try:
        with pytest.raises(module.Problem):
            module.Commands(4, 15, str(tmp_path), module.Metrics()).reachable(
                module.Node("pve2", False, True, "192.0.2.2"), 0)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700


def test_commands_get_a_session_and_a_locale_of_their_own_and_no_input(asking, host):
    api = asking
    (host.root / "bin/pct").write_text(
        "#!/bin/sh\nexec >&2\nreadlink /proc/self/fd/0\nls /proc/self/fd\n"
        "echo $LC_ALL $LANG\npwd\nexit 9\n")
    details = api.get("/resource/vm/status?vm_id=104").body["details"].split("\n")
    # 3 is ls's own
    assert details == ["/dev/null", "0", "1", "2", "3", "C.UTF-8 C.UTF-8", "/"]


# The host

@pytest.mark.parametrize("method, path, body", [
    ("POST", "/scale/cores", {"cores": 4}), ("POST", "/scale/ram", {"memory": 512}),
    ("POST", "/scale/storage/increase", {"disk_size": 1}),
    ("POST", "/snapshot/create", {"snapshot_name": "s1"}),
    ("POST", "/snapshot/rollback", {"snapshot_name": "s1"}),
    ("POST", "/clone/create", {"new_vm_id": 105, "new_vm_name": "x"}),
    ("DELETE", "/clone/delete", {}), ("GET", "/resource/vm/status?vm_id=999", None),
    ("GET", "/resource/vm/config?vm_id=999", None), ("GET", "/snapshot/list?vm_id=999", None),
])
def test_a_container_that_does_not_exist_is_404(steady, method, path, body):
    reply = steady.request(method, path, None if body is None else {"vm_id": 999, **body})
    assert (reply.status, reply.body["error"]) == (404, "VM 999 does not exist on node 'proxmox'")


STATUS = {
    "vm_id": 104, "lxc_id": 104, "node": "proxmox", "name": "web-01", "status": "running",
    "lock": None, "template": False, "tags": [], "cpu": 2, "memory": 2048, "memory_used": 500,
    "memory_shared": 50, "swap": 512, "swap_used": 0,
    "pressure": {"cpu": 2.38, "memory": 0.0, "io": 0.63},
    "disk": 8, "disk_read": 1048576, "disk_write": 2097152}
STOPPED_STATUS = {
    **STATUS, "vm_id": 106, "lxc_id": 106, "name": "db-01", "status": "stopped", "cpu_usage": 0,
    "memory_used": 0, "memory_shared": 0, "pressure": None, "disk_used": None, "uptime": 0,
    "network_in": 0, "network_out": 0, "disk_read": 0, "disk_write": 0}


def test_status_is_read_from_the_container_s_files(api, host):
    busy = subprocess.Popen([sys.executable, "-c", (
        "import sys, time\nfor n in range(1, 2000):\n"
        "    open(sys.argv[1], 'r+').write(f'usage_usec {5000000 + n * 2000}\\n'); "
        "time.sleep(0.002)"), str(host.cgroup / "lxc/104/cpu.stat")])
    try:
        wait_until(lambda: (
            "usage_usec 5000000\n" not in (host.cgroup / "lxc/104/cpu.stat").read_text()))
        reply = api.get("/resource/vm/status?vm_id=104")
    finally:
        busy.kill()
        busy.wait()
    data = reply.body["data"]
    assert 0 < data.pop("cpu_usage") < 100
    assert reply.body == ok("Retrieved status for VM 104", {
        **STATUS, "uptime": None, "disk_used": None, "network_in": None, "network_out": None})
    assert api.get("/resource/vm/status?vm_id=106").body["data"] == STOPPED_STATUS
    assert host.calls() == []
    # any process will do as its init
    (host.cgroup / "lxc/104/ns/init.scope/cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    with open(host.path(104), "a") as file:
        file.write("\n[pve:pending]\nhostname: later\nmemory: 1\n")        # not what it has now
    data = api.get("/resource/vm/status?vm_id=104").body["data"]
    assert (data["name"], data["memory"]) == ("web-01", 2048)
    assert data["disk_used"] > 0 and data["uptime"] < time.time() - 1 and data["disk"] == 8
    assert parse_exposition(api.get("/metrics").body)[1][
        'lxc_autoscale_container_info{container_id="104",name="web-01"}'] == 1
    host.path(104).write_text("hostname: web-01\nrootfs: /srv/104,size=0T\n")
    disk = os.statvfs(f"/proc/{os.getpid()}/root")
    assert api.get("/resource/vm/status?vm_id=104").body["data"]["disk"] == round(
        disk.f_blocks * disk.f_frsize / 2**30, 2)


def test_a_container_whose_cgroup_is_left_over_and_empty_is_stopped(api, host):
    """The next start removes it (pve-container, lxc-pve-prestart-hook, cleanup_cgroups)."""
    assert api.get("/resource/vm/status?vm_id=104").body["data"]["status"] == "running"
    (host.cgroup / "lxc/104/pids.current").write_text("0\n")
    status = api.get("/resource/vm/status?vm_id=104").body["data"]
    listed = api.get("/resource/vm/list").body["data"][0]
    assert (status["status"], status["uptime"], listed["status"], listed["uptime"]) == (
        "stopped", 0, "stopped", 0)
    values = parse_exposition(api.get("/metrics").body)[1]
    assert values['lxc_autoscale_container_up{container_id="104"}'] == 0
    assert 'lxc_autoscale_container_pids{container_id="104"}' not in values
    assert host.calls() == []


def test_status_is_asked_of_pct_where_the_files_are_missing(asking, host):
    data = asking.get("/resource/vm/status?vm_id=104").body["data"]
    assert (data.pop("cpu_usage"), 3600 <= data.pop("uptime") < 3700) == (None, True)
    assert data == {**STATUS, "memory_shared": None, "disk_used": 1.2,
                    "network_in": 12345, "network_out": 67890}
    assert asking.get("/resource/vm/status?vm_id=106").body["data"] == STOPPED_STATUS
    host.faults(status={
        "stdout": "status: running\ncpus: 2\nnew-key: of some later version\n", "exit": 0})
    data = asking.get("/resource/vm/status?vm_id=106").body["data"]
    assert data == {**dict.fromkeys(data), "vm_id": 106, "lxc_id": 106, "node": "proxmox",
                    "status": "running", "cpu": 2, "template": False, "tags": []}
    assert set(call.split()[1] for call in host.calls()) == {"status"}


STATUS_KEYS = [
    "vm_id", "lxc_id", "node", "name", "status", "lock", "template", "tags", "cpu", "cpu_usage",
    "memory", "memory_used", "memory_shared", "swap", "swap_used", "pressure", "disk", "disk_used",
    "uptime", "network_in", "network_out", "disk_read", "disk_write"]


@pytest.mark.parametrize("source", ["api", "asking"])
def test_lock_template_and_tags_are_told_from_files_and_by_pct(request, host, source):
    host.add(107, "golden", lock="backup", template=1, tags="web;prod", onboot=1)
    data = request.getfixturevalue(source).get("/resource/vm/status?vm_id=107").body["data"]
    assert list(data) == STATUS_KEYS
    assert {key: data[key] for key in (
        "status", "lock", "template", "tags", "pressure", "memory_shared")} == {
            "status": "stopped", "lock": "backup", "template": True, "tags": ["web", "prod"],
            "pressure": None, "memory_shared": 0}


def test_with_control_groups_of_version_1_pct_is_asked(api, host):
    (host.cgroup / "memory").mkdir()
    assert api.get("/resource/vm/status?vm_id=104").body["data"]["uptime"] >= 3600
    assert host.calls() == ["pct status 104 --verbose"]
    assert not any("_up" in name for name in parse_exposition(api.get("/metrics").body)[1])


def test_config_tells_the_allotment_and_its_limits(api, host):
    reply = api.get("/resource/vm/config?vm_id=104")
    memory = min(1048576, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20)
    limits = {"cores": {"min": 1, "max": min(128, os.cpu_count())},
              "memory_mb": {"min": 64, "max": memory}, "disk_gb": {"min": 8}}
    assert reply.body == ok("Successfully retrieved configuration for VM 104", {
        "vm_id": 104, "lxc_id": 104, "cores": 2, "memory_mb": 2048, "swap_mb": 512, "disk_gb": 8,
        "hostname": "web-01", "limits": limits, "mountpoints": []})
    assert host.calls() == []                               # the file says it all
    host.add(107, cores=None, rootfs="local-lvm:vm-107-disk-0,size=512M")
    data = api.get("/resource/vm/config?vm_id=107").body["data"]
    assert (data["cores"], data["disk_gb"]) == (None, 0.5)


def test_mount_points_are_told_by_number(api, host):
    host.add(107, mp10="local-lvm:vm-107-disk-2,mp=/srv/data,size=512M",
             mp2="/mnt/photos,mp=/photos,ro=1,size=0T",
             mp0="backup=1,mp=/var/lib/db,size=1T,volume=local-zfs:subvol-107-disk-1",
             mp1="/dev/sdb1,mp=/raw",
             unused0="local-lvm:vm-107-disk-9", mp3="local-lvm:vm-107-disk-3,mp=/x",
             mp4="ro=1,local-lvm:vm-107-disk-4,mp=/y,size=4G", mp5="mp=/z,/srv/data,size=1G")
    reply = api.get("/resource/vm/config?vm_id=107")
    assert reply.body["data"]["mountpoints"] == [
        {"disk": "mp0", "path": "/var/lib/db", "size_gb": 1024,
         "volume": "local-zfs:subvol-107-disk-1"},
        {"disk": "mp1", "path": "/raw", "size_gb": None, "volume": "/dev/sdb1"},
        {"disk": "mp2", "path": "/photos", "size_gb": None, "volume": "/mnt/photos"},
        {"disk": "mp3", "path": "/x", "size_gb": None, "volume": "local-lvm:vm-107-disk-3"},
        {"disk": "mp4", "path": "/y", "size_gb": 4, "volume": "local-lvm:vm-107-disk-4"},
        {"disk": "mp5", "path": "/z", "size_gb": None, "volume": "/srv/data"},
        {"disk": "mp10", "path": "/srv/data", "size_gb": 0.5, "volume": "local-lvm:vm-107-disk-2"}]


def test_without_files_the_same_is_asked_of_pct(host, launch):
    subprocess.run([host.root / "bin/pct", "snapshot", "104", "first"], check=True)
    subprocess.run([host.root / "bin/pct", "snapshot", "104", "second",
                    "--description", "one line"], check=True)
    with open(host.path(106), "a") as file:
        file.write("\n[pve:pending]\ncores: 7\ndelete: swap\n")
    with_files = launch()
    without = launch(proxmox={"pve_dir": str(host.root / "nowhere"),
                              "cgroup_dir": str(host.root / "nowhere")})
    for path in ("/resource/vm/config?vm_id=104", "/resource/vm/config?vm_id=106",
                 "/snapshot/list?vm_id=104"):
        assert with_files.get(path).body == without.get(path).body
    assert host.calls()[-3:] == ["pct config 104", "pct config 106", "pct listsnapshot 104"]
    assert without.get("/resource/vm/config?vm_id=106").body["data"]["cores"] == 7
    assert without.post("/scale/storage/increase", {"vm_id": 106, "disk_size": 1}).status == 200
    assert without.post("/clone/create", {
        "vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"}).status == 200
    assert "container_cpu_cores" not in without.get("/metrics").body


def test_node_and_cluster_are_told(launch, host):
    api = launch(constants=host.as_node())
    data = api.get("/resource/node/status?node_name=proxmox").body
    assert data["message"] == "Retrieved status for node 'proxmox'"
    assert 0 <= data["data"].pop("cpu_usage") <= 100
    assert data["data"] == {
        "node": "proxmox", "cpu_count": 8, "load_average": [0.21, 0.35, 0.4],
        "memory_usage": 25.0, "memory_total": 32000, "memory_used": 8000, "swap_total": 8192,
        "swap_used": 0, "disk_total": 100, "disk_used": 20, "uptime": 864000, "version": "8.3.0"}
    assert host.calls() == [], "no process was needed"
    reply = api.get("/resource/node/status?node_name=nosuch")
    assert (reply.status, reply.body["error"]) == (
        404, "Node 'nosuch' does not exist; known here: proxmox")
    node = {"name": "proxmox", "online": True, "local": True, "address": "192.0.2.10"}
    assert api.get("/resource/cluster/status").body == ok(
        "Retrieved cluster status", {"cluster": None, "quorate": True, "nodes": [node]})
    host.write("cluster.json", [
        {"type": "cluster", "name": "lab", "quorate": 0, "nodes": 2},
        {"type": "node", "name": "b", "online": 0, "ip": "192.0.2.11"}])
    assert api.get("/resource/cluster/status").body["data"] == {
        "cluster": "lab", "quorate": False, "nodes": [
            {"name": "b", "online": False, "local": False, "address": "192.0.2.11"}]}


def test_another_node_is_measured_before_its_pvesh_loads_it(tmp_path):
    (tmp_path / ".members").write_text(json.dumps({
        "nodename": "a", "cluster": {"name": "lab", "quorate": 1}, "nodelist": {
            name: {"online": 1, "ip": address}
            for name, address in (("a", "192.0.2.1"), ("b", "192.0.2.2"))}}))
    asked = []

    def read(node, *argv, check=False):
        asked.append((node.name, argv[:2]))
        stdout = (json.dumps(TOLD_BY_PVESH) if argv[0] == "pvesh"
                  else f"cpu  {len(asked)} 0 0 {len(asked)} 0 0 0 0 0 0\n")
        return module.Result(0, stdout, "", False)
    host = module.Proxmox(module.SimpleNamespace(read=read), module.Files(module.Workers()),
                          str(tmp_path), "/nowhere", True)
    assert host.node_status("b")["cpu_usage"] == 50.0
    stat = ("b", ("cat", "/proc/stat"))
    assert asked == [stat, stat, ("b", ("pvesh", "get"))]


def test_how_busy_processors_were_is_told_of_all_of_them_together(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    moments = [(1.0, 10.0), (3.0, 11.0)]            # seconds that they worked, and that went by
    assert module.cpu_meter(lambda: moments.pop(0))(4) == 50


def test_health_is_what_pct_says_and_is_kept(host, launch):
    api = launch()
    replies = [api.get("/health/check", key=None) for _ in range(5)]
    assert {reply.status for reply in replies} == {200}
    body = replies[0].body
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", body.pop("timestamp"))
    detail = body["checks"]["lxc_commands"].pop("detail")
    assert re.fullmatch(r"pct list answered in \d+\.\d\d s", detail)
    assert body == {"status": "healthy", "checks": {"lxc_commands": {"ok": True}}}
    assert host.calls() == ["pct list"]
    host.faults(list={"exit": 255, "stderr": "ipcc_send_rec[1] failed: Connection refused\n"})
    reply = launch().get("/health/check", key=None)
    assert (reply.status, reply.body["status"]) == (503, "unhealthy")
    assert reply.body["checks"]["lxc_commands"] == {
        "ok": False, "detail": (
            "Proxmox's cluster file system does not answer; see: systemctl status pve-cluster")}


def test_a_probe_s_result_that_expires_between_two_looks_at_it_is_renewed_once(host, monkeypatch):
    proxmox, probes = proxmox_of(host), []

    def probe():
        probes.append(1)
        time.sleep(0.2)
        return time.monotonic(), True, "fine"
    monkeypatch.setattr(proxmox, "probe", probe)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(proxmox.health) for _ in range(8)]
        assert [each.result() for each in asked] == [(True, "fine")] * 8
    assert len(probes) == 1


def test_many_ask_for_health_and_one_probe_answers(host, launch):
    host.faults(list={"pause": 0.3})
    api = launch()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert set(pool.map(
            lambda _: api.get("/health/check", key=None).status, range(20))) == {200}
    assert host.calls() == ["pct list"]


def test_a_container_that_is_not_there_costs_no_process(api, host):
    for path in ("resource/vm/status", "resource/vm/config", "snapshot/list"):
        reply = api.get(f"/{path}?vm_id=999")
        assert (reply.status, reply.body) == (
            404, error("VM 999 does not exist on node 'proxmox'")), path
    assert api.post("/scale/cores", {"vm_id": 999, "cores": 4}).status == 404
    assert host.calls() == [] and api.log("error") == ""


def test_a_virtual_machine_of_a_single_host_is_called_one_and_costs_no_process(api, host):
    host.list(170, "qemu")
    says = "VM 170 is a virtual machine, not a container"
    for reply, body in ((api.get("/resource/vm/status?vm_id=170"), error(says)),
                        (api.post("/scale/cores", {"vm_id": 170, "cores": 1}), refused(says))):
        assert (reply.status, reply.body) == (404, body)
    assert host.calls() == []


def test_containers_are_listed(api, host, launch):
    host.add(107, None, cores=None, lock="backup", template=1, onboot=1, tags="web;prod")
    reply = api.get("/resource/vm/list")
    assert host.calls() == []
    assert reply.body == ok("Found 3 containers", [
        {"vm_id": 104, "lxc_id": 104, "node": "proxmox", "name": "web-01", "status": "running",
         "cores": 2, "memory": 2048, "uptime": None,
         "lock": None, "template": False, "onboot": False, "tags": []},
        {"vm_id": 106, "lxc_id": 106, "node": "proxmox", "name": "db-01", "status": "stopped",
         "cores": 2, "memory": 2048, "uptime": 0,
         "lock": None, "template": False, "onboot": False, "tags": []},
        {"vm_id": 107, "lxc_id": 107, "node": "proxmox", "name": "ct107", "status": "stopped",
         "cores": None, "memory": 2048, "uptime": 0,
         "lock": "backup", "template": True, "onboot": True, "tags": ["web", "prod"]}])
    assert list(reply.body["data"][0]) == [
        "vm_id", "lxc_id", "node", "name", "status", "cores", "memory", "uptime",
        "lock", "template", "onboot", "tags"]
    assert api.get("/resource/lxc/list").status == 200
    without = launch(proxmox={"pve_dir": str(host.root / "nowhere")})
    pvesh = host.root / "bin/pvesh"
    rows = [{"vmid": "106", "name": "db-01", "status": "stopped", "cpus": 2, "maxmem": 2**31,
             "uptime": 0, "lock": "mounted", "template": 1, "tags": "a;b"},
            {"vmid": 104, "status": "running"}]
    pvesh.write_text(
        f"#!/bin/sh\ncase $2 in /nodes/*/lxc) echo '{json.dumps(rows)}';; *) exit 1;; esac\n")
    own = socket.gethostname().split(".")[0]
    assert without.get("/resource/vm/list").body["data"] == [
        {"vm_id": 104, "lxc_id": 104, "node": own, "name": "CT104", "status": "running",
         "cores": None, "memory": None, "uptime": None,
         "lock": None, "template": False, "onboot": None, "tags": []},
        {"vm_id": 106, "lxc_id": 106, "node": own, "name": "db-01", "status": "stopped",
         "cores": 2, "memory": 2048, "uptime": 0,
         "lock": "mounted", "template": True, "onboot": None, "tags": ["a", "b"]}]


# A cluster

TOOLS = [tool for tool in ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter")
         if not shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]

NODES = {"pve1": "10.7.2.1", "pve2": "10.7.2.2", "pve3": "10.7.3.2"}


class Lab:
    """Three simulated hosts with one /etc/pve. Each has a network and a /run of its own, and a real
    sshd; pve1 reaches the others by a wire each. Whatever runs in these networks is ended with
    them."""

    def __init__(self, root):
        self.root, self.shared, self.holders, self.hosts = root, root / "shared", {}, {}
        for folder in ("pve", "cgroup"):        # where each host has its own
            (root / folder).mkdir()
        for keys in ("client", *NODES):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "",
                            "-f", root / f"{keys}.key"], check=True)
        (root / "ssh_config").write_text(f"IdentityFile {root}/client.key\nIdentitiesOnly yes\n")
        try:
            for name in NODES:
                self.add(name)
            for name, address in list(NODES.items())[1:]:
                self.inside("pve1", "ip", "link", "add", name, "type", "veth",
                            "peer", "name", "wire", "netns", str(self.holders[name].pid))
                self.inside("pve1", "ip", "addr", "add", address[:-1] + "1/24", "dev", name)
                self.inside("pve1", "ip", "link", "set", name, "up")
                self.inside(name, "ip", "link", "set", "wire", "up")
                self.plug(name)
        except BaseException:
            self.close()
            raise
        self.members()
        for number, (name, host) in enumerate(self.hosts.items(), 1):
            host.add(number * 100 + 4, f"web-{number}", running=True)
            host.add(number * 100 + 6, f"db-{number}")

    def add(self, name):
        host = self.hosts[name] = Host(self.root / name / "host", name, self.shared)
        holder = self.holders[name] = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-ec",
             "mount -t tmpfs tmpfs /run; mkdir -m 755 /run/sshd; "
             f"mount --bind {host.pve} {self.root}/pve; "
             f"mount --bind {host.cgroup} {self.root}/cgroup; "
             f"mount --bind {self.root}/ssh_config /etc/ssh/ssh_config; "
             "[ ! -e ~/.bashrc ] || mount --bind /dev/null ~/.bashrc; "
             "ip link set lo up; echo; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if not holder.stdout.readline():
            pytest.skip(f"no namespaces for hosts of our own: {holder.stderr.read().decode()}")
        (self.shared / "nodes" / name / "ssh_known_hosts").write_text(
            f"{name} {(self.root / f'{name}.key.pub').read_text()}")
        config = self.root / f"{name}.sshd"
        config.write_text(
            f"HostKey {self.root}/{name}.key\nAuthorizedKeysFile {self.root}/client.key.pub\n"
            "StrictModes no\nUsePAM no\nPidFile none\nLogLevel VERBOSE\n"
            "KexAlgorithms curve25519-sha256\n"     # newer ones take longer
            f"SetEnv PATH={host.root}/bin:/usr/sbin:/usr/bin:/sbin:/bin\n")
        self.inside(name, shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ["PATH"]),
                    "-f", config, "-E", self.root / f"{name}.log")

    def inside(self, name, *command):
        return subprocess.run(
            ["nsenter", "-t", str(self.holders[name].pid), "-n", "-m", *command],
            check=True, capture_output=True, text=True)

    def connect(self, address, timeout, source=None):
        """A connection made in pve1's network, by a thread that moves there."""
        def work():
            with open(f"/proc/{self.holders['pve1'].pid}/ns/net") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), "setns")
            return socket.create_connection(address, timeout, source)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    def daemon(self, proxmox=None, **options):
        proxmox = {"pve_dir": f"{self.root}/pve", "cgroup_dir": f"{self.root}/cgroup",
                   **(proxmox or {})}
        options["constants"] = {**self.hosts["pve1"].as_node(), **(options.get("constants") or {})}
        return Daemon(
            self.hosts["pve1"],
            inside=["nsenter", "-t", str(self.holders["pve1"].pid), "-n", "-m"],
            connect=self.connect, proxmox=proxmox, **options)

    def plug(self, name):
        self.inside(name, "ip", "addr", "add", NODES[name] + "/24", "dev", "wire")

    def unplug(self, name):
        """From now on nothing comes back from a node, and nobody is told."""
        self.inside(name, "ip", "addr", "flush", "dev", "wire")

    def members(self, quorate=1, offline=()):
        for name, host in self.hosts.items():
            nodes = {each: {"id": number, "online": int(each not in offline), "ip": NODES[each]}
                     for number, each in enumerate(NODES, 1)}
            host.write("pve/.members", {"nodename": name, "version": 7, "nodelist": nodes,
                                        "cluster": {"name": "lab", "version": 3, "nodes": 3,
                                                    "quorate": quorate}})

    def move(self, vm_id, source, target):
        self.hosts[source].path(vm_id).rename(self.hosts[target].path(vm_id))
        (self.hosts[source].cgroup / f"lxc/{vm_id}").rename(
            self.hosts[target].cgroup / f"lxc/{vm_id}")
        self.hosts[target].list(vm_id)

    @contextlib.contextmanager
    def behind(self, name):
        """What the others change in /etc/pve has not come to a node yet."""
        pve = self.hosts[name].pve
        for each, copy in ((".vmlist", shutil.copy), ("nodes", shutil.copytree)):
            (pve / each).unlink()
            copy(self.shared / each, pve / each)
        try:
            yield
        finally:
            shutil.rmtree(pve / "nodes")
            (pve / ".vmlist").unlink()
            for each in (".vmlist", "nodes"):
                (pve / each).symlink_to(self.shared / each)

    def processes(self, name, word=""):
        """The ids of the processes in a node's network whose command line has a word in it."""
        found, network = [], os.readlink(f"/proc/{self.holders[name].pid}/ns/net")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (os.readlink(folder / "ns/net") == network
                        and word.encode() in (folder / "cmdline").read_bytes()):
                    found.append(int(folder.name))
        return found

    def logins(self, name):
        return (self.root / f"{name}.log").read_text().count("Accepted publickey")

    def calls(self):
        """{node: the command lines that were run there, without those of earlier tests}"""
        return {name: host.calls() for name, host in self.hosts.items() if host.calls()}

    def reset(self):
        for host in self.hosts.values():
            host.faults()
            (host.root / "calls.jsonl").unlink(missing_ok=True)

    def close(self):
        for name in self.holders:
            for pid in self.processes(name):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        for holder in self.holders.values():
            holder.communicate()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if TOOLS:
        pytest.skip(f"not installed: {', '.join(TOOLS)}")
    if os.geteuid():
        pytest.skip("only root can make hosts of its own")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    lab.api = lab.daemon()
    yield lab
    codes = lab.api.stop(), "internal error" in lab.api.log("error")
    lab.close()
    assert codes == (0, False)


@pytest.fixture
def lab(built):
    """The cluster, where 104 and 106 are on pve1, 204 and 206 on pve2, 304 and 306 on pve3, and
    each 4 runs."""
    built.reset()
    yield built
    built.members()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_endpoint_works_on_each_node_of_a_cluster(lab, number):
    api, name, running, new = lab.api, f"pve{number}", number * 100 + 4, number * 100 + 50
    host = lab.hosts[name]

    def done(reply, message):
        assert (reply.status, reply.body["message"]) == (200, message), reply.body
        return reply.body.get("data")
    done(api.post("/scale/cores", {"vm_id": running, "cores": 4}),
         f"CPU cores set to 4 for VM {running}")
    done(api.post("/scale/ram", {"vm_id": running, "memory": 4096}),
         f"Memory set to 4096 MB for VM {running}")
    done(api.post("/scale/storage/increase", {"vm_id": running, "disk_size": 5}),
         f"Storage increased by 5 GB for VM {running}")
    assert {key: host.conf(running)[key] for key in ("cores", "memory", "rootfs")} == {
        "cores": "4", "memory": "4096", "rootfs": f"local-lvm:vm-{running}-disk-0,size=13G"}
    done(api.post("/snapshot/create", {"vm_id": running, "snapshot_name": "before"}),
         f"Snapshot 'before' created for VM {running}")
    assert [row["name"] for row in done(
        api.get(f"/snapshot/list?vm_id={running}"), f"Found 1 snapshots for VM {running}"
    )] == ["before"]
    done(api.post("/snapshot/rollback", {"vm_id": running, "snapshot_name": "before"}),
         f"Rolled back VM {running} to snapshot 'before'")
    assert host.running(running)
    done(api.delete("/snapshot/delete", {"vm_id": running, "snapshot_name": "before"}),
         f"Snapshot 'before' of VM {running} deleted")
    done(api.post("/clone/create", {
        "vm_id": running, "new_vm_id": new, "new_vm_name": "test_clone", "start": True}),
        f"Cloned VM {running} to new VM {new} (test_clone)")
    assert host.running(new) and host.snapshots(running) == []
    status = done(api.get(f"/resource/vm/status?vm_id={running}"),
                  f"Retrieved status for VM {running}")
    assert 0 <= status.pop("cpu_usage") <= 100
    assert {key: status[key] for key in (
            "vm_id", "node", "name", "status", "cpu", "memory", "memory_used", "disk", "pressure"
    )} == {
        "vm_id": running, "node": name, "name": f"web-{number}", "status": "running", "cpu": 4,
        "memory": 4096, "memory_used": 500, "disk": 13,
        "pressure": {"cpu": 2.38, "memory": 0.0, "io": 0.63}}
    assert status["memory_shared"] == (50 if number == 1 else None)
    done(api.delete("/clone/delete", {"vm_id": new}), f"Deleted VM {new}")
    assert not host.path(new).exists()
    config = done(api.get(f"/resource/lxc/config?lxc_id={running}"),
                  f"Successfully retrieved configuration for VM {running}")
    assert (config["cores"], config["memory_mb"], config["disk_gb"]) == (4, 4096, 13)
    node = done(api.get(f"/resource/node/status?node_name={name}"),
                f"Retrieved status for node '{name}'")
    assert (node["cpu_count"], node["version"]) == (8, "8.3.0") and 0 <= node["cpu_usage"] <= 100
    used = lab.calls()
    assert not any(call.startswith("pct config") for call in used[name]), "files have told it"
    assert list(used) == [name] and f"pct clone {running} {new}" in " ".join(used[name]), (
        "nothing ran on another node")
    for path, status, text in (
            (f"/resource/vm/status?vm_id={number}99", 404,
             f"VM {number}99 does not exist on any node of the cluster"),
            ("/resource/node/status?node_name=pve9", 404,
             "Node 'pve9' does not exist; known here: pve1, pve2, pve3")):
        reply = api.get(path)
        assert (reply.status, reply.body["error"]) == (status, text)
    reply = api.post("/snapshot/rollback", {"vm_id": running, "snapshot_name": "nosuch"})
    assert (reply.status, reply.body) == (404, refused(
        "Snapshot 'nosuch' does not exist", details="snapshot 'nosuch' does not exist"))
    reply = api.post("/clone/create", {
        "vm_id": running, "new_vm_id": 306 if number < 3 else 206, "new_vm_name": "x"})
    assert (reply.status, reply.body["error"][:6]) == (409, "The id")
    host.faults(set={"exit": 255, "stderr": "something odd\n"})
    reply = api.post("/scale/cores", {"vm_id": running, "cores": 2})
    assert (reply.status, reply.body) == (500, error(
        f"pct set {running} failed: something odd", outcome="incomplete", details="something odd"))


def test_the_whole_cluster_is_listed_from_files(lab):
    now = int(time.time())
    (lab.shared / ".rrd").write_text(
        f"pve2-node/pve2:864000:c:{now}:0.1:48:0.02:0.0:137438953472:1:0:0:1:1:1:1\n"
        f"pve2.3-vm/204:3600:web-2:running:0:{now}:2:0.1:2147483648:5:8589934592:1:1:1:1:1\n"
        f"pve-vm-9.0/304:7200:web-3:running:0:{now - 300}:2:0.1:2147483648:5:8589934592"
        ":1:1:1:1:1:1:1:1:1:1:1:1\n"
        f"pve-vm-9.0/306:0:db-3:stopped:0:{now}:2::2147483648::8589934592:U:U:U:U\n")
    try:
        rows = lab.api.get("/resource/vm/list").body["data"]
        assert [(row["vm_id"], row["node"], row["name"], row["status"]) for row in rows] == [
            (104, "pve1", "web-1", "running"), (106, "pve1", "db-1", "stopped"),
            (204, "pve2", "web-2", "running"),
            # 304's news is old
            (206, "pve2", "db-2", None), (304, "pve3", "web-3", None),
            (306, "pve3", "db-3", "stopped")]
        assert [row["uptime"] for row in rows][1:] == [0, 3600, None, None, 0]
        assert [(row["lock"], row["template"], row["onboot"], row["tags"]) for row in rows] == [
            (None, False, False, [])] * 6
        limits = lab.api.get("/resource/vm/config?vm_id=204").body["data"]["limits"]
        assert (limits["cores"]["max"], limits["memory_mb"]["max"]) == (48, 131072)
        limits = lab.api.get("/resource/vm/config?vm_id=304").body["data"]["limits"]
        assert (limits["cores"]["max"], limits["memory_mb"]["max"]) == (128, 1048576)
        assert lab.api.get("/resource/cluster/status").body["data"] == {
            "cluster": "lab", "quorate": True, "nodes": [
                {"name": name, "online": True, "local": name == "pve1", "address": address}
                for name, address in NODES.items()]}
        lab.members(offline=["pve2"])
        assert [row["status"] for row in lab.api.get("/resource/vm/list").body["data"]][2:4] == [
            None, None]
        assert lab.calls() == {}
    finally:
        (lab.shared / ".rrd").unlink()


def test_a_node_that_is_cut_off_is_named_within_five_seconds_and_the_rest_works(lab):
    assert module.REACH_SECONDS <= 4            # in half of that the same is seen here
    api = lab.daemon(constants={"REACH_SECONDS": 2, "RUN_DIR": "/run/cut"})
    for vm_id in (204, 304):
        # a connection is open
        assert api.get(f"/resource/vm/status?vm_id={vm_id}").status == 200
    lab.hosts["pve3"].faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(14) as pool:
        begun = pool.submit(api.post, "/scale/cores", {"vm_id": 306, "cores": 5})
        wait_until(lambda: lab.hosts["pve3"].calls("start")[-1] == "pct set 306 --cores 5")
        lab.unplug("pve3")
        try:
            started = time.monotonic()
            cut = [pool.submit(api.get, "/resource/vm/status?vm_id=304"),
                   pool.submit(api.post, "/scale/cores", {"vm_id": 306, "cores": 1}),
                   *(pool.submit(api.get, f"/resource/{what}")
                     for what in ["vm/status?vm_id=306", "node/status?node_name=pve3"] * 3)]
            others = [pool.submit(api.get, f"/resource/vm/status?vm_id={vm_id}")
                      for vm_id in (104, 204)]
            assert ([each.result().status for each in others] == [200, 200]
                    and time.monotonic() - started < 1.5)
            replies = [each.result() for each in cut]
            assert time.monotonic() - started < 3 and not begun.done()
            assert ({reply.status for reply in replies} == {503}
                    and all("Retry-After" in reply.headers for reply in replies))
            assert {reply.body["error"] for reply in replies} == {
                done + "Node 'pve3' cannot run commands over SSH; "
                       "to see why, on this host: pvesh get /nodes/pve3/version"
                for done in ("", "Nothing was done: ")}
            # a file, which is here
            assert api.get("/resource/vm/config?vm_id=304").status == 200
        finally:
            lab.hosts["pve3"].go()
            lab.plug("pve3")
        assert begun.result().body == ok("CPU cores set to 5 for VM 306"), (
            "it has waited for its node")
    assert lab.hosts["pve3"].conf(306)["cores"] == "5"
    assert api.post("/scale/cores", {"vm_id": 306, "cores": 2}).status == 200 and api.stop() == 0


def test_a_node_that_is_offline_is_named_at_once(lab):
    failures = ('lxc_autoscale_scaling_failures_total{container_id="204",resource="cpu",'
                'reason="unavailable"}')
    failed = parse_exposition(lab.api.get("/metrics").body)[1].get(failures, 0)
    lab.members(offline=["pve2"])
    before = lab.logins("pve2")
    says = "Node 'pve2' is offline; to see why, on this host: pvecm status"
    for reply, body in (
            (lab.api.get("/resource/vm/status?vm_id=204"), error(says)),
            (lab.api.post("/scale/cores", {"vm_id": 204, "cores": 1}),
             refused("Nothing was done: " + says)),
            (lab.api.get("/resource/node/status?node_name=pve2"), error(says))):
        assert (reply.status, reply.body) == (503, body)
    assert (lab.api.get("/resource/vm/status?vm_id=304").status == 200
            and lab.logins("pve2") == before and "pve2" not in lab.calls())
    assert parse_exposition(lab.api.get("/metrics").body)[1][failures] == failed + 1


def test_without_quorum_changes_are_refused_and_reads_work(lab):
    lab.members(quorate=0, offline=["pve3"])
    for vm_id in (104, 204):
        for path, extra in (
                ("/scale/cores", {"cores": 1}), ("/snapshot/create", {"snapshot_name": "late"}),
                ("/clone/create", {"new_vm_id": 150, "new_vm_name": "x"})):
            reply = lab.api.post(path, {"vm_id": vm_id, **extra})
            assert (reply.status, reply.body) == (503, refused(
                "Nothing was done: The Proxmox cluster has no quorum, so nothing can be changed; "
                "see: pvecm status"))
    assert lab.api.post("/scale/cores", {"vm_id": 999, "cores": 1}).status == 404
    assert lab.calls() == {}
    for path in ("vm/list", "vm/status?vm_id=104", "vm/status?vm_id=204", "vm/config?vm_id=304",
                 "node/status?node_name=pve2"):
        assert lab.api.get("/resource/" + path).status == 200
    assert lab.api.get("/resource/cluster/status").body["data"]["quorate"] is False


@pytest.mark.parametrize("source, target", [("pve2", "pve3"), ("pve1", "pve2"), ("pve3", "pve1")])
def test_a_container_that_migrates_meanwhile_is_looked_up_once_more(lab, source, target):
    host, vm_id = lab.hosts[source], int(source[-1]) * 100 + 4
    host.faults(set={"pause": True})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        change = pool.submit(lab.api.post, "/scale/cores", {"vm_id": vm_id, "cores": 3})
        wait_until(lambda: host.calls() == [f"pct set {vm_id} --cores 3"])
        lab.move(vm_id, source, target)
        host.go()
        reply = change.result()
        try:
            assert reply.body == ok(f"CPU cores set to 3 for VM {vm_id}")
            assert lab.calls() == {
                source: [f"pct set {vm_id} --cores 3"], target: [f"pct set {vm_id} --cores 3"]}
            assert lab.api.get(f"/resource/vm/status?vm_id={vm_id}").body["data"]["node"] == target
        finally:
            lab.move(vm_id, target, source)


def test_a_state_of_which_is_asked_where_the_container_no_longer_is_is_asked_once_more(lab):
    host, command = lab.hosts["pve2"], "pct status 204 --verbose"
    host.faults(status={"pause": True})
    with held_up(host, "status", lab.api.get, "/resource/vm/status?vm_id=204") as asked:
        lab.move(204, "pve2", "pve3")
    reply = asked.result()
    try:
        assert (reply.status, reply.body["data"]["node"]) == (200, "pve3")
        assert lab.calls() == {"pve2": [command], "pve3": [command]}
    finally:
        lab.move(204, "pve3", "pve2")


def test_a_virtual_machine_is_called_one(lab):
    lab.hosts["pve1"].list(170, "qemu")
    lab.hosts["pve2"].list(270, "qemu")
    for vm_id in (170, 270):
        says = f"VM {vm_id} is a virtual machine, not a container"
        for reply, body in ((lab.api.get(f"/resource/vm/status?vm_id={vm_id}"), error(says)),
                            (lab.api.get(f"/resource/vm/config?vm_id={vm_id}"), error(says)),
                            (lab.api.delete("/clone/delete", {"vm_id": vm_id}), refused(says))):
            assert (reply.status, reply.body) == (404, body)
    reply = lab.api.post("/clone/create", {"vm_id": 204, "new_vm_id": 170, "new_vm_name": "x"})
    assert (reply.status, reply.body["error"]) == (409, "The id 170 is taken")


def test_a_source_that_moves_during_a_clone_is_mended_where_it_is(lab):
    host = lab.hosts["pve2"]
    host.faults(clone={"pause": True})
    with held_up(host, "clone", lab.api.post, "/clone/create", {
            "vm_id": 204, "new_vm_id": 250, "new_vm_name": "x"}) as asked:
        name, = host.snapshots(204)
        lab.move(204, "pve2", "pve3")
    reply = asked.result()
    try:
        assert (reply.status, reply.body["outcome"]) == (500, "incomplete")
        assert (f"; remove it on node 'pve3' with: pct delsnapshot 204 {name}"
                in reply.body["details"]), reply.body["details"]
        assert lab.hosts["pve3"].snapshots(204) == [name]
    finally:
        lab.move(204, "pve3", "pve2")
        subprocess.run([host.root / "bin/pct", "delsnapshot", "204", name], check=True)


def test_a_202_waits_for_no_node_that_does_not_answer(launch, host):
    """What becomes of the change is told in /operations."""
    Host(host.root / "other", "pve2", host.shared).add(204, "far")
    host.write("pve/.members", MEMBERS)
    api = launch(constants={"Commands.reachable": Code(
        "lambda *_: (daemon.time.sleep(5), (_ for _ in ()).throw(daemon.stopping()))")}, **ASKING)
    started, body = time.monotonic(), {"vm_id": 204, "cores": 4}
    for _ in range(2):
        reply = api.post("/scale/cores", body, headers={"Prefer": "respond-async"})
        assert reply.status == 202
    assert time.monotonic() - started < 2


def begin_clone(pool, api, host, vm_id, new_vm_id):
    """Ask for a clone, which is delayed -> the Future of its answer, once pct clone has begun."""
    host.faults(clone={"delay": True})
    clone = pool.submit(api.post, "/clone/create", {
        "vm_id": vm_id, "new_vm_id": new_vm_id, "new_vm_name": "x"})
    wait_until(lambda: any(" clone " in call for call in host.calls()))
    return clone


def test_a_change_over_a_lost_connection_goes_on_and_its_caller_is_told(lab):
    pve2 = lab.hosts["pve2"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        clone = begin_clone(pool, lab.api, pve2, 206, 250)
        for pid in lab.processes("pve2", "sshd: root"):
            os.kill(pid, signal.SIGKILL)
        reply = clone.result()
    assert not pve2.ended("clone")
    pve2.go()
    assert reply.status == 504 and reply.body["error"] == (
        "The connection to node 'pve2' was lost during pct clone 206, "
        "which goes on if the node does. "
        "Ask for the container's state before trying again")
    wait_until(lambda: pve2.ended("clone"))
    assert (pve2.ended("clone")[0]["code"], "lock" in pve2.conf(250), "lock" in pve2.conf(206)) == (
        0, False, False)
    assert "lxc_autoscale_api." not in lab.inside("pve2", "ls", "/run").stdout, (
        "its output was in files without names")
    assert lab.api.delete("/clone/delete", {"vm_id": 250}).status == 200


def run_commands(lab, script, argument):
    """What a script on pve1 prints as JSON that has `commands`, the Nodes `pve2` and `pve3`, and
    an argument."""
    setup = (f"import concurrent.futures, json\n{importing({})}"
             f"commands = daemon.Commands(4, 15, daemon.Workers(), daemon.Metrics())\n"
             f"pve2, pve3 = (daemon.Node(name, False, True, address, "
             f"f'{lab.root}/pve/nodes/{{name}}/ssh_known_hosts') "
             f"for name, address in {list(NODES.items())[1:]!r})\n"
             "argument = json.loads(sys.argv[1])\n")
    return json.loads(lab.inside(
        "pve1", sys.executable, "-c", setup + script, json.dumps(argument)).stdout)


@pytest.mark.parametrize("options, says", [
    ("ro", "Read-only file system"), ("size=512k", "/run is full")])
def test_a_node_without_room_for_a_commands_output_does_nothing_and_says_so(lab, options, says):
    lab.inside("pve3", "mount", "-o", f"remount,{options}", "/run")
    try:
        silent = ("Node 'pve3' cannot run commands over SSH; "
                  "to see why, on this host: pvesh get /nodes/pve3/version")
        for reply, error_text in (
                (lab.api.post("/scale/cores", {"vm_id": 304, "cores": 3}),
                 "Nothing was done: " + silent),
                (lab.api.get("/resource/vm/status?vm_id=304"), silent)):
            assert (reply.status, reply.body["error"]) == (503, error_text)
            assert says in reply.body["details"]
        status, details = run_commands(lab, (          # if that comes after the node was found well
            "try:\n    commands.run(pve3, ['true'], changes=True)\n"
            "except daemon.Problem as problem:\n"
            "    print(json.dumps([problem.status, problem.fields['details']]))"), None)
        assert status == 503 and says in details
    finally:
        lab.inside("pve3", "mount", "-o", "remount,rw,size=16m", "/run")
    assert (lab.calls() == {}
            and lab.api.post("/scale/cores", {"vm_id": 304, "cores": 3}).status == 200)


def test_a_node_without_pct_is_503(lab):
    pct = lab.hosts["pve3"].root / "bin/pct"
    pct.rename(f"{pct}.away")
    try:
        says = "pct is not installed on node 'pve3', or not on its PATH"
        for reply, body in (
                (lab.api.post("/scale/cores", {"vm_id": 304, "cores": 3}),
                 refused("Nothing was done: " + says)),
                (lab.api.get("/resource/vm/status?vm_id=304"), error(says))):
            assert (reply.status, reply.body) == (503, body)
    finally:
        Path(f"{pct}.away").rename(pct)


def test_what_a_node_has_done_counts_before_word_of_it_has_come(lab):
    pve2 = lab.hosts["pve2"]
    with lab.behind("pve1"):
        assert lab.api.post("/scale/storage/increase", {"vm_id": 206, "disk_size": 1}).body == ok(
            "Storage increased by 1 GB for VM 206")
        reply = lab.api.post("/clone/create", {
            "vm_id": 206, "new_vm_id": 253, "new_vm_name": "late", "start": True})
        assert reply.body == ok("Cloned VM 206 to new VM 253 (late)", {
            "vm_id": 253, "started": True}) and pve2.running(253)
        pve2.faults(clone={"kills_pct": True})
        reply = lab.api.post("/clone/create", {
            "vm_id": 206, "new_vm_id": 254, "new_vm_name": "late"})
        assert (reply.status, reply.body["error"]) == (500, "pct clone 206 was ended by SIGKILL")
        assert reply.body["details"].endswith(
            "VM 254 is left half-made; if no task of it runs, "
            "remove it on node 'pve2' with: pct unlock 254 && pct destroy 254\n"
            "A volume that was being copied stays, for its configuration does not name it; "
            "look for it on node 'pve2' with: pvesm list STORAGE --vmid 254")
    pve2.path(254).unlink()
    pve2.add(206, "db-2")
    assert lab.api.delete("/clone/delete", {"vm_id": 253}).status == 200


def test_a_clone_on_another_node_outlives_the_daemon(lab):
    pve2, daemon = lab.hosts["pve2"], lab.daemon(constants={"STOP_SECONDS": 5})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        clone = begin_clone(pool, daemon, pve2, 206, 251)
        assert daemon.stop() == 0
        assert clone.result().status == 504
    assert not pve2.ended("clone")
    pve2.go()
    wait_until(lambda: pve2.ended("clone"))
    assert "lock" not in pve2.conf(251)
    assert lab.api.delete("/clone/delete", {"vm_id": 251}).status == 200


def test_a_hung_read_is_ended_on_its_own_node(lab):
    pve3, daemon = lab.hosts["pve3"], lab.daemon(proxmox={"read_timeout_seconds": 1})
    pve3.faults(status={"pause": 30})
    started = time.monotonic()
    reply = daemon.get("/resource/vm/status?vm_id=304")
    assert (reply.status, reply.body["error"]) == (
        504, "pct status 304 on node 'pve3' did not finish in 1 s and was ended")
    assert time.monotonic() - started < 4
    wait_until(lambda: not lab.processes("pve3", "status"))
    assert daemon.stop() == 0


def test_a_read_that_hangs_in_another_node_s_kernel_keeps_its_place(lab):
    """It is killed there and stays all the same, as long as pgrep sees it in state D."""
    pve3, daemon = lab.hosts["pve3"], lab.daemon(
        proxmox={"read_timeout_seconds": 1}, constants={"KILL_SECONDS": 0.5})
    pgrep, hung = pve3.root / "bin/pgrep", pve3.root / "hung"
    hung.touch()
    pgrep.write_text(f'#!/bin/sh\n[ "$*" = "-s 0 -r D" ] && [ -e {hung} ]\n')
    pgrep.chmod(0o755)
    pve3.faults(status={"pause": 30})
    try:
        for _ in range(3):
            reply = daemon.get("/resource/vm/status?vm_id=304")
            assert (reply.status, re.sub(r"\d+\)", "N)", reply.body["error"])) == (504, (
                "pct status 304 on node 'pve3' hangs and cannot be ended (process N); "
                "the storage or /etc/pve behind it does not answer"))
        assert len(pve3.rows("start")) == 1
        assert "lxc_autoscale_api_commands_in_progress 1\n" in daemon.get("/metrics").body
    finally:
        hung.unlink()
    pve3.faults()
    wait_until(lambda: daemon.get("/resource/vm/status?vm_id=304").status == 200)
    pgrep.unlink()
    assert daemon.stop() == 0


def test_a_command_that_a_signal_ends_on_another_node_is_told_as_here(lab):
    lab.hosts["pve2"].faults(snapshot={"signal": signal.SIGHUP})
    reply = lab.api.post("/snapshot/create", {"vm_id": 204, "snapshot_name": "s1"})
    assert (reply.status, reply.body) == (500, error(
        "pct snapshot 204 was ended by SIGHUP", outcome="incomplete",
        details="Hangup\nIts task may still be at work: look again before trying again"))


def test_places_count_for_each_node_and_changes_to_one_container_wait(lab):
    daemon = lab.daemon(proxmox={"max_commands": 1}, constants={"SLOT_SECONDS": 0.3})
    lab.hosts["pve2"].faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(daemon.post, "/scale/cores", {"vm_id": 204, "cores": cores})
                for cores in (5, 6)]
        wait_until(lambda: lab.hosts["pve2"].calls())
        for vm_id in (104, 304):
            assert daemon.post("/scale/cores", {"vm_id": vm_id, "cores": 4}).status == 200
        assert not any(each.done() for each in slow)
        assert "lxc_autoscale_api_commands_in_progress 1\n" in daemon.get("/metrics").body
        reply = daemon.post("/scale/cores", {"vm_id": 206, "cores": 4})
        assert (reply.status, reply.body["error"]) == (
            503, "Nothing was done: Too many commands run on node 'pve2'; try again later")
        lab.hosts["pve2"].go()
        assert [each.result().status for each in slow] == [200, 200]
    first, second = lab.hosts["pve2"].rows("start")
    assert second["at"] >= lab.hosts["pve2"].rows("end")[0]["at"]
    assert daemon.stop() == 0


def test_one_connection_to_a_node_is_shared(lab):
    lab.api.get("/resource/vm/status?vm_id=204")
    before = lab.logins("pve2")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda cores: lab.api.post(
            "/scale/cores", {"vm_id": 204 + cores % 2 * 2, "cores": cores}), range(1, 13)))
    assert {reply.status for reply in replies} == {200} and lab.logins("pve2") == before
    assert "on node 'pve2': exit 0" in lab.api.log()


def test_commands_beyond_what_a_connection_takes_wait(lab):
    lab.hosts["pve2"].faults(status={"pause": 0.2})
    daemon, ids = lab.daemon(proxmox={"max_commands": 64}), range(210, 240)
    for vm_id in ids:
        lab.hosts["pve2"].add(vm_id)
    before = lab.logins("pve2")
    with concurrent.futures.ThreadPoolExecutor(len(ids)) as pool:
        replies = list(pool.map(
            lambda vm_id: daemon.get(f"/resource/vm/status?vm_id={vm_id}"), ids))
    for vm_id in ids:
        lab.hosts["pve2"].path(vm_id).unlink()
    assert ([reply.status for reply in replies] == [200] * len(ids)
            and lab.logins("pve2") <= before + 1)
    assert daemon.stop() == 0


def test_the_same_question_to_two_nodes_has_two_answers(lab):
    for name in ("pve2", "pve3"):
        lab.inside(name, "sh", "-c", "echo $0 > /run/who", name)
    told = run_commands(lab, (
        "with concurrent.futures.ThreadPoolExecutor(6) as pool:\n"
        "    answers = list(pool.map("
        "lambda node: commands.read(node, 'cat', '/run/who').stdout, [pve2, pve3] * 3))\n"
        "print(json.dumps(answers))"), None)
    assert told == ["pve2\n", "pve3\n"] * 3


def test_a_read_that_its_own_node_ends_first_did_not_finish_in_time(lab):
    told = run_commands(lab, (
        "real = daemon.ended\n"
        "daemon.ended = lambda process, seconds: real(process, seconds and seconds + 10)\n"
        "try:\n    commands.run(pve2, ['sleep', '60'], seconds=0.2)\n"
        "except daemon.Problem as problem:\n"
        "    print(json.dumps([problem.status, problem.error]))"), None)
    assert told == [504, "sleep 60 on node 'pve2' did not finish in 0.2 s and was ended"]


HOSTILE = ["; touch /tmp/x", "$(id)", "`id`", "a b", "a\nb", "'", '"', "''; id; '", "\\", "--",
           "-x", "*", "~", "!!", "&& id", "| id", "> x", "é\t", "#", ""]


def test_no_argument_becomes_two_on_another_node(lab):
    told = run_commands(lab, (
        f"show = [{sys.executable!r}, '-IS', '-c', "
        "'import sys, json; print(json.dumps(sys.argv[1:]))', *argument]\n"
        "print(json.dumps([json.loads(commands.read(pve2, *show).stdout), "
        "json.loads(commands.run(pve2, show, changes=True).stdout)]))"), HOSTILE)
    assert told == [HOSTILE, HOSTILE]
    for body in ({"vm_id": "204; id", "cores": 1}, {"vm_id": 204, "cores": "1 --memory 64"},
                 {"vm_id": 204, "cores": "$(id)"}):
        assert lab.api.post("/scale/cores", body).status == 400
    for name in ("a b", "$(id)", "-o", "x;id", "x\ny"):
        assert lab.api.post("/snapshot/create", {"vm_id": 204, "snapshot_name": name}).status == 400
    assert lab.calls() == {}


def test_a_node_that_refuses_us_is_told_with_what_ssh_said(lab):
    known = lab.shared / "nodes/pve3/ssh_known_hosts"
    text = known.read_text()
    known.write_text(text.replace((lab.root / "pve3.key.pub").read_text().split()[1],
                                  (lab.root / "pve2.key.pub").read_text().split()[1]))
    daemon = lab.daemon(constants={"RUN_DIR": "/run/other"})
    try:
        reply = daemon.post("/scale/cores", {"vm_id": 304, "cores": 1})
    finally:
        known.write_text(text)
    assert reply.status == 503 and "Host key verification failed" in reply.body["details"]
    assert daemon.post("/scale/cores", {"vm_id": 304, "cores": 2}).status == 200
    assert daemon.stop() == 0


def test_told_to_keep_to_this_node_the_daemon_does(lab):
    daemon, before = lab.daemon(proxmox={"cluster": False}), lab.logins("pve2")
    reply = daemon.get("/resource/vm/status?vm_id=204")
    assert (reply.status, reply.body["error"]) == (404, "VM 204 does not exist on node 'pve1'")
    assert daemon.post("/scale/cores", {"vm_id": 204, "cores": 1}).status == 404
    assert [row["vm_id"] for row in daemon.get("/resource/vm/list").body["data"]] == [104, 106]
    assert (daemon.get("/resource/node/status?node_name=pve2").body["error"]
            == "Node 'pve2' does not exist; known here: pve1")
    assert lab.calls() == {} and lab.logins("pve2") == before
    assert daemon.stop() == 0


def test_a_temporary_snapshot_left_on_another_node_is_named_with_it(lab):
    pve2 = lab.hosts["pve2"]
    pve2.faults(delsnapshot={"exit": 255, "stderr": "storage is gone\n"})
    reply = lab.api.post("/clone/create", {"vm_id": 204, "new_vm_id": 252, "new_vm_name": "x"})
    assert (reply.status == 200
            and " on node 'pve2' with: pct delsnapshot 204 autoscale_clone_"
            in reply.body["data"]["warnings"][0])
    daemon = lab.daemon()
    wait_until(lambda: " (on node 'pve2')" in daemon.log("error"))
    assert daemon.stop() == 0
    pve2.faults()
    assert lab.api.delete("/snapshot/delete", {
        "vm_id": 204, "snapshot_name": pve2.snapshots(204)[0]}).status == 200
    assert lab.api.delete("/clone/delete", {"vm_id": 252}).status == 200


def test_a_node_that_does_not_know_its_cluster_yet_has_no_quorum(host, launch):
    """So it is until corosync runs: .members is that of a single host (pmxcfs, status.c)."""
    Host(host.root / "other", "pve2", host.shared).add(204, "far")
    (host.pve / "corosync.conf").write_text("totem {\n  cluster_name: lab\n}\n")
    api = launch()
    offline = "Node 'pve2' is offline; to see why, on this host: pvecm status"
    no_quorum = ("The Proxmox cluster has no quorum, so nothing can be changed; "
                 "see: pvecm status")
    for vm_id in (104, 204):
        reply = api.post("/scale/cores", {"vm_id": vm_id, "cores": 4})
        assert (reply.status, reply.body, reply.headers["Retry-After"]) == (
            503, refused("Nothing was done: " + no_quorum), "30")
    for query in ("vm/status?vm_id=204", "node/status?node_name=pve2"):
        reply = api.get("/resource/" + query)
        assert (reply.status, reply.body) == (503, error(offline))
    assert api.get("/resource/vm/config?vm_id=204").body["data"]["hostname"] == "far"
    assert api.get("/resource/vm/status?vm_id=104").body["data"]["status"] == "running"
    assert [(row["vm_id"], row["node"], row["status"]) for row in api.get(
        "/resource/vm/list").body["data"]] == [
        (104, "proxmox", "running"), (106, "proxmox", "stopped"), (204, "pve2", None)]
    assert api.get("/resource/cluster/status").body["data"] == {
        "cluster": None, "quorate": False, "nodes": [
            {"name": "proxmox", "online": True, "local": True, "address": None},
            {"name": "pve2", "online": False, "local": False, "address": None}]}
    assert host.calls() == []


@pytest.mark.parametrize("node, says", [
    ("gone", "Node 'gone' is offline; to see why, on this host: pvecm status"),
    ("pve3", "Node 'pve3' is offline; to see why, on this host: pvecm status"),
    ("pve2", "ssh is not installed, or not on the daemon's PATH")])
def test_a_node_that_cannot_be_asked_is_503(host, launch, tmp_path, node, says):
    Host(host.root / "other", node, host.shared).add(204, "far")
    host.write("pve/.members", MEMBERS)
    api = launch(env={"PATH": str(host.root / "bin")},
                 constants={"RUN_DIR": str(tmp_path / "run")}, **ASKING)
    for reply, body in ((api.get("/resource/vm/status?vm_id=204"), error(says)),
                        (api.delete("/clone/delete", {"vm_id": 204}),
                         refused("Nothing was done: " + says))):
        assert (reply.status, reply.body, "Retry-After" in reply.headers) == (503, body, True)
    assert api.get("/resource/vm/config?vm_id=204").body["data"]["hostname"] == "far"
    assert api.get("/resource/vm/status?vm_id=104").status == 200


PVE2 = module.Node("pve2", False, True, "192.0.2.2")


def test_who_share_what_was_found_of_a_node_do_not_share_its_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", str(tmp_path))
    commands, asked, problems = module.Commands(
        4, 15, module.Workers(), module.Metrics()), time.monotonic(), []
    for number in range(2):
        with pytest.raises(module.Problem) as found:
            commands.reachable(PVE2, asked)
        found.value.add_details(f"the clone {number} is left")
        problems.append(found.value.answer().body)
    assert [json.loads(body)["details"] for body in problems] == [
        "the clone 0 is left", "the clone 1 is left"]
    assert ("commands_total{command=\"true\",result=\"not_started\"} 1\n"
            in commands.metrics.render({}))


def test_those_who_ask_a_slow_node_share_its_sign_of_life(monkeypatch):
    commands, asked, go = module.Commands(
        4, 15, module.Workers(), module.Metrics()), [], threading.Event()
    monkeypatch.setattr(
        commands, "run", lambda node, argv, seconds: asked.append(argv) or go.wait(10))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(commands.reachable, PVE2, None) for _ in range(8)]
        wait_until(lambda: asked and pool._work_queue.empty())
        go.set()
        assert [each.result().problem for each in waiting] == [None] * 8
    assert asked == [["true"]]


def test_a_node_that_goes_while_a_slot_is_waited_for_is_asked_once_more(monkeypatch):
    commands, answers = module.Commands(1, 15, module.Workers(), module.Metrics()), [1, 2]

    def run(node, argv, seconds):
        if not answers:
            raise module.unavailable("gone", 30, module.NotBegun)
        answers.pop()
    monkeypatch.setattr(commands, "run", run)
    known = commands.reachable(PVE2, None)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with known.semaphore.held(0):
            waiting = pool.submit(lambda: commands.slot(PVE2, None).__enter__())
            wait_until(lambda: known.semaphore.queue)
            known.tried -= 2
        with pytest.raises(module.Problem, match="gone"):
            waiting.result()
    assert known.semaphore.free == 1


# Changing

def change_of(path, **values):
    return module.Change(module.PATHS[path], values, "127.0.0.1", None)


def test_a_configuration_that_hangs_under_a_change_is_not_read_again_and_again(host, monkeypatch):
    proxmox, released = proxmox_of(host), threading.Event()
    change = module.Change(
        module.PATHS["/scale/cores"], {"vm_id": 104, "cores": 4}, "127.0.0.1", proxmox)
    assert change.texts() == {104: host.path(104).read_text()}
    monkeypatch.setattr(module, "FILE_SECONDS", 0.05)
    monkeypatch.setattr(module, "read_text", lambda path: released.wait(10))
    for _ in range(3):
        with pytest.raises(module.Problem, match="do not answer"):
            change.texts()
        assert len(proxmox.files.hung) == 1
    released.set()
    wait_until(lambda: not proxmox.files.hung)


def test_a_change_is_either_cancelled_or_begun():
    changes, began = module.Changes(
        None, module.SimpleNamespace(start=lambda work, change: began.append(change)),
        lambda change: None), []
    begun, refused_one = (change_of("/scale/cores", vm_id=vm_id, cores=4) for vm_id in (104, 106))
    for change in (begun, refused_one):
        changes.take(change)
    assert began == [begun, refused_one]
    assert begun.future.set_running_or_notify_cancel()
    changes.cancel(begun, module.unavailable("too late", 1))
    assert not begun.started.done() and begun.problem is None and begun.future.running()
    changes.cancel(refused_one, module.unavailable("in time", 1))
    assert not refused_one.future.set_running_or_notify_cancel()
    assert refused_one.started.done() and refused_one.problem.error == "in time"
    assert {key: refused_one.row()[key]
            for key in ("state", "outcome", "began", "status", "error")} == {
        "state": "failed", "outcome": "nothing_done", "began": None, "status": 503,
        "error": "in time"}


def test_a_change_for_which_no_thread_is_left_is_refused_and_holds_up_nobody(monkeypatch):
    changes, began = module.Changes(None, module.Workers(), lambda change: None), []
    change, later = (change_of("/scale/cores", vm_id=104, cores=cores) for cores in (4, 5))
    with no_thread_left(monkeypatch):
        changes.take(change)
    with pytest.raises(module.Problem) as refusal:
        changes.answer(change, module.Client(None, "127.0.0.1"), 1)
    assert (refusal.value.status, refusal.value.error, refusal.value.fields) == (
        503, "The host has no thread left; try again later", {"outcome": "nothing_done"})
    assert [(row["state"], row["status"]) for row in changes.rows()] == [("failed", 503)]
    assert changes.pending == set()
    changes.workers = module.SimpleNamespace(start=lambda work, change: began.append(change))
    changes.take(later)
    assert began == [later]


def test_no_more_changes_wait_than_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "MAX_OPERATIONS", 1)
    changes = module.Changes(None, module.SimpleNamespace(start=lambda *_: None), None)
    first, second = (change_of("/scale/cores", vm_id=vm_id, cores=4) for vm_id in (104, 106))
    changes.take(first)
    with pytest.raises(module.Problem) as refusal:
        changes.take(second)
    assert (refusal.value.status, refusal.value.error, refusal.value.headers) == (
        503, "Too many changes wait; try again later", {"Retry-After": "30"})
    assert (changes.pending, list(changes.recent)) == ({first}, [first])


def test_changes_to_one_container_are_done_in_the_order_in_which_they_were_accepted(api, host):
    """Each was answered 202 before the next was sent."""
    headers = {"X-API-Key": KEY, "Content-Type": "application/json", "Prefer": "respond-async"}
    connection = http.client.HTTPConnection("127.0.0.1", api.port)
    wanted = list(range(1, 25))
    for cores in wanted:
        connection.request(
            "POST", "/scale/cores", json.dumps({"vm_id": 104, "cores": cores}), headers)
        reply = connection.getresponse()
        assert (reply.status, json.loads(reply.read())["status"]) == (202, "accepted")
    connection.close()
    wait_until(lambda: all(row["ended"] for row in operations(api)), 20)
    assert host.calls() == [f"pct set 104 --cores {cores}" for cores in wanted]
    assert host.conf(104)["cores"] == "24"


def test_a_change_that_uses_two_containers_waits_its_turn_for_both(api, host):
    """And others that wait behind it go on as soon as it has ended."""
    host.add(108)
    host.faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        def ask(path, **body):
            waiting = len(operations(api))
            asked = pool.submit(api.post, path, body)
            wait_until(lambda: len(operations(api)) > waiting)
            return asked
        first = ask("/scale/cores", vm_id=106, cores=3)
        clone = ask("/clone/create", vm_id=106, new_vm_id=105, new_vm_name="x", start=False)
        behind = ask("/scale/ram", vm_id=105, memory=1024)
        other = ask("/scale/cores", vm_id=108, cores=3)
        wait_until(lambda: len(host.calls()) == 2)
        assert [row["state"] for row in operations(api)] == [
            "running", "waiting", "waiting", "running"]
        host.go()
        assert [each.result().status for each in (first, clone, behind, other)] == [200] * 4
    assert [call for call in host.calls() if "108" not in call] == [
        "pct set 106 --cores 3", "pct status 106", "pct clone 106 105 --hostname x",
        "pct set 105 --memory 1024"]


def test_changes_whose_clients_have_left_hold_up_nobody(launch, host):
    api = launch(constants={"MAX_OPERATIONS": 5})
    host.faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 3})
        wait_until(host.calls)
        body = json.dumps({"vm_id": 104, "cores": 9})
        for _ in range(3):                  # more than may wait at once
            socks = [api.connect() for _ in range(4)]
            for sock in socks:
                sock.sendall((f"POST /scale/cores HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n"
                              "Content-Type: application/json\r\n"
                              f"Content-Length: {len(body)}\r\n\r\n{body}").encode())
            wait_until(lambda: [row["state"] for row in operations(api)].count("waiting") == 4)
            for sock in socks:
                sock.close()
            wait_until(lambda: [row["state"] for row in operations(api)].count("waiting") == 0)
        left = [row for row in operations(api) if row["state"] == "failed"]
        assert [(row["status"], row["error"], row["outcome"]) for row in left] == [
            (499, "The client left before this began", "nothing_done")] * 4
        last = pool.submit(api.post, "/scale/ram", {"vm_id": 104, "memory": 1024})
        wait_until(lambda: operations(api)[0]["endpoint"] == "/scale/ram")
        host.go()
        assert (first.result().status, last.result().status) == (200, 200)
    assert host.calls() == ["pct set 104 --cores 3", "pct set 104 --memory 1024"]
    assert [row for row in operations(api) if row["state"] == "failed"] == left[:3]


def test_a_change_that_runs_is_found_however_many_came_after_it(launch, host):
    api = launch(constants={"MAX_OPERATIONS": 3})
    host.faults(snapshot={"delay": True})
    reply = api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": "s1"},
                     headers={"Prefer": "respond-async"})
    for cores in range(1, 6):
        assert api.post("/scale/cores", {"vm_id": 106, "cores": cores}).status == 200
    assert [(row["endpoint"], row["state"]) for row in operations(api)] == [
        ("/scale/cores", "done"), ("/scale/cores", "done"), ("/snapshot/create", "running")]
    host.go()
    wait_until(lambda: operations(api, f"?id={reply.body['operation']}")[0]["state"] == "done")


def test_what_is_remembered_of_a_failed_change_is_not_its_whole_request(host):
    """A traceback would hold on to the connection, its headers and its TLS."""
    proxmox, told, workers = proxmox_of(host), threading.Event(), module.Workers()
    proxmox.commands = module.Commands(4, 15, workers, module.Metrics())
    changes = module.Changes(proxmox, workers, lambda change: told.set())
    change = module.Change(
        module.PATHS["/scale/cores"], {"vm_id": 999, "cores": 4}, "127.0.0.1", proxmox)

    class Held:
        """Stands for what a request has at hand."""
    held = Held()
    gone = weakref.ref(held)

    def ask(held):
        client = module.Client(None, "127.0.0.1")
        changes.take(change)
        with pytest.raises(module.Problem) as raised:
            changes.answer(change, client, 10)
        assert raised.value.status == 404 and raised.value is not change.problem
    ask(held)
    del held
    assert told.wait(10)
    gc.collect()
    assert gone() is None
    assert (change.problem.__traceback__, change.problem.__context__) == (None, None)


@pytest.mark.parametrize("result, found", [
    (module.Result(0, "cores: 2\n", "", False), "cores: 2\n"),
    (module.Result(1, "", "cat: /etc/pve/lxc/204.conf: No such file or directory\n", False), None),
    (module.Result(1, "", "cat: /etc/pve/lxc/204.conf: Transport endpoint is not connected\n",
                   False), module.Problem)])
def test_a_file_that_its_node_cannot_read_is_not_taken_for_one_that_is_not_there(result, found):
    change = change_of("/scale/cores", vm_id=204, cores=4)
    change.node = module.Node("pve2", False, True, "192.0.2.2")
    change.host = module.SimpleNamespace(
        pve=module.ClusterFiles("/etc/pve", True),
        commands=module.SimpleNamespace(read_seconds=15, run=lambda *_: result))
    if found is not module.Problem:
        assert change.texts() == {204: found}
        return
    with pytest.raises(module.Problem) as caught:
        change.texts()
    assert (caught.value.status, caught.value.error) == (
        500, "cat /etc/pve/lxc/204.conf failed: " + result.stderr.strip())


FINGERPRINT = hashlib.sha256(KEY.encode()).hexdigest()[:8]


def test_a_change_that_takes_too_long_goes_on_reserved_and_logged(launch, host):
    host.faults(set={"delay": True})
    api = launch(proxmox={"change_timeout_seconds": 1}, constants={"LOCK_SECONDS": 0.3})
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 5})
    assert (reply.status, reply.body["error"]) == (504, (
        "POST /scale/cores vm_id=104 cores=5 did not finish in 1 s; it is still running in "
        "Proxmox, and its container stays reserved until it ends. "
        "Ask for the container's state before trying again"))
    busy = api.post("/scale/ram", {"vm_id": 104, "memory": 512})
    assert busy.status == 409
    assert re.fullmatch(
        r"VM 104 has been busy for over 0\.3 s, now with: POST /scale/cores vm_id=104 cores=5, "
        r"since \S+Z",
        busy.body["error"])
    # another container is free
    assert api.post("/snapshot/create", {"vm_id": 106, "snapshot_name": "s1"}).status == 200
    host.go()
    wait_until(lambda: host.conf(104)["cores"] == "5")
    wait_until(lambda: api.log().count(
        f"vm_id=104 cores=5 by 127.0.0.1 with key {FINGERPRINT}: done, after") == 1)
    # it is counted when its line is written
    wait_until(lambda: 'scaling_actions_total{container_id="104",resource="cpu",action="set"} 1'
               in api.get("/metrics").body)
    host.faults()
    assert api.post("/scale/ram", {"vm_id": 104, "memory": 512}).status == 200


def test_fifty_increases_at_once_give_exactly_fifty(api, host):
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        codes = Counter(reply.status for reply in pool.map(
            lambda _: api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 1}),
            range(50)))
    assert codes == {200: 50} and host.conf(104)["rootfs"].endswith("size=58G")


def test_twenty_clones_of_a_running_container_at_once_leave_no_snapshot(api, host):
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(
            lambda n: api.post("/clone/create", {
                "vm_id": 104, "new_vm_id": 200 + n, "new_vm_name": f"c{n}"}),
            range(20)))
    assert [reply.body for reply in replies] == [
        ok(f"Cloned VM 104 to new VM {200 + n} (c{n})", {"vm_id": 200 + n, "started": True})
        for n in range(20)]
    assert host.snapshots(104) == [] and all(host.path(200 + n).exists() for n in range(20))


def test_one_new_id_is_cloned_to_once(api, host):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        codes = sorted(pool.map(
            lambda source: api.post("/clone/create", {
                "vm_id": source, "new_vm_id": 105, "new_vm_name": "x"}).status,
            [104, 106] * 2))
    assert codes == [200, 409, 409, 409]


NO_SPACE = "command 'mkfs.ext4 /dev/pve/vm-105-disk-0' failed: exit code 1"


@pytest.mark.parametrize("faults, status, says", [
    ({"snapshot": {"work_fails": "snapshot feature is not available"}}, 409,
     "The container's storage (or a bind mount) cannot take snapshots"),
    ({"snapshot": {"exit": 255, "stderr": "CT is locked (backup)\n"}}, 409,
     "The container is locked by Proxmox (backup); try again when that has ended"),
    ({"clone": {"work_fails": NO_SPACE}}, 500, f"pct clone 104 failed: clone failed: {NO_SPACE}"),
    ({"clone": {"signal": 9}}, 500, "pct clone 104 was ended by SIGKILL"),
    ({"status": {"exit": 255, "stderr": "broken\n"}}, 500, "pct status 104 failed: broken"),
])
def test_a_clone_that_fails_leaves_no_snapshot(api, host, faults, status, says):
    host.faults(**faults)
    reply = api.post("/clone/create", {"vm_id": 104, "new_vm_id": 105, "new_vm_name": "test_clone"})
    assert (reply.status, reply.body["error"]) == (status, says)
    assert host.snapshots(104) == [] and not host.path(105).exists()
    host.faults()
    assert api.post("/clone/create", {
        "vm_id": 104, "new_vm_id": 105, "new_vm_name": "test_clone"}).status == 200


def test_a_snapshot_that_was_half_taken_for_a_clone_is_removed(api, host):
    """The worker dies after the snapshot is in the configuration."""
    host.faults(snapshot={"dies_after": True})
    reply = api.post("/clone/create", {"vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"})
    assert reply.status == 500 and host.snapshots(104) == []
    assert [call.split()[1] for call in host.calls()] == [
        "status", "snapshot", "delsnapshot", "status"]


def test_another_task_s_lock_is_never_to_be_ended(api, host):
    """A backup begins while a container is cloned: it is named, and nobody is told to unlock it."""
    host.faults(clone={"delay": True, "work_fails": "odd"},
                delsnapshot={"exit": 255, "stderr": "CT is locked (backup)\n"})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        clone = pool.submit(api.post, "/clone/create", {
            "vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"})
        wait_until(lambda: host.path(105).exists())
        host.path(104).write_text(host.path(104).read_text().replace("lock: disk\n", ""))
        host.path(104).write_text("lock: backup\n" + host.path(104).read_text())
        (host.root / "locks").rename(host.root / "away")        # the clone's end takes no lock away
        host.go()
        reply = clone.result()
    name, = host.snapshots(104)
    assert (reply.status, reply.body["outcome"], reply.body["details"].split("\n")[-2:]) == (
        500, "incomplete", [
            f"The temporary snapshot '{name}' of VM 104 could not be removed (The container is "
            "locked by Proxmox (backup); try again when that has ended); remove it with: "
            f"pct delsnapshot 104 {name}",
            "VM 104 is locked by Proxmox (backup), by another task"])


def test_what_a_clone_leaves_behind_is_told_with_its_removal(api, host):
    host.faults(delsnapshot={"exit": 255, "stderr": "lvremove failed\n"})
    reply = api.post("/clone/create", {"vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"})
    name, = host.snapshots(104)
    note = (f"The temporary snapshot '{name}' of VM 104 could not be removed (pct delsnapshot 104 "
            f"failed: lvremove failed); remove it with: pct delsnapshot 104 {name}")
    assert reply.body == ok("Cloned VM 104 to new VM 105 (x)", {
        "vm_id": 105, "started": True, "warnings": [note]})
    assert note in api.log("error")
    host.add(107, running=False)
    host.faults(clone={"kills_pct": True})
    reply = api.post("/clone/create", {"vm_id": 107, "new_vm_id": 108, "new_vm_name": "y"})
    assert (reply.status, reply.body["error"]) == (500, "pct clone 107 was ended by SIGKILL")
    assert reply.body["details"].endswith(
        "VM 108 is left half-made; if no task of it runs, "
        "remove it with: pct unlock 108 && pct destroy 108\n"
        "A volume that was being copied stays, for its configuration does not name it; "
        "look for it with: pvesm list STORAGE --vmid 108")


@pytest.mark.parametrize("conf, path, body, says", [
    ({"lock": "backup"}, "/scale/cores", {"cores": 4},
     "The container is locked by Proxmox (backup); try again when that has ended"),
    ({"lock": "disk"}, "/snapshot/create", {"snapshot_name": "s1"},
     "The container is locked by Proxmox (disk); try again when that has ended"),
    ({"protection": 1}, "/clone/delete", {},
     "The container is protected (protection: 1); lift that in Proxmox first"),
    ({"template": 1}, "/snapshot/create", {"snapshot_name": "s1"}, "The container is a template"),
    ({"rootfs": "dir:107/vm-107-disk-0.raw,size=8G"}, "/snapshot/create", {"snapshot_name": "s1"},
     "The container's storage (or a bind mount) cannot take snapshots"),
])
def test_a_container_in_the_wrong_state_is_409(api, host, conf, path, body, says):
    host.add(107, **conf)
    reply = api.request("DELETE" if "delete" in path else "POST", path, {"vm_id": 107, **body})
    assert (reply.status, reply.body["error"]) == (409, says) and host.path(107).exists()


def test_a_lock_held_by_another_pct_is_409(api, host):
    host.write("faults.json", {"lock_wait": 0.1, "set": {}})
    import fcntl
    with open(host.root / "locks/pve-config-104.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    assert (reply.status, reply.body["error"]) == (
        409, "Another Proxmox command holds the container; try again when it has ended")


def test_what_a_destroy_refuses_before_it_begins_is_nothing_done(api, host):
    """PVE::API2::LXC, destroy_vm, frees volumes only after these checks."""
    for says in (
            "There is a replication job '104-0' for guest '104' - Please remove that first.",
            "unable to remove CT 104 - used in HA resources and purge parameter not set.",
            "can't remove CT 104 - protection mode enabled", "CT is locked (backup)",
            "can't lock file '/run/lock/lxc/pve-config-104.lock' - got timeout"):
        host.faults(destroy={"exit": 255, "stderr": says + "\n"})
        reply = api.delete("/clone/delete", {"vm_id": 104})
        assert (reply.status, reply.body) == (409, refused(reply.body["error"], details=says))


def test_what_was_refused_at_once_is_nothing_done_though_somebody_else_changes_the_container(
        api, host):
    for path, body, command, says in (
            ("/scale/storage/increase", {"disk_size": 1}, "resize", "unable to shrink disk size"),
            ("/scale/storage/increase", {"disk_size": 1}, "resize",
             "disk is already at specified size"),
            ("/snapshot/create", {"snapshot_name": "s1"}, "snapshot",
             "snapshot name 's1' already used"),
            ("/clone/create", {"new_vm_id": 105, "new_vm_name": "x"}, "clone",
             "unable to create CT 105 - CT 105 already exists on node 'pve2'"),
            ("/scale/cores", {"cores": 4}, "set", "CT is locked (backup)")):
        host.faults(**{command: {"pause": True, "exit": 255, "stderr": says + "\n"}})
        with held_up(host, command, api.post, path, {"vm_id": 106, **body}) as asked:
            host.path(106).write_text("#somebody else's\n" + host.path(106).read_text())
        reply = asked.result()
        assert (reply.status, reply.body) == (409, refused(reply.body["error"], details=says))


def test_an_existing_or_missing_snapshot_is_told(api, host):
    body = {"vm_id": 104, "snapshot_name": "backup_20241224"}
    assert api.post("/snapshot/rollback", body).body["error"] == (
        "Snapshot 'backup_20241224' does not exist")
    assert api.post("/snapshot/rollback", body).status == 404
    assert api.post("/snapshot/create", body).status == 200
    reply = api.post("/snapshot/create", body)
    assert (reply.status, reply.body) == (409, refused(
        "Snapshot 'backup_20241224' exists already",
        details="snapshot name 'backup_20241224' already used"))


def is_held(path):
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True


def test_an_increase_repeated_while_its_first_try_goes_on_without_its_daemon_counts_once(
        launch, host):
    host.faults(resize={"delay": True})
    body, first = {"vm_id": 104, "disk_size": 5, "current_size": 8}, launch()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        lost = pool.submit(first.post, "/scale/storage/increase", body)
        wait_until(host.calls)
        wait_until(lambda: is_held(host.root / "locks/pve-config-104.lock"))
        first.process.kill()
        first.process.wait(10)
        assert isinstance(lost.exception(), (OSError, http.client.HTTPException))
        again = pool.submit(launch().post, "/scale/storage/increase", body)
        wait_until(lambda: len(host.calls()) == 2)
        host.go()
        reply = again.result()
    assert (reply.status, reply.body) == (409, refused(
        "The disk has this size already", details="disk is already at specified size"))
    assert (host.conf(104)["rootfs"].endswith("size=13G")
            and host.calls() == ["pct resize 104 rootfs 13G"] * 2)
    host.faults()


@pytest.mark.parametrize("size, after", [
    ("8G", "pct resize 104 rootfs 9G"), ("8320M", "pct resize 104 rootfs 9344M")])
def test_a_size_that_is_no_whole_number_of_gb_is_kept_exactly(api, host, size, after):
    host.add(104, rootfs=f"local-lvm:vm-104-disk-0,size={size}")
    known = api.get("/resource/vm/config?vm_id=104").body["data"]["disk_gb"]
    api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 1, "current_size": known})
    assert host.calls() == [after]
    assert (module.growth("8392708K", 5, False) == "13635588K"
            and module.growth("8594132993", 5, False) == "13962842113")


def grow_for_sure(ask, request, vm_id):
    """A client's loop that is safe: it asks for the size, and repeats until that has changed
    -> what it heard.

    Each answer is None where it was lost.
    """
    size, heard = ask(vm_id), []
    while ask(vm_id) == size:
        heard.append(request({"vm_id": vm_id, "disk_size": 1, "current_size": size}))
        if heard[-1] and heard[-1].status == 200:
            break
    return heard


def grow_under_faults(tmp_path, count, seed, log=lambda text: None):
    """Increase a disk so often, while pct is killed, hangs or fails, and the daemon is stopped or
    killed."""
    host, chance, heard, innocent = Host(tmp_path / "host"), random.Random(seed), Counter(), set()
    host.add(104, running=True)
    settings = {"proxmox": {"change_timeout_seconds": 1}, "constants": {"STOP_SECONDS": 0.2}}
    daemons = [Daemon(host, **settings)]
    faults = [{}, {"kills_pct": True}, {"work_fails": "odd"}, {"delay": 0.2}, {"delay": 1.2},
              {"dies_after": True}, {"exit": 255, "stderr": "CT is locked (backup)\n"},
              {"exit": 255, "stderr": "cluster not ready - no quorum?\n"}]

    def restart(number):
        daemons[-1].process.send_signal(number)
        daemons[-1].process.wait(10)
        daemons.append(Daemon(host, **settings))

    def ask(vm_id):
        while True:                             # until the daemon is there again
            with contextlib.suppress(OSError, http.client.HTTPException):
                return daemons[-1].get(f"/resource/vm/config?vm_id={vm_id}").body["data"]["disk_gb"]

    def request(body):
        host.faults(resize=chance.choice(faults))
        ending, begun = chance.choice(
            [None, None, signal.SIGTERM, signal.SIGKILL]), len(host.rows())
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(daemons[-1].post, "/scale/storage/increase", body)
            if ending:
                wait_until(lambda: answer.done() or len(host.rows()) > begun)
                restart(ending)
            try:
                reply = answer.result()
            except (OSError, http.client.HTTPException):
                heard["lost"] += 1
                return None
        outcome = reply.body.get("outcome", "done")
        heard[outcome] += 1
        if outcome == "nothing_done":
            innocent.update(row["pid"] for row in host.rows()[begun:])
        return reply
    for number in range(count):
        size = ask(104)
        grow_for_sure(ask, request, 104)
        host.faults()
        wait_until(lambda: not commands_alive(host))
        assert ask(104) == size + 1, (number, size)
    assert daemons[-1].stop() == 0
    grew = [row["of"] for row in host.rows("grew")]
    assert len(grew) == count and not innocent & set(grew), "every nothing_done was true"
    log(f"{count} increases, {len(host.rows())} commands, {len(daemons)} daemons, "
        f"heard: {dict(heard)}")
    return heard


def test_an_increase_that_is_repeated_with_its_current_size_grows_exactly_once(tmp_path):
    heard = grow_under_faults(tmp_path, 12, 7)
    assert set(heard) >= {"done", "nothing_done", "incomplete"}


ASKER = f"127.0.0.1 with key {FINGERPRINT}"


def operations(api, query=""):
    return api.get(f"/operations{query}").body["data"]


def untimed(row):
    assert re.fullmatch("[0-9a-f]{16}", row["id"])
    return {key: value for key, value in row.items()
            if key not in ("id", "requested", "began", "ended")}


@pytest.mark.parametrize("prefer", [None, "respond-async"])
def test_a_change_that_waits_is_begun_without_its_client_only_if_it_asked_for_that(
        api, host, prefer):
    host.faults(snapshot={"delay": True})
    body = '{"vm_id": 104, "disk_size": 5}'
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(api.post, "/snapshot/create", {"vm_id": 104, "snapshot_name": "s1"})
        wait_until(host.calls)
        with api.connect() as sock:
            sock.sendall(framed("POST /scale/storage/increase HTTP/1.1", "Host: x", LOGIN,
                                JSON_KIND, *([f"Prefer: {prefer}"] if prefer else []),
                                f"Content-Length: {len(body)}", body=body))
            waiting = wait_until(
                lambda: operations(api)[0]["state"] == "waiting" and operations(api)[0])
            assert untimed(waiting) == {
                "endpoint": "/scale/storage/increase",
                "parameters": {"vm_id": 104, "disk_size": 5, "disk": "rootfs"},
                "client": ASKER, "state": "waiting", "outcome": None, "status": None,
                "error": None, "warnings": []}
            assert (waiting["began"], waiting["ended"]) == (None, None)
        if not prefer:                          # it is noticed before the snapshot has ended
            wait_until(lambda: operations(api)[0]["state"] == "failed")
        host.go()
        assert first.result().status == 200
    row = wait_until(lambda: operations(api)[0]["ended"] and operations(api)[0])
    title = f"change POST /scale/storage/increase vm_id=104 disk_size=5 disk=rootfs by {ASKER}: "
    if prefer:
        assert (row["state"], row["outcome"], row["status"], row["error"]) == (
            "done", None, 200, None)
        assert host.conf(104)["rootfs"].endswith("size=13G") and title + "done, after" in api.log()
    else:
        assert (row["state"], row["outcome"], row["status"], row["error"], row["began"]) == (
            "failed", "nothing_done", 499, "The client left before this began", None)
        assert (host.conf(104)["rootfs"].endswith("size=8G")
                and host.calls() == ["pct snapshot 104 s1"])
        assert title + "499 The client left before this began (nothing_done), after" in api.log()


def test_who_does_not_want_to_wait_finds_what_came_of_it(api, host):
    host.faults(rollback={"work_fails": "odd"})
    api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": "s1"})
    reply = api.post("/snapshot/rollback", {"vm_id": 104, "snapshot_name": "s1"},
                     headers={"Prefer": "wait=5, Respond-Async"})
    id = reply.body["operation"]
    assert (reply.status, reply.body) == (202, {
        "status": "accepted",
        "message": "POST /snapshot/rollback vm_id=104 snapshot_name=s1 was accepted",
        "operation": id})
    assert (reply.headers["Preference-Applied"], reply.headers["Location"]) == (
        "respond-async", f"/operations?id={id}")
    row = wait_until(
        lambda: operations(api, f"?id={id}")[0]["ended"] and operations(api, f"?id={id}")[0])
    assert untimed(row) == {
        "endpoint": "/snapshot/rollback", "parameters": {"vm_id": 104, "snapshot_name": "s1"},
        "client": ASKER, "state": "failed", "outcome": "incomplete", "status": 500,
        "error": "pct rollback 104 failed: odd", "warnings": [
            "VM 104 is left with the lock 'rollback'; if no task of it runs, mend it with: "
            "pct unlock 104 && pct rollback 104 s1 --start 1",
            "VM 104 ran before and is stopped now"]}
    late = [row[each] for each in ("requested", "began", "ended")]
    assert late == sorted(late) and all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", each) for each in late)
    reply = api.post("/scale/cores", {"vm_id": 106, "cores": 0},
                     headers={"Prefer": "respond-async"})
    assert (reply.status, reply.body) == (
        400, refused("Invalid cores: must be an integer between 1 and 128"))
    reply = api.post("/scale/cores", {"vm_id": 106, "cores": 4},
                     headers={"Prefer": "respond-async-x"})
    assert (reply.status, reply.body) == (200, ok("CPU cores set to 4 for VM 106"))
    # in quotes it is somebody else's value (RFC 7240 section 2)
    codes = [api.post("/scale/cores", {"vm_id": 106, "cores": 4}, headers={"Prefer": said}).status
             for said in ('foo="a, respond-async, b"', 'foo="a, b", respond-async, wait=5')]
    assert codes == [200, 202]


def test_operations_are_bounded_and_found_by_id_and_container(launch, host):
    api = launch(constants={"MAX_OPERATIONS": 3})
    for cores in range(1, 4):
        assert api.post("/scale/cores", {"vm_id": 104, "cores": cores}).status == 200
    assert api.post("/clone/create", {
        "vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"}).status == 200
    assert api.post("/scale/cores", {"vm_id": 106, "cores": 3}).status == 200
    reply = api.get("/operations")
    assert reply.body["message"] == "Found 3 operations"
    assert [(row["endpoint"], row["parameters"]["vm_id"]) for row in reply.body["data"]] == [
        ("/scale/cores", 106), ("/clone/create", 104), ("/scale/cores", 104)]
    for row in reply.body["data"]:
        assert operations(api, f"?id={row['id']}") == [row]
        assert operations(api, f"?id={row['id'].upper()}") == [row]
    for query, rows in (("?vm_id=106", [0]), ("?vm_id=105", [1]), ("?lxc_id=104", [1, 2]),
                        ("?vm_id=999", []), ("?id=" + "0" * 16, [])):
        assert operations(api, query) == [reply.body["data"][number] for number in rows], query
    assert api.get("/operations?id=x").status == 400


def test_a_stop_tells_of_a_change_that_has_only_looked_that_nothing_was_done(launch, host):
    host.faults(status={"delay": True, "pause": True})
    api = launch(constants={"STOP_SECONDS": 0.5})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(api.post, "/snapshot/rollback", {"vm_id": 104, "snapshot_name": "a1"})
        wait_until(host.calls)
        api.process.send_signal(signal.SIGTERM)
        reply = asked.result()
        host.go()
    assert (reply.status, reply.body, reply.headers["Retry-After"]) == (
        503, refused("Nothing was done: The daemon is stopping"), "30")
    assert api.process.wait(10) == 0 and host.calls() == ["pct status 104"]
    assert "left running" not in api.log()
    wait_until(lambda: host.ended("status"))


def test_a_stop_tells_what_waits_and_what_runs_apart(launch, host):
    host.faults(snapshot={"delay": True})
    api = launch(constants={"STOP_SECONDS": 0.5})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = pool.submit(api.post, "/snapshot/create", {"vm_id": 104, "snapshot_name": "s1"})
        wait_until(host.calls)
        waits = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 4})
        wait_until(lambda: [row["state"] for row in operations(api)] == ["waiting", "running"])
        id = operations(api)[1]["id"]
        api.process.send_signal(signal.SIGTERM)
        reply = waits.result()
        assert (reply.status, reply.body, reply.headers["Retry-After"]) == (
            503, refused("Nothing was done: The daemon is stopping"), "30")
        reply = runs.result()
    assert (reply.status, reply.body, reply.headers.get("Retry-After")) == (504, error(
        "POST /snapshot/create vm_id=104 snapshot_name=s1 has not finished, and the daemon stops: "
        "pct snapshot 104 s1 goes on in Proxmox, and what was to follow it will not be done. "
        "Ask for the container's state before trying again",
        outcome="running", operation=id), None)
    assert api.process.wait(5) == 0 and host.calls() == ["pct snapshot 104 s1"]
    host.go()
    wait_until(lambda: host.ended("snapshot"))
    assert host.conf(104)["cores"] == "2" and host.snapshots(104) == ["s1"]


def test_a_stop_begins_no_further_step_and_says_what_stays(launch, host):
    """While another answer is waited for, the command that runs may end."""
    host.add(104, net0="name=eth0,bridge=vmbr0,ip=192.0.2.4/24,type=veth")
    host.faults(snapshot={"delay": True})
    api = launch(constants={"STOP_SECONDS": 0.5})
    with concurrent.futures.ThreadPoolExecutor(1) as pool, api.connect() as slow:
        slow.sendall(framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                            "Content-Length: 50", body="{"))
        clone = pool.submit(api.post, "/clone/create", {
            "vm_id": 104, "new_vm_id": 105, "new_vm_name": "x", "ip": "192.0.2.5/24"})
        wait_until(lambda: "snapshot" in " ".join(host.calls()))
        api.process.send_signal(signal.SIGTERM)
        reply = clone.result()
        name, = host.snapshots(104) or re.findall(r"autoscale_clone_\w+", " ".join(host.calls()))
        host.go()
        wait_until(lambda: "The daemon is stopping (incomplete)" in api.log())
    assert (reply.status, reply.body["outcome"], reply.body["details"]) == (504, "running", (
        f"The temporary snapshot '{name}' of VM 104 stays; once no task of VM 104 runs, "
        f"remove it with: pct delsnapshot 104 {name}"))
    assert f"pct snapshot 104 {name} goes on in Proxmox" in reply.body["error"]
    assert api.process.wait(10) == 0
    assert [call for call in host.calls() if "status" not in call] == [f"pct snapshot 104 {name}"]
    assert host.snapshots(104) == [name] and not host.path(105).exists()


BOOTS = "VM {0} will be started with its node (onboot: 1); against that: pct set {0} --onboot 0"


def test_what_a_stop_leaves_unfinished_follows_from_the_steps_that_were_begun():
    change = change_of("/clone/create", vm_id=104, new_vm_id=105, new_vm_name="x",
                       ip="192.0.2.5/24")
    told = [change.unfinished()]
    for step in ("clone", "set"):
        change.steps.append(["pct", step])
        change.lost.append(change.steps[-1])            # as long as it is in work
        told.append(change.unfinished())
    assert told == [[], ["VM 105 will not have the address 192.0.2.5/24, but what VM 104 has; "
                         "do not start it with that"], []]
    del change.steps[-1], change.lost[-1]
    change.before = {104: "onboot: 1\nnet0: name=eth0,bridge=vmbr0,ip=192.0.2.4/24\n", 105: None}
    assert change.unfinished() == [*told[1], BOOTS.format(105)]
    change.steps.append(["pct", "delsnapshot"])
    change.lost = change.steps[-1:]                     # the clone has failed, and is not there
    assert change.without_address() == change.unfinished() == []
    change.steps[-1], change.done = ["pct", "set"], change.steps[:1]
    change.lost = change.steps[-1:]
    problem = change.conclude(module.Lost(504, "gone"))
    assert (problem.status, problem.error, problem.fields) == (504, "gone", {
        "outcome": "unknown", "details": "VM 105 may not have the address 192.0.2.5/24, but what "
        "VM 104 has; do not start it with that\n" + BOOTS.format(105)})


def test_containers_that_are_protected_meanwhile_are_not_changed(api, host):
    host.faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 4})
        wait_until(host.calls)
        waits = pool.submit(api.delete, "/clone/delete", {"vm_id": 104})
        wait_until(lambda: len(operations(api)) == 2)
        (host.root / "api.yaml").write_text(config_text(
            host, api.port, KEY, containers={"protected": [104]}))
        api.process.send_signal(signal.SIGHUP)
        wait_until(lambda: " INFO reloaded " in api.log())
        host.go()
        reply = waits.result()
        assert first.result().status == 200
    assert (reply.status, reply.body) == (403, refused(
        "VM 104 is protected: containers.protected in the daemon's configuration names it"))
    assert host.calls() == ["pct set 104 --cores 4"]


def test_who_waits_for_a_change_that_is_refused_goes_on(launch, host):
    api = launch(constants={"LOCK_SECONDS": 0.5, "LOOK_SECONDS": 0.02})
    host.faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        busy = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 4})
        wait_until(host.calls)
        clone = pool.submit(api.post, "/clone/create", {
            "vm_id": 104, "new_vm_id": 106, "new_vm_name": "x"})
        wait_until(lambda: len(operations(api)) == 2)
        behind = pool.submit(api.post, "/power/start", {"vm_id": 106})
        reply = clone.result()
        assert (reply.status, reply.body["error"].partition(" with: ")[0]) == (
            409, "VM 104 has been busy for over 0.5 s, now")
        assert behind.result().body == ok("Started VM 106") and not busy.done()
        host.go()
        assert busy.result().status == 200


def test_one_container_cannot_take_all_places_to_wait(launch, host):
    api = launch(constants={"MAX_TURNS": 2})
    host.faults(set={"delay": True})
    for status in (202, 202, 503):
        reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4},
                         headers={"Prefer": "respond-async"})
        assert reply.status == status
    assert reply.body == refused("Nothing was done: Too many changes wait; try again later")
    host.go()
    assert api.post("/scale/ram", {"vm_id": 106, "memory": 512}).status == 200


def test_a_shutdown_that_may_take_long_leaves_places_to_others():
    assert [change_of("/power/shutdown", vm_id=104, timeout=seconds).long
            for seconds in (60, 61)] == [False, True]


@pytest.mark.parametrize("disk, line", [
    ("rootfs", "rootfs: local-lvm:vm-104-disk-0,acl=1,size=8G\n"),
    ("mp0", "mp0: local-lvm:vm-104-disk-1,mp=/data,backup=1,size=8G\n")])
def test_a_disk_with_a_pending_change_grows_by_what_it_has_now(api, host, disk, line):
    """PVE::API2::LXC, resize_vm, knows nothing of pending changes, and Proxmox leaves one for each
    option of a disk that a running container cannot take."""
    host.add(104, mp0="local-lvm:vm-104-disk-1,mp=/data,size=8G")
    with open(host.path(104), "a") as file:
        file.write("\n[pve:pending]\n" + line)

    def size():
        data = api.get("/resource/vm/config?vm_id=104").body["data"]
        sizes = {"rootfs": data["disk_gb"], **{
            each["disk"]: each["size_gb"] for each in data["mountpoints"]}}
        return sizes[disk]
    body = {"vm_id": 104, "disk": disk, "disk_size": 5}
    for before in (8, 13):
        assert api.post("/scale/storage/increase", {**body, "current_size": before}).body == ok(
            "Storage increased by 5 GB for VM 104")
        assert size() == before + 5
    assert api.post("/scale/storage/increase", {**body, "current_size": 8}).body == refused(
        f"The {disk} of VM 104 has 18 GB now, and not 8")


# What a clone and a snapshot print, and what on stderr, when they cannot clean up
# (free_image of pve-storage's BTRFSPlugin, RBDPlugin and Plugin; PVE::Storage, vdisk_free).
COPIED, LEFT = "create full clone of mountpoint rootfs (x:106/vm-106-disk-0)\n", "clone failed: "
NOT_CLEANED = {
    "btrfs": ("clone", COPIED, LEFT + "command 'btrfs subvolume delete -- /mnt/btr/images/105/vm-10"
              "5-disk-0' failed: ERROR: Could not destroy subvolume/snapshot: No space left on "
              "device"),
    "directory": ("clone", COPIED + "cannot remove directory for /mnt/nas/images/105/subvol-105-dis"
                  "k-0.subvol: Directory not empty at /usr/share/perl5/PVE/Storage/Plugin.pm line "
                  "1136.\n", LEFT + "command 'rsync --stats -X' failed: exit code 11"),
    "mapped": ("clone", COPIED, LEFT + "can't unmap rbd device /dev/rbd-pve/f/rbd/vm-105-disk-0: "
               "rbd: unmap failed: (16) Device or resource busy"),
    "purge": ("clone", COPIED + "rbd snap purge 'vm-105-disk-0' error: Removing all snapshots: 0% "
              "complete...failed.\n", LEFT + "odd"),
    "away": ("clone", COPIED + "storage 'nas' is not online\n",
             LEFT + "storage 'nas' is not online"),
    "busy": ("clone", COPIED + "cfs-lock 'storage-ceph' error: got lock request timeout\n",
             LEFT + "cfs-lock 'storage-ceph' error: got lock request timeout"),
    # It was taken, and has not yet its refquota (ZFSPoolPlugin, volume_snapshot).
    "zfs": ("snapshot", "snapshot create failed: starting cleanup\n", "zfs error: cannot set "
            "property for 'rpool/data/subvol-106-disk-0@s1': out of space"),
    "snapshot": ("snapshot", "snapshot create failed: starting cleanup\n"
                 "rbd error: rbd: couldn't connect to the cluster!\n",
                 "rbd snapshot 'vm-106-disk-1' error: rbd: couldn't connect to the cluster!"),
}


@pytest.mark.parametrize("case", NOT_CLEANED)
def test_a_clone_or_snapshot_whose_cleanup_failed_is_never_nothing(api, host, case):
    command, stdout, stderr = NOT_CLEANED[case]
    host.faults(**{command: {"stdout": stdout, "stderr": stderr + "\n", "exit": 255}})
    path, body, vm_id = {
        "clone": ("/clone/create", {"new_vm_id": 105, "new_vm_name": "x"}, 105),
        "snapshot": ("/snapshot/create", {"snapshot_name": "s1"}, 106)}[command]
    reply = api.post(path, {"vm_id": 106, **body})
    assert (reply.headers.get("Retry-After"), reply.body["outcome"]) == (None, "incomplete")
    assert reply.body["details"].splitlines()[-2:] == [stderr.splitlines()[-1], (
        f"A volume of VM {vm_id}, or a snapshot of one, may be left on its storage; "
        f"look for it with: pvesm list STORAGE --vmid {vm_id}")]


@pytest.mark.parametrize("stayed", [True, False])
def test_a_refused_clone_that_could_not_unlock_its_source_says_so_if_the_lock_stays(
        api, host, stayed):
    """PVE::API2::LXC, clone_vm, before its task begins: there is no volume yet."""
    host.faults(clone={"pause": True, "exit": 255, "stderr": (
        "Failed to remove source CT config lock - can't lock file '/run/lock/lxc/pve-config-106.loc"
        "k' - got timeout\nunable to create CT 105 - CT 105 already exists on node 'pve2'\n")})
    with held_up(host, "clone", api.post, "/clone/create", {
            "vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"}) as asked:
        if stayed:
            host.path(106).write_text(f"lock: disk\n{host.path(106).read_text()}")
    reply = asked.result()
    assert (reply.status, reply.body["outcome"]) == (
        409, "incomplete" if stayed else "nothing_done")
    assert reply.body["details"].splitlines()[2:] == [
        "VM 106 is left with the lock 'disk'; if no task of it runs, mend it with: pct unlock 106"
        ] * stayed


def obey(host, told):
    """Run the commands of what is told, in their order -> their exit codes."""
    return [subprocess.run([host.root / "bin" / "pct", *command.split()[1:]],
                           capture_output=True).returncode
            for command in told.rpartition(" with: ")[2].split(" && ")]


def test_a_clone_that_ended_well_and_left_its_source_locked_tells_how_to_unlock_it(api, host):
    """PVE::API2::LXC, clone_vm, only warns of that, on stdout; so it is if somebody else keeps the
    source's configuration for over 10 s, as a reboot does."""
    host.faults(clone={"keeps_lock": True})
    body = {"new_vm_name": "x", "start": False}
    reply = api.post("/clone/create", {**body, "vm_id": 106, "new_vm_id": 105})
    rests, = reply.body["data"].pop("warnings")
    assert (reply.status, reply.body["data"]) == (200, {"vm_id": 105, "started": False})
    assert rests == ("VM 106 is left with the lock 'disk'; if no task of it runs, mend it with: "
                     "pct unlock 106")
    reply = api.post("/clone/create", {**body, "vm_id": 104, "new_vm_id": 107})
    runs, = reply.body["data"]["warnings"]
    name, = host.snapshots(104)
    assert (reply.status, runs) == (200, (
        f"The temporary snapshot '{name}' of VM 104 could not be removed; if no task of VM 104 "
        f"runs, remove it with: pct unlock 104 && pct delsnapshot 104 {name}"))
    host.faults()
    assert obey(host, rests) == [0] and obey(host, runs) == [0, 0]
    assert host.snapshots(104) == [] and not {"lock"} & {*host.conf(104), *host.conf(106)}


def test_a_clone_that_is_not_to_be_started_is_told_if_its_node_will_start_it(api, host):
    """clone_vm copies onboot, too."""
    host.add(107, onboot=1, net0="name=eth0,bridge=vmbr0,ip=192.0.2.4/24,type=veth")
    body = {"vm_id": 107, "new_vm_name": "x"}
    reply = api.post("/clone/create", {**body, "new_vm_id": 205})
    assert (reply.status, reply.body["data"]["started"], reply.body["data"]["warnings"][1:]) == (
        200, False, ["VM 205 was not started, for its address would be on the network twice; give "
                     "it another (ip), and start it with: pct start 205", BOOTS.format(205)])
    host.faults(set={"exit": 255, "stderr": "odd\n"})
    reply = api.post("/clone/create", {**body, "new_vm_id": 206, "ip": "192.0.2.5/24"})
    assert reply.body["details"].splitlines()[-2:] == [
        "VM 206 is stopped, without its address; remove it with: pct destroy 206",
        BOOTS.format(206)]
    host.faults(clone={"dies_after": True})
    reply = api.post("/clone/create", {**body, "new_vm_id": 207, "ip": "192.0.2.5/24"})
    assert reply.body["details"].splitlines()[-2:] == [
        "VM 207 is there now, without its address; remove it with: pct destroy 207",
        BOOTS.format(207)]


def test_a_clone_that_is_not_to_be_started_is_a_success_though_its_file_cannot_be_read(
        launch, host):
    host.add(107, onboot=1, net0="name=eth0,bridge=vmbr0,ip=192.0.2.4/24,type=veth")
    api = launch(constants={"starts_with_node": Code(
        "lambda *_: (_ for _ in ()).throw(daemon.hanging())")})
    reply = api.post("/clone/create", {"vm_id": 107, "new_vm_id": 205, "new_vm_name": "x"})
    assert (reply.status, reply.body["data"]) == (200, {
        "vm_id": 205, "started": False, "warnings": [
            "VM 205 has the static address 192.0.2.4, as VM 107 has",
            "VM 205 was not started, for its address would be on the network twice; give it "
            "another (ip), and start it with: pct start 205"]})


def test_a_source_that_may_be_locked_is_told_though_its_file_cannot_be_read(api, host):
    host.faults(clone={"keeps_lock": True, "delay": True})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(api.post, "/clone/create", {
            "vm_id": 106, "new_vm_id": 105, "new_vm_name": "x", "start": False})
        wait_until(lambda: "lock" in host.conf(106))
        text = host.path(106).read_text()
        host.path(106).unlink()
        host.path(106).mkdir()
        host.go()
        reply = asked.result()
    host.path(106).rmdir()
    host.path(106).write_text(text)
    assert (reply.status, reply.body["data"]["warnings"]) == (200, [
        "VM 106 may be left with the lock 'disk'; if no task of it runs, mend it with: "
        "pct unlock 106"])


def test_a_temporary_snapshot_that_the_storage_has_lost_is_removed_by_force(api, host):
    host.faults(delsnapshot={"work_fails": "lvremove 'pve/snap_vm-104-disk-0_x' error:   Failed to "
                                           'find logical volume "pve/snap_vm-104-disk-0_x"'})
    reply = api.post("/clone/create", {
        "vm_id": 104, "new_vm_id": 105, "new_vm_name": "x", "start": False})
    told, = reply.body["data"]["warnings"]
    name, = host.snapshots(104)
    assert (reply.status, told) == (200, (
        f"The temporary snapshot '{name}' of VM 104 could not be removed ({module.SNAPSHOT_GONE}); "
        f"if no task of VM 104 runs, remove it with: "
        f"pct unlock 104 && pct delsnapshot 104 {name} --force 1"))
    assert obey(host, told) == [0, 0] and host.snapshots(104) == []


def test_after_a_clone_that_left_its_source_locked_a_start_that_fails_tells_of_both(api, host):
    host.faults(clone={"keeps_lock": True}, start={"exit": 255, "stderr": "odd\n"})
    reply = api.post("/clone/create", {"vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"})
    assert (reply.status, reply.body) == (500, error(
        "VM 105 was cloned, but did not start: pct start 105 failed: odd", outcome="incomplete",
        details="odd\nVM 105 was cloned\nVM 106 is left with the lock 'disk'; if no task of it "
                "runs, mend it with: pct unlock 106\n"
                "VM 105 is stopped; start it with: pct start 105, or remove it with: "
                "pct destroy 105"))


def test_what_is_advised_to_remove_the_clone_of_a_protected_container_is_not_refused(api, host):
    """clone_vm copies the protection, too."""
    host.add(107, protection=1, net0="name=eth0,bridge=vmbr0,ip=192.0.2.4/24,type=veth")
    body, details = {"vm_id": 107, "new_vm_id": 105, "new_vm_name": "x", "start": True}, []
    for faults, more in (({"start": {"exit": 255, "stderr": "odd\n"}}, {}),
                         ({"set": {"exit": 255, "stderr": "odd\n"}}, {"ip": "192.0.2.5/24"}),
                         ({"clone": {"dies_after": True}}, {}),
                         ({"clone": {"kills_task": "early"}}, {})):
        host.faults(**faults)
        reply = api.post("/clone/create", {**body, **more})
        told, = (line for line in reply.body["details"].splitlines() if "pct destroy 105" in line)
        details.append(told)
        host.faults()
        assert obey(host, told)[-2:] == [0, 0] and not host.path(105).exists()
        subprocess.run([host.root / "bin/pct", "unlock", "107"])
    destroy = "pct set 105 --protection 0 && pct destroy 105"
    assert details == [
        f"VM 105 is stopped; start it with: pct start 105, or remove it with: {destroy}",
        f"VM 105 is stopped, without its address; remove it with: {destroy}",
        f"VM 105 is there now; remove it with: {destroy}",
        f"VM 105 is left half-made; if no task of it runs, remove it with: "
        f"pct unlock 105 && {destroy}"]


def test_a_clone_that_was_refused_by_a_storage_is_nothing_done(api, host):
    """The same words before anything is made."""
    host.faults(clone={"exit": 255, "stdout": "storage 'x' is odd\ncreating a clone\n",
                       "stderr": "clone failed: storage 'nas' is not online\n"})
    reply = api.post("/clone/create", {"vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"})
    assert (reply.status, reply.body["outcome"]) == (503, "nothing_done")


def test_a_rollback_that_removed_replication_snapshots_has_done_something(api, host):
    """It does so before it looks for locks (PVE::AbstractConfig, snapshot_rollback)."""
    host.faults(rollback={
        "exit": 255, "stderr": "CT is locked (backup)\n",
        "stdout": "WARN: removing replication snapshot 'z:subvol-106-disk-0@__replicate_106__'\n"})
    reply = api.post("/snapshot/rollback", {"vm_id": 106, "snapshot_name": "s1"})
    assert (reply.status, reply.body["outcome"]) == (409, "incomplete")
    assert reply.body["details"].splitlines()[-1] == (
        "VM 106 has lost replication snapshots, and will be replicated as a whole unless you keep "
        "snapshot 's1' until the next replication is done")


def test_that_a_rollback_has_lost_replication_snapshots_is_told_whatever_comes_of_it(api, host):
    """PVE::Replication, prepare, deletes them before volume_rollback_is_possible refuses; and a
    rollback that goes well warns on stdout only (PVE::AbstractConfig, snapshot_rollback)."""
    lost = ("VM 106 has lost replication snapshots, and will be replicated as a whole unless "
            "you keep snapshot 's1' until the next replication is done")
    body = {"vm_id": 106, "snapshot_name": "s1"}
    host.faults(rollback={
        "exit": 255, "stderr": "can't rollback, snapshot 's1' does not exist on 'z:x'\n",
        "stdout": "delete stale replication snapshot '__replicate_106-0_1795000000__' on z:x\n"})
    reply = api.post("/snapshot/rollback", body)
    assert (reply.status, reply.body["outcome"], reply.body["details"].splitlines()[-1]) == (
        409, "incomplete", lost)
    assert api.post("/snapshot/create", body).status == 200
    host.faults(rollback={
        "stdout": "WARN: removing replication snapshot 'z:subvol-106-disk-0@__replicate_106__'\n"})
    assert api.post("/snapshot/rollback", body).body == ok(
        "Rolled back VM 106 to snapshot 's1'", {"warnings": [lost]})


@pytest.mark.parametrize("method, path, command, says, lock", [
    ("DELETE", "/snapshot/delete", "delsnapshot",
     "Failed to obtain guest migration lock - replication running?", "snapshot-delete"),
    ("POST", "/snapshot/rollback", "rollback",
     "can't lock file '/var/lock/pve-manager/pve-migrate-106' - got timeout", "rollback")])
def test_what_waited_in_vain_for_another_snapshot_task_has_done_nothing(
        api, host, method, path, command, says, lock):
    """That task begins between our look at the container and pct's (PVE::API2::LXC::Snapshot)."""
    host.faults(**{command: {"pause": True, "exit": 255, "stderr": says + "\n"}})
    with held_up(host, command, api.request, method, path, {
            "vm_id": 106, "snapshot_name": "a1"}) as asked:
        host.path(106).write_text(f"lock: {lock}\n{host.path(106).read_text()}")
    reply = asked.result()
    assert (reply.status, reply.body) == (409, refused(
        "A replication runs or needs this snapshot; try again after it", details=says))


def test_a_task_that_did_all_its_work_and_could_not_say_so_is_told_by_what_is_there(api, host):
    """So ends pct with a full /var/log."""
    host.add(104, "web-01", net0="name=eth0,bridge=vmbr0,ip=192.0.2.4/24,type=veth")
    host.faults(**{command: {"dies_after": True} for command in (
        "clone", "snapshot", "delsnapshot")})
    details = []
    for method, path, body in (
            ("POST", "/clone/create", {"vm_id": 106, "new_vm_id": 107, "new_vm_name": "a"}),
            ("POST", "/clone/create", {"vm_id": 104, "new_vm_id": 108, "new_vm_name": "b"}),
            ("POST", "/snapshot/create", {"vm_id": 106, "snapshot_name": "s1"}),
            ("DELETE", "/snapshot/delete", {"vm_id": 106, "snapshot_name": "s1"})):
        reply = api.request(method, path, body)
        assert (reply.status, reply.body["outcome"]) == (500, "incomplete")
        details.append(reply.body["details"].splitlines()[-1])
    # of a running one, the temporary snapshot was taken though pct did not say so
    assert re.fullmatch(r"The temporary snapshot '\w+' of VM 104 was removed again", details.pop(1))
    assert details == [
        "VM 107 is there now; remove it with: pct destroy 107",
        "Snapshot 's1' of VM 106 is there now", "Snapshot 's1' of VM 106 is gone now"]
    assert host.snapshots(104) == host.snapshots(106) == [] and not host.path(108).exists()
    host.faults(clone={"dies_after": True}, rollback={"dies_after": True})
    assert api.post("/snapshot/create", {"vm_id": 106, "snapshot_name": "s2"}).status == 200
    assert api.post("/snapshot/create", {"vm_id": 106, "snapshot_name": "s3"}).status == 200
    for was in ("was", "may have been"):
        reply = api.post("/snapshot/rollback", {"vm_id": 106, "snapshot_name": "s2"})
        assert reply.body["details"].splitlines()[-1] == (
            f"VM 106 {was} rolled back to snapshot 's2'")
    reply = api.post("/clone/create", {
        "vm_id": 104, "new_vm_id": 108, "new_vm_name": "b", "ip": "192.0.2.5/24"})
    assert reply.body["details"].splitlines()[-1] == (
        "VM 108 is there now, without its address; remove it with: pct destroy 108")


@pytest.mark.parametrize("vm_id, lock, section", [
    (106, "disk", ""), (104, "snapshot", "\n[nightly]\nsnapstate: prepare\n")])
def test_a_lock_like_one_that_a_step_has_taken_away_again_is_another_task_s(
        api, host, vm_id, lock, section):
    """A clone that has ended takes its lock away (PVE::API2::LXC, clone_vm), and so does a
    snapshot (PVE::AbstractConfig, __snapshot_commit)."""
    host.faults(start={"pause": True, "exit": 255, "stderr": "startup for container failed\n"})
    with held_up(host, "start", api.post, "/clone/create", {
            "vm_id": vm_id, "new_vm_id": 105, "new_vm_name": "x"}) as asked:
        host.path(vm_id).write_text(f"lock: {lock}\n{host.path(vm_id).read_text()}{section}")
    reply = asked.result()
    assert (reply.status, reply.body["outcome"]) == (500, "incomplete")
    assert f"VM {vm_id} is locked by Proxmox ({lock}), by another task" in (
        reply.body["details"].splitlines())
    assert "unlock" not in reply.body["details"]


def test_another_snapshot_that_begins_before_the_temporary_one_is_removed_is_not_ended(api, host):
    host.faults(delsnapshot={"pause": True})
    with held_up(host, "delsnapshot", api.post, "/clone/create", {
            "vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"}) as asked:
        host.path(104).write_text(f"lock: snapshot\n{host.path(104).read_text()}")
    reply = asked.result()
    name, = host.snapshots(104)
    assert (reply.status, reply.body["data"]["warnings"]) == (200, [
        f"The temporary snapshot '{name}' of VM 104 could not be removed (The container is locked "
        "by Proxmox (snapshot); try again when that has ended, or, if no task of it runs, end it "
        f"on its node with: pct unlock 104); remove it with: pct delsnapshot 104 {name}"])


def test_a_reboot_that_a_stop_of_others_came_before_is_no_success(api, host):
    host.faults(reboot={"pause": True, "exit": 0})
    with held_up(host, "reboot", api.post, "/power/reboot", {"vm_id": 104}) as asked:
        (host.cgroup / "lxc/104").rename(host.root / "trash/104")
    reply = asked.result()
    assert (reply.status, reply.body) == (500, error(
        "VM 104 does not run after its reboot; it may have been stopped meanwhile",
        outcome="incomplete",
        details="VM 104 ran before and is stopped now; start it with: pct start 104"))


def test_a_bind_mount_has_no_size_that_could_be_the_current_one(api, host):
    host.add(107, mp0="/srv/x,mp=/x")
    assert api.post("/scale/storage/increase", {
        "vm_id": 107, "disk": "mp0", "disk_size": 5, "current_size": 8}).body == refused(
            "The mp0 of VM 107 has no size of its own, and not 8")


@pytest.mark.parametrize("says, error, status", [
    ("lvremove 'pve/vm-105-disk-0' error:   Logical volume pve/vm-105-disk-0 in use.",
     "The volume or snapshot is in use (a backup, a replication, a linked clone or a mount)", 409),
    ("rbd rm 'vm-105-disk-0' error: rbd: error: image still has watchers",
     "The volume or snapshot is in use (a backup, a replication, a linked clone or a mount)", 409),
    ("'storage-local-lvm'-locked command timed out - aborting",
     "The storage is busy with another Proxmox command", 500)])
def test_a_clone_that_could_not_clean_up_is_not_called_nothing(api, host, says, error, status):
    """The configurations are as before (PVE::LXC, copy_volume; PVE::API2::LXC, clone_vm)."""
    host.faults(clone={"work_fails": says})
    reply = api.post("/clone/create", {"vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"})
    details = reply.body.pop("details").splitlines()
    assert (reply.status, reply.headers.get("Retry-After"), reply.body) == (
        status, None, {"status": "error", "error": error, "outcome": "incomplete"})
    assert details[-2:] == [f"clone failed: {says}", (
        "A volume of VM 105, or a snapshot of one, may be left on its storage; "
        "look for it with: pvesm list STORAGE --vmid 105")]


def test_a_value_that_a_running_container_may_have_though_its_file_does_not_is_told(api, host):
    """It is applied first, and written then (PVE::API2::LXC::Config, update_vm)."""
    says = "unable to open file '/etc/pve/nodes/p/lxc/104.conf.tmp.4711' - Permission denied"
    host.faults(set={"exit": 255, "stderr": says + "\n"})
    reply = api.post("/scale/ram", {"vm_id": 104, "memory": 512})
    assert (reply.status, reply.headers.get("Retry-After"), reply.body) == (500, None, error(
        "/etc/pve is read-only: the cluster has no quorum; see: pvecm status",
        outcome="incomplete",
        details=says + "\nIf VM 104 runs, it may have the new value until its next start"))


def test_of_a_rolled_back_container_under_ha_it_is_said_who_starts_it(api, host):
    host.faults(rollback={
        "pause": True, "exit": 0, "stdout": "Requesting HA start for CT 104\n"})
    with held_up(host, "rollback", api.post, "/snapshot/rollback", {
            "vm_id": 104, "snapshot_name": "s1"}) as asked:
        (host.cgroup / "lxc/104").rename(host.root / "trash/104")
    assert asked.result().body == ok("Rolled back VM 104 to snapshot 's1'", {"warnings": [
        "Proxmox HA was asked to start VM 104 and may do so later; "
        "ask for the container's state"]})


def test_a_container_that_stays_frozen_is_told_whether_its_snapshot_was_taken_or_not(api, host):
    """A thaw that fails is a warning of the task (PVE::LXC::Config, __snapshot_freeze)."""
    (host.cgroup / "lxc/104/ns/cgroup.events").write_text("populated 1\nfrozen 1\n")
    frozen = ("VM 104 is frozen, so that all its processes stand still; if no task of it runs, "
              "thaw it with: lxc-unfreeze -n 104")
    body = {"vm_id": 104, "snapshot_name": "s1"}
    assert api.post("/snapshot/create", body).body == ok(
        "Snapshot 's1' created for VM 104", {"warnings": [frozen]})
    says = "Insufficient free space: 3 extents needed, but only 1 available"
    host.faults(snapshot={"work_fails": says})
    reply = api.post("/snapshot/create", {**body, "snapshot_name": "s2"})
    assert (reply.status, reply.body["outcome"], reply.body["details"].splitlines()[-1]) == (
        409, "incomplete", frozen)


RUNS, RESTS, NEW = 124, 126, 150              # here; on pve2 each is a hundred more
Story = namedtuple("Story", "name vm_id line body defaults steps vm new message counted",
                   defaults=[None])
TWIN = {"new_vm_id": NEW, "new_vm_name": "twin"}
# vm and new: what the containers are like if all goes well
STORIES = {each.name: each for each in (
    Story("cores", RUNS, "POST /scale/cores", {"cores": 4}, {}, "set",
          "running cores=4 [s1]", "none",
          "CPU cores set to 4 for VM 124", ("cpu", "set")),
    Story("ram", RUNS, "POST /scale/ram", {"memory": 4096}, {}, "set",
          "running memory=4096 [s1]", "none",
          "Memory set to 4096 MB for VM 124", ("ram", "set")),
    Story("rootfs", RUNS, "POST /scale/storage/increase", {"disk_size": 5}, {"disk": "rootfs"},
          "resize",
          "running rootfs=local-lvm:vm-124-disk-0,size=13G [s1]", "none",
          "Storage increased by 5 GB for VM 124", ("storage", "increase")),
    Story("mp0", RUNS, "POST /scale/storage/increase", {"disk_size": 5, "disk": "mp0"}, {},
          "resize",
          "running mp0=local-lvm:vm-124-disk-1,mp=/data,size=9G [s1]", "none",
          "Storage increased by 5 GB for VM 124", ("storage", "increase")),
    Story("snapshot", RUNS, "POST /snapshot/create", {"snapshot_name": "s2"}, {}, "snapshot",
          "running parent=s2 [s1] [s2]", "none", "Snapshot 's2' created for VM 124"),
    Story("unsnapshot", RUNS, "DELETE /snapshot/delete", {"snapshot_name": "s1"}, {}, "delsnapshot",
          "running parent=", "none", "Snapshot 's1' of VM 124 deleted"),
    Story("rollback-runs", RUNS, "POST /snapshot/rollback", {"snapshot_name": "s1"}, {},
          "status rollback",
          "running [s1]", "none", "Rolled back VM 124 to snapshot 's1'"),
    Story("rollback-stopped", RESTS, "POST /snapshot/rollback", {"snapshot_name": "s1"}, {},
          "status rollback",
          "stopped [s1]", "none", "Rolled back VM 126 to snapshot 's1'"),
    Story("clone-stopped", RESTS, "POST /clone/create", TWIN, {}, "status clone start",
          "stopped [s1]", "running", "Cloned VM 126 to new VM 150 (twin)"),
    Story("clone-runs", RUNS, "POST /clone/create", {**TWIN, "start": True}, {},
          "status snapshot clone delsnapshot start", "running [s1]", "running",
          "Cloned VM 124 to new VM 150 (twin)"),
    Story("clone-ip", RESTS, "POST /clone/create", {**TWIN, "ip": "192.0.2.5/24"}, {},
          "status clone set start",
          "stopped [s1]", "running ip=192.0.2.5/24", "Cloned VM 126 to new VM 150 (twin)"),
    Story("destroy", RUNS, "DELETE /clone/delete", {}, {}, "status destroy", "none", "none",
          "Deleted VM 124"),
    Story("start", RESTS, "POST /power/start", {}, {}, "start", "running [s1]", "none",
          "Started VM 126"),
    Story("stop", RUNS, "POST /power/stop", {}, {}, "stop", "stopped [s1]", "none",
          "Stopped VM 124"),
    Story("shutdown", RUNS, "POST /power/shutdown", {}, {"timeout": 60}, "shutdown",
          "stopped [s1]", "none",
          "Shut down VM 124"),
    Story("reboot", RUNS, "POST /power/reboot", {}, {"timeout": 60}, "reboot",
          "running [s1]", "none", "Rebooted VM 124"),
)}
BEFALLS = {                                     # a step -> what befalls it
    "locked": lambda step: {"exit": 255, "stderr": "CT is locked (backup)\n"},
    "busy": lambda step: {
        "exit": 255,
        "stderr": "cfs-lock 'storage-local-lvm' error: got lock request timeout\n"},
    "fails": lambda step: (
        {"exit": 255, "stderr": "odd\n"} if step == "status" else {"work_fails": "odd"}),
    "killed": lambda step: {"signal": 9} if step == "status" else {"kills_pct": True},
    "unread": lambda step: {"hides": None},     # its container's file cannot be read any more
    "hangs": lambda step: {"pause": True} if step == "status" else {"delay": True},
    "lost": lambda step: {"pause": True} if step == "status" else {"delay": True},
}
SOON = {        # deadlines that are short for what hangs, and for nothing that is only slow
    "Changes.answer": "(lambda real: lambda self, change, client, seconds: real("
                      "self, change, client, "
                      "0.1 if daemon.os.path.exists('{0}/answers.soon') "
                      "else seconds))(daemon.Changes.answer)",
    "Commands.run": "(lambda real: lambda self, node, argv, *more, **named: real("
                    "self, node, argv, *more, **dict({{'seconds': 0.5}} if any("
                    "daemon.os.path.exists('{0}/' + daemon.os.path.basename(each) + '.soon') "
                    "for each in argv[:2]) else {{}}, **named)))(daemon.Commands.run)",
    "Future": "(lambda real: type('Future', (real,), {{'exception': lambda self, seconds=None: "
              "real.exception(self, 0.5 if daemon.os.path.exists('{0}/hidden.soon') "
              "else seconds)}}))(daemon.Future)",
}
CALM = ("arch: amd64\ncores: 2\nhostname: web\nmemory: 2048\n"
        "mp0: local-lvm:vm-{0}-disk-1,mp=/data,size=4G\n"
        "net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,type=veth,ip=dhcp\n{1}"
        "rootfs: local-lvm:vm-{0}-disk-0,size=8G\nswap: 512\n")


def cut_off(lab):
    """End all connections to pve2."""
    for pid in lab.processes("pve2", "sshd: root"):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


class Stage:
    """A host on which one fault after the other is tried, and the daemon that is asked to change
    its containers."""

    def __init__(self, host, first=0):
        self.host, self.first, self.cut, self.api = host, first, None, None
        self.counted = Counter()            # by the metrics, until the last fault

    def constants(self):
        return {name: Code(patch.format(self.host.root)) for name, patch in SOON.items()}

    def set(self):
        """All as at the beginning, whatever was left."""
        self.host.faults()
        (self.host.root / "calls.jsonl").unlink(missing_ok=True)
        self.remove()
        for vm_id in (RUNS + self.first, RESTS + self.first):
            calm = CALM.format(vm_id, "")
            self.host.path(vm_id).write_text(
                f"{CALM.format(vm_id, f'parent: s1{chr(10)}')}\n[s1]\n{calm}snaptime: 1700000000\n")
            self.host.list(vm_id)
        (self.host.cgroup / f"lxc/{RUNS + self.first}").mkdir()

    def remove(self):
        known = json.loads((self.host.shared / ".vmlist").read_text())
        for vm_id in (RUNS + self.first, RESTS + self.first, NEW + self.first):
            shutil.rmtree(self.host.cgroup / f"lxc/{vm_id}", ignore_errors=True)
            self.host.path(vm_id).unlink(missing_ok=True)
            known.get("ids", {}).pop(str(vm_id), None)
        self.host.write(".vmlist", known, self.host.shared)

    def show(self, vm_id):
        """Whether a container runs, what its file has in other ways than at the beginning, and
        its snapshots."""
        path = self.host.path(vm_id + self.first)
        if not path.exists():
            return "none" + " running" * self.host.running(vm_id + self.first)
        base = dict(line.split(": ") for line in CALM.format(vm_id + self.first, "").splitlines())
        base.update({"hostname": "twin"} if vm_id == NEW else {"parent": "s1"})
        conf = self.host.conf(vm_id + self.first)
        for values in (base, conf):             # a clone has a hwaddr of its own
            net, _, address = values.pop("net0").rpartition(",")
            hwaddr, own = "BC:24:11:00:00:01", f"BC:24:11:{(vm_id + self.first) % 256:02X}:00:00"
            values["net0"] = net.replace(own, hwaddr) if vm_id == NEW else net
            values["ip"] = address[3:]
        changed = [f"{key}={conf.get(key, '')}" for key in sorted({**base, **conf})
                   if conf.get(key) != base.get(key)]
        sections = [each.partition("]") for each in path.read_text().split("\n\n[")[1:]]
        states = [(name, re.search("^snapstate: (.+)", text, re.MULTILINE))
                  for name, _, text in sections]
        return self.plain(" ".join([
            "running" if self.host.running(vm_id + self.first) else "stopped", *changed,
            *(f"[{name}{f' {state[1]}' if state else ''}]" for name, state in states)]))

    def plain(self, told):
        """What was told, without what differs from run to run and from node to node."""
        folder = self.host.root.parent.parent if self.first else self.host.root
        text = json.dumps(told).replace(str(folder), "")    # which may have a number of its own
        text = re.sub(r"autoscale_clone_[0-9a-f]{8}", "TEMPORARY", text)
        for vm_id in (RUNS, RESTS, NEW):
            text = re.sub(rf"\b{vm_id + self.first}\b", str(vm_id), text)
        return json.loads(re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME", text))

    def unhide(self):
        """Let whoever reads a file that hangs go on with what it should have had."""
        (self.host.root / "hidden.soon").unlink(missing_ok=True)
        for hidden in self.host.path(RUNS).parent.glob("*.hidden"):
            path, pipe = hidden.with_suffix(""), hidden.with_suffix(".pipe")
            os.link(path, pipe)                         # so that there is no moment without a file
            hidden.rename(path)
            with contextlib.suppress(OSError):          # nobody reads it
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            pipe.unlink()

    def scaled(self):
        values = parse_exposition(self.api.get("/metrics").body)[1]
        return Counter({self.plain(key)[len("lxc_autoscale_scaling_"):]: int(value)
                        for key, value in values.items()
                        if key.startswith("lxc_autoscale_scaling_")})

    def play(self, name, step, fault):
        """Try a fault at a step of a change -> all that can be seen of it."""
        story = STORIES[name]
        method, path = story.line.split()
        befallen = (NEW if name.startswith("clone") and step in ("clone", "set", "start")
                    else story.vm_id)
        befalls = BEFALLS[fault](step)
        if "hides" in befalls:
            befalls["hides"] = str(befallen + self.first)
        goes_on = (fault == "unread" and step in ("status", "snapshot")
                   and not story.steps.endswith(step))
        soon = "answers" if goes_on else {
            "unread": f"{befallen + self.first}.conf",
            "hangs": "status" if step == "status" else "answers"}.get(fault, "nothing")
        self.set()
        self.host.faults(**{step: befalls})
        (self.host.root / f"{soon}.soon").touch()
        body = {"vm_id": story.vm_id + self.first, **story.body}
        if "new_vm_id" in body:
            body["new_vm_id"] += self.first
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.api.request, method, path, body)
            if fault == "lost":
                wait_until(lambda: asked.done() or any(
                    call.startswith(f"pct {step} ") for call in self.host.calls()))
                self.cut()
            reply = asked.result()
        row = self.api.get(f"/operations?vm_id={story.vm_id + self.first}").body["data"][0]
        (self.host.root / f"{soon}.soon").unlink()
        if fault == "unread" and reply.status == 504:           # the next command hangs
            after = story.steps.split()[story.steps.split().index(step) + 1]
            wait_until(lambda: any(call.startswith(f"pct {after} ") for call in self.host.calls()))
        self.unhide()
        self.host.go()
        wait_until(lambda: self.api.get(f"/operations?id={row['id']}").body["data"][0]["ended"])
        # one whose end is never noted
        cut_off = fault == "killed" or (fault in ("hangs", "lost") and step == "status")
        wait_until(lambda: len(self.host.rows("end")) + cut_off >= len(self.host.rows()))
        if cut_off:                             # or an end that is noted late, in the next one
            wait_until(lambda: not commands_alive(self.host))
        later, = self.api.get(f"/operations?id={row['id']}").body["data"]
        logged = [line for line in self.api.log().splitlines()
                  if f" change {story.line} vm_id={story.vm_id + self.first}" in line]
        before, self.counted = self.counted, self.scaled()
        scaled = self.counted - before
        body = reply.body
        if "operation" in body:
            assert body["operation"] == row["id"]
            body["operation"] = "ID"
        assert re.fullmatch("[0-9a-f]{16}", row["id"])
        self.told = body.get("details") or "\n".join(row["warnings"])
        return self.plain({
            "status": reply.status, "after": reply.headers.get("Retry-After"), "body": body,
            "row": {**row, "id": "ID"}, "later": {**later, "id": "ID"},
            "log": re.sub(r"after \d+\.\d s", "after", logged[-1][21:]),
            "scaled": dict(scaled),
            "vm": self.show(story.vm_id), "new": self.show(NEW)})


@pytest.fixture(scope="module")
def stage_there(built):
    built.reset()
    stage = Stage(built.hosts["pve2"], 100)
    stage.cut, stage.api = functools.partial(cut_off, built), built.daemon(
        constants={**stage.constants(), "RUN_DIR": "/run/stage"})
    yield stage
    stage.remove()
    assert (stage.api.stop(), "internal error" in stage.api.log("error")) == (0, False)


def test_an_increase_that_is_repeated_over_broken_connections_grows_exactly_once(stage_there):
    stage, chance, heard, innocent = stage_there, random.Random(3), Counter(), set()
    host, vm_id = stage.host, RUNS + stage_there.first
    stage.set()

    def ask(vm_id):
        return stage.api.get(f"/resource/vm/config?vm_id={vm_id}").body["data"]["disk_gb"]

    def request(body):
        cut, begun = chance.random() < 0.6, len(host.rows())
        host.faults(resize=chance.choice([{}, {"delay": 0.1}, {"kills_pct": True}, {"delay": 0.5}]))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(stage.api.post, "/scale/storage/increase", body)
            wait_until(lambda: answer.done() or len(host.rows()) > begun)
            if cut:
                stage.cut()
            reply = answer.result()
        outcome = reply.body.get("outcome", "done")
        heard[outcome] += 1
        if outcome == "nothing_done":
            innocent.update(row["pid"] for row in host.rows()[begun:])
        return reply
    for size in range(8, 16):
        grow_for_sure(ask, request, vm_id)
        wait_until(lambda: not commands_alive(host))
        assert ask(vm_id) == size + 1
    grew = [row["of"] for row in host.rows("grew")]
    assert len(grew) == 8 and not innocent & set(grew) and set(heard) >= {"unknown", "done"}
    stage.counted = stage.scaled()


ROWS_HERE = [(name, step, fault) for name, story in STORIES.items() for step in story.steps.split()
             for fault in BEFALLS if fault != "lost"]


@pytest.fixture(scope="module")
def stage_here(tmp_path_factory):
    stage = Stage(Host(tmp_path_factory.mktemp("stage") / "host"))
    stage.api = Daemon(stage.host, constants=stage.constants())
    yield stage
    assert (stage.api.stop(), "internal error" in stage.api.log("error")) == (0, False)


# What is so after the commands were run that an answer names, where that is not all as before, or
# all as asked for.
MENDED = {("clone-runs", "clone"): ("running [s1]", "stopped")}     # it was lost, and has gone on

# A fault at a look, or at the first command that changes something: status, outcome, error,
# details. Where nothing was done, all is as before; else, all is as it should be in the end.
GOES_ON = ("{title} did not finish in 0.1 s; it is still running in Proxmox, and its container "
           "stays reserved until it ends. Ask for the container's state before trying again")
LOST = ("The connection to node 'pve2' was lost during pct {step} {vm_id}, which goes on if the "
        "node does. Ask for the container's state before trying again")
AT_FIRST = {
    "locked": (409, "nothing_done",
               "The container is locked by Proxmox (backup); try again when that has ended",
               "CT is locked (backup)"),
    "busy": (503, "nothing_done", "The storage is busy with another Proxmox command; try again",
             "cfs-lock 'storage-local-lvm' error: got lock request timeout"),
    "unread": (200, None, None, None),
    "hangs": (504, "running", GOES_ON, None),
    "lost": (504, "unknown", LOST, None),
}
AT_A_LOOK = {
    **AT_FIRST,
    "fails": (500, "nothing_done", "pct status {vm_id} failed: odd", "odd"),
    "killed": (500, "nothing_done", "pct status {vm_id} was ended by SIGKILL", None),
    "unread": (504, "running", GOES_ON, None),              # pct cannot read it either
    "hangs": (504, "nothing_done",
              "pct status {vm_id}{on} did not finish in 0.5 s and was ended", None),
    "lost": (503, "nothing_done",
             "Node 'pve2' cannot run commands over SSH; to see why, on this host: "
             "pvesh get /nodes/pve2/version", None),
}

# All other rows. A detail with = before it says what was done, with + what is left; both come
# after what pct said. The last two columns show the container and the clone. A row for `there`
# differs on another node by more than {there}.
SPECIAL = dict(line.split(": ", 1) for line in """
cores set fails: 500 incomplete | pct set 124 failed: odd | odd | running [s1] | none
cores set killed: 500 incomplete | pct set 124 was ended by SIGKILL\
 | + Its task may still be at work: look again before trying again | running [s1] | none
ram set fails: 500 incomplete | pct set 124 failed: odd | odd | running [s1] | none
ram set killed: 500 incomplete | pct set 124 was ended by SIGKILL\
 | + Its task may still be at work: look again before trying again | running [s1] | none
rootfs resize fails: 500 incomplete | The rootfs of VM 124 was not grown as asked; its size is now\
 8G | + odd | running [s1] | none
rootfs resize killed: 500 incomplete | pct resize 124 was ended by SIGKILL\
 | + Its task may still be at work: look again before trying again | running [s1] | none
rootfs resize unread: 500 unknown | pct resize 124 has ended, but what it did cannot be read:\
 Proxmox's files (/etc/pve) do not answer; see: systemctl status pve-cluster\
 | running rootfs=local-lvm:vm-124-disk-0,size=13G [s1] | none
mp0 resize fails: 500 incomplete | The mp0 of VM 124 was not grown as asked; its size is now 4G\
 | + odd | running [s1] | none
mp0 resize killed: 500 incomplete | pct resize 124 was ended by SIGKILL\
 | + Its task may still be at work: look again before trying again | running [s1] | none
mp0 resize unread: 500 unknown | pct resize 124 has ended, but what it did cannot be read:\
 Proxmox's files (/etc/pve) do not answer; see: systemctl status pve-cluster\
 | running mp0=local-lvm:vm-124-disk-1,mp=/data,size=9G [s1] | none
snapshot snapshot fails: 500 incomplete | pct snapshot 124 failed: odd\
 | snapshot create failed: starting cleanup | odd | running [s1] | none
snapshot snapshot killed: 500 incomplete | pct snapshot 124 was ended by SIGKILL\
 | + VM 124 is left with the lock 'snapshot'; if no task of it runs, mend it{there} with: pct\
 unlock 124 && pct delsnapshot 124 s2 | running lock=snapshot [s1] [s2 prepare] | none
unsnapshot delsnapshot fails: 500 incomplete | pct delsnapshot 124 failed: odd | odd\
 | + VM 124 is left with the lock 'snapshot-delete'; if no task of it runs, mend it{there} with:\
 pct unlock 124 && pct delsnapshot 124 s1 | running lock=snapshot-delete [s1 delete] | none
unsnapshot delsnapshot killed: 500 incomplete | pct delsnapshot 124 was ended by SIGKILL\
 | + VM 124 is left with the lock 'snapshot-delete'; if no task of it runs, mend it{there} with:\
 pct unlock 124 && pct delsnapshot 124 s1 | running lock=snapshot-delete [s1 delete] | none
rollback-runs rollback fails: 500 incomplete | pct rollback 124 failed: odd | odd\
 | + VM 124 is left with the lock 'rollback'; if no task of it runs, mend it{there} with: pct\
 unlock 124 && pct rollback 124 s1 --start 1 | + VM 124 ran before and is stopped now\
 | stopped lock=rollback [s1] | none
rollback-runs rollback killed: 500 incomplete | pct rollback 124 was ended by SIGKILL\
 | + VM 124 is left with the lock 'rollback'; if no task of it runs, mend it{there} with: pct\
 unlock 124 && pct rollback 124 s1 --start 1 | + VM 124 ran before and is stopped now\
 | stopped lock=rollback [s1] | none
rollback-stopped rollback fails: 500 incomplete | pct rollback 126 failed: odd | odd\
 | + VM 126 is left with the lock 'rollback'; if no task of it runs, mend it{there} with: pct\
 unlock 126 && pct rollback 126 s1 | stopped lock=rollback [s1] | none
rollback-stopped rollback killed: 500 incomplete | pct rollback 126 was ended by SIGKILL\
 | + VM 126 is left with the lock 'rollback'; if no task of it runs, mend it{there} with: pct\
 unlock 126 && pct rollback 126 s1 | stopped lock=rollback [s1] | none
clone-stopped clone fails: 500 incomplete | pct clone 126 failed: clone failed: odd\
 | creating a clone of container 126 with ID 150 | create full clone of mountpoint rootfs\
 (local-lvm:vm-126-disk-0) | clone failed: odd | stopped [s1] | none
clone-stopped clone killed: 500 incomplete | pct clone 126 was ended by SIGKILL\
 | creating a clone of container 126 with ID 150 | create full clone of mountpoint rootfs\
 (local-lvm:vm-126-disk-0) | + VM 126 is left with the lock 'disk'; if no task of it runs, mend\
 it{there} with: pct unlock 126 | + VM 150 is left half-made; if no task of it runs, remove\
 it{there} with: pct unlock 150 && pct destroy 150\
 | + A volume that was being copied stays, for its configuration does not name it; look for\
 it{there} with: pvesm list STORAGE --vmid 150 | stopped lock=disk [s1]\
 | stopped lock=create mp0= rootfs=
clone-stopped clone unread: 500 incomplete | VM 150 was cloned, but did not start: Proxmox's files\
 (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | + What is left cannot be read: Proxmox's files (/etc/pve) do not answer; see: systemctl status\
 pve-cluster | stopped [s1] | stopped
clone-stopped start locked: 409 incomplete | VM 150 was cloned, but did not start: The container is\
 locked by Proxmox (backup) | CT is locked (backup) | = VM 150 was cloned\
 | + VM 150 is stopped; start it{there} with: pct start 150, or remove it with: pct destroy 150\
 | stopped [s1] | stopped
clone-stopped start busy: 500 incomplete | VM 150 was cloned, but did not start: The storage is\
 busy with another Proxmox command | cfs-lock 'storage-local-lvm' error: got lock request timeout\
 | = VM 150 was cloned | + VM 150 is stopped; start it{there} with: pct start 150, or remove it\
 with: pct destroy 150 | stopped [s1] | stopped
clone-stopped start fails: 500 incomplete | VM 150 was cloned, but did not start: pct start 150\
 failed: odd | odd | = VM 150 was cloned | + VM 150 is stopped; start it{there} with: pct start\
 150, or remove it with: pct destroy 150 | stopped [s1] | stopped
clone-stopped start killed: 500 incomplete | VM 150 was cloned, but did not start: pct start 150\
 was ended by SIGKILL | = VM 150 was cloned | + VM 150 is stopped; if no task of it runs, start\
 it{there} with: pct start 150, or remove it with: pct destroy 150 | stopped [s1] | stopped
clone-runs snapshot fails: 500 incomplete | pct snapshot 124 failed: odd\
 | snapshot create failed: starting cleanup | odd | running [s1] | none
clone-runs snapshot killed: 500 incomplete | pct snapshot 124 was ended by SIGKILL\
 | + The temporary snapshot 'TEMPORARY' of VM 124 could not be removed; if no task of VM 124 runs,\
 remove it{there} with: pct unlock 124 && pct delsnapshot 124 TEMPORARY\
 | running lock=snapshot [s1] [TEMPORARY prepare] | none
clone-runs snapshot unread: 504 running | POST /clone/create vm_id=124 new_vm_id=150\
 new_vm_name=twin start=True did not finish in 0.1 s; it is still running in Proxmox, and its\
 container stays reserved until it ends. Ask for the container's state before trying again\
 | running [s1] | running
clone-runs clone locked: 409 incomplete | The container is locked by Proxmox (backup)\
 | CT is locked (backup) | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again\
 | running [s1] | none
clone-runs clone busy: 500 incomplete | The storage is busy with another Proxmox command\
 | cfs-lock 'storage-local-lvm' error: got lock request timeout\
 | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again | running [s1] | none
clone-runs clone fails: 500 incomplete | pct clone 124 failed: clone failed: odd\
 | creating a clone of container 124 with ID 150 | create full clone of mountpoint rootfs\
 (local-lvm:vm-124-disk-0) | clone failed: odd | = The temporary snapshot 'TEMPORARY' of VM 124 was\
 removed again | running [s1] | none
clone-runs clone killed: 500 incomplete | pct clone 124 was ended by SIGKILL\
 | creating a clone of container 124 with ID 150 | create full clone of mountpoint rootfs\
 (local-lvm:vm-124-disk-0) | + The temporary snapshot 'TEMPORARY' of VM 124 could not be removed;\
 if no task of VM 124 runs, remove it{there} with: pct unlock 124 && pct delsnapshot 124 TEMPORARY\
 | + VM 150 is left half-made; if no task of it runs, remove it{there} with: pct unlock 150 && pct\
 destroy 150\
 | + A volume that was being copied stays, for its configuration does not name it; look for\
 it{there} with: pvesm list STORAGE --vmid 150\
 | running lock=disk parent=TEMPORARY [s1] [TEMPORARY]\
 | stopped lock=create mp0= rootfs=
clone-runs clone unread: 500 incomplete | VM 150 was cloned, but did not start: Proxmox's files\
 (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again\
 | + What is left cannot be read: Proxmox's files (/etc/pve) do not answer; see: systemctl status\
 pve-cluster | running [s1] | stopped
clone-runs delsnapshot locked: 200 - | - | + The temporary snapshot 'TEMPORARY' of VM 124 could not\
 be removed (The container is locked by Proxmox (backup); try again when that has ended); remove\
 it{there} with: pct delsnapshot 124 TEMPORARY | running parent=TEMPORARY [s1] [TEMPORARY] | running
clone-runs delsnapshot busy: 200 - | - | + The temporary snapshot 'TEMPORARY' of VM 124 could not\
 be removed (The storage is busy with another Proxmox command; try again); remove it{there} with:\
 pct delsnapshot 124 TEMPORARY | running parent=TEMPORARY [s1] [TEMPORARY] | running
clone-runs delsnapshot fails: 200 - | - | + The temporary snapshot 'TEMPORARY' of VM 124 could not\
 be removed (pct delsnapshot 124 failed: odd); if no task of VM 124 runs, remove it{there} with:\
 pct unlock 124 && pct delsnapshot 124 TEMPORARY | running lock=snapshot-delete parent=TEMPORARY\
 [s1] [TEMPORARY delete] | running
clone-runs delsnapshot killed: 200 - | - | + The temporary snapshot 'TEMPORARY' of VM 124 could not\
 be removed (pct delsnapshot 124 was ended by SIGKILL); if no task of VM 124 runs, remove it{there}\
 with: pct unlock 124 && pct delsnapshot 124 TEMPORARY | running lock=snapshot-delete\
 parent=TEMPORARY [s1] [TEMPORARY delete] | running
clone-runs delsnapshot unread: 500 incomplete | VM 150 was cloned, but did not start: Proxmox's\
 files (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again\
 | + What is left cannot be read: Proxmox's files (/etc/pve) do not answer; see: systemctl status\
 pve-cluster | running [s1] | stopped
clone-runs start locked: 409 incomplete | VM 150 was cloned, but did not start: The container is\
 locked by Proxmox (backup) | CT is locked (backup) | = VM 150 was cloned\
 | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again\
 | + VM 150 is stopped; start it{there} with: pct start 150, or remove it with: pct destroy 150\
 | running [s1] | stopped
clone-runs start busy: 500 incomplete | VM 150 was cloned, but did not start: The storage is busy\
 with another Proxmox command | cfs-lock 'storage-local-lvm' error: got lock request timeout\
 | = VM 150 was cloned | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again\
 | + VM 150 is stopped; start it{there} with: pct start 150, or remove it with: pct destroy 150\
 | running [s1] | stopped
clone-runs start fails: 500 incomplete | VM 150 was cloned, but did not start: pct start 150\
 failed: odd | odd | = VM 150 was cloned | = The temporary snapshot 'TEMPORARY' of VM 124 was\
 removed again | + VM 150 is stopped; start it{there} with: pct start 150, or remove it with: pct\
 destroy 150 | running [s1] | stopped
clone-runs start killed: 500 incomplete | VM 150 was cloned, but did not start: pct start 150 was\
 ended by SIGKILL | = VM 150 was cloned | = The temporary snapshot 'TEMPORARY' of VM 124 was\
 removed again | + VM 150 is stopped; if no task of it runs, start it{there} with: pct start 150,\
 or remove it with: pct destroy 150 | running [s1] | stopped
clone-ip clone fails: 500 incomplete | pct clone 126 failed: clone failed: odd\
 | creating a clone of container 126 with ID 150 | create full clone of mountpoint rootfs\
 (local-lvm:vm-126-disk-0) | clone failed: odd | stopped [s1] | none
clone-ip clone killed: 500 incomplete | pct clone 126 was ended by SIGKILL\
 | creating a clone of container 126 with ID 150 | create full clone of mountpoint rootfs\
 (local-lvm:vm-126-disk-0) | + VM 126 is left with the lock 'disk'; if no task of it runs, mend\
 it{there} with: pct unlock 126 | + VM 150 is left half-made; if no task of it runs, remove\
 it{there} with: pct unlock 150 && pct destroy 150\
 | + A volume that was being copied stays, for its configuration does not name it; look for\
 it{there} with: pvesm list STORAGE --vmid 150 | stopped lock=disk [s1]\
 | stopped lock=create mp0= rootfs=
clone-ip clone unread: 500 incomplete | VM 150 was cloned, but did not get its address: Proxmox's\
 files (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | + What is left cannot be read: Proxmox's files (/etc/pve) do not answer; see: systemctl status\
 pve-cluster | stopped [s1] | stopped
clone-ip set locked: 409 incomplete | VM 150 was cloned, but did not get its address: The container\
 is locked by Proxmox (backup) | CT is locked (backup) | = VM 150 was cloned\
 | + VM 150 is stopped, without its address; remove it{there} with: pct destroy 150\
 | stopped [s1] | stopped
clone-ip set busy: 500 incomplete | VM 150 was cloned, but did not get its address: The storage is\
 busy with another Proxmox command | cfs-lock 'storage-local-lvm' error: got lock request timeout\
 | = VM 150 was cloned | + VM 150 is stopped, without its address; remove it{there} with: pct\
 destroy 150 | stopped [s1] | stopped
clone-ip set fails: 500 incomplete | VM 150 was cloned, but did not get its address: pct set 150\
 failed: odd | odd | = VM 150 was cloned | + VM 150 is stopped, without its address; remove\
 it{there} with: pct destroy 150 | stopped [s1] | stopped
clone-ip set killed: 500 incomplete | VM 150 was cloned, but did not get its address: pct set 150\
 was ended by SIGKILL | = VM 150 was cloned | + VM 150 is stopped, without its address; if no task\
 of it runs, remove it{there} with: pct destroy 150 | stopped [s1] | stopped
clone-ip set unread: 500 incomplete | VM 150 was cloned, but did not start: Proxmox's files\
 (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | = VM 150 got its address | + What is left cannot be read: Proxmox's files (/etc/pve) do not\
 answer; see: systemctl status pve-cluster | stopped [s1] | stopped ip=192.0.2.5/24
clone-ip start locked: 409 incomplete | VM 150 was cloned, but did not start: The container is\
 locked by Proxmox (backup) | CT is locked (backup) | = VM 150 was cloned\
 | = VM 150 got its address | + VM 150 is stopped; start it{there} with: pct start 150, or remove\
 it with: pct destroy 150 | stopped [s1] | stopped ip=192.0.2.5/24
clone-ip start busy: 500 incomplete | VM 150 was cloned, but did not start: The storage is busy\
 with another Proxmox command | cfs-lock 'storage-local-lvm' error: got lock request timeout\
 | = VM 150 was cloned | = VM 150 got its address | + VM 150 is stopped; start it{there} with: pct\
 start 150, or remove it with: pct destroy 150 | stopped [s1] | stopped ip=192.0.2.5/24
clone-ip start fails: 500 incomplete | VM 150 was cloned, but did not start: pct start 150 failed:\
 odd | odd | = VM 150 was cloned | = VM 150 got its address\
 | + VM 150 is stopped; start it{there} with: pct start 150, or remove it with: pct destroy 150\
 | stopped [s1] | stopped ip=192.0.2.5/24
clone-ip start killed: 500 incomplete | VM 150 was cloned, but did not start: pct start 150 was\
 ended by SIGKILL | = VM 150 was cloned | = VM 150 got its address\
 | + VM 150 is stopped; if no task of it runs, start it{there} with: pct start 150, or remove it\
 with: pct destroy 150 | stopped [s1] | stopped ip=192.0.2.5/24
destroy destroy busy: 500 incomplete | The storage is busy with another Proxmox command\
 | cfs-lock 'storage-local-lvm' error: got lock request timeout\
 | + VM 124 is running now, and its volumes or snapshots may be gone already; remove it{there}\
 with: pct destroy 124 --force 1 | running [s1] | none
destroy destroy fails: 500 incomplete | pct destroy 124 failed: odd\
 | forced to stop CT 124 before destroying! | odd | + VM 124 ran before and is stopped now, and its\
 volumes or snapshots may be gone already; remove it{there} with: pct destroy 124\
 | stopped [s1] | none
destroy destroy killed: 500 incomplete | pct destroy 124 was ended by SIGKILL\
 | forced to stop CT 124 before destroying! | + VM 124 ran before and is stopped now, and its\
 volumes or snapshots may be gone already; if no task of it runs, remove it{there} with: pct\
 destroy 124 | stopped [s1] | none
start start fails: 500 incomplete | pct start 126 failed: odd | odd | + VM 126 is stopped now\
 | stopped [s1] | none
start start killed: 500 incomplete | pct start 126 was ended by SIGKILL | + VM 126 is stopped now\
 | + Its task may still be at work: look again before trying again | stopped [s1] | none
stop stop fails: 500 incomplete | pct stop 124 failed: odd | odd | + VM 124 is running now\
 | running [s1] | none
stop stop killed: 500 incomplete | pct stop 124 was ended by SIGKILL | + VM 124 is running now\
 | + Its task may still be at work: look again before trying again | running [s1] | none
shutdown shutdown fails: 500 incomplete | pct shutdown 124 failed: odd | odd\
 | + VM 124 is running now | running [s1] | none
shutdown shutdown killed: 500 incomplete | pct shutdown 124 was ended by SIGKILL\
 | + VM 124 is running now | + Its task may still be at work: look again before trying again\
 | running [s1] | none
reboot reboot fails: 500 incomplete | pct reboot 124 failed: odd | odd | + VM 124 is running now\
 | running [s1] | none
reboot reboot killed: 500 incomplete | pct reboot 124 was ended by SIGKILL\
 | + VM 124 is running now | + Its task may still be at work: look again before trying again\
 | running [s1] | none
rootfs resize unread there: 500 unknown | pct resize 124 has ended, but what it did cannot be read:\
 cat /pve/lxc/124.conf on node 'pve2' did not finish in 0.5 s and was ended\
 | running rootfs=local-lvm:vm-124-disk-0,size=13G [s1] | none
mp0 resize unread there: 500 unknown | pct resize 124 has ended, but what it did cannot be read:\
 cat /pve/lxc/124.conf on node 'pve2' did not finish in 0.5 s and was ended\
 | running mp0=local-lvm:vm-124-disk-1,mp=/data,size=9G [s1] | none
rollback-runs rollback lost: 504 unknown | The connection to node 'pve2' was lost during pct\
 rollback 124, which goes on if the node does. Ask for the container's state before trying again\
 | = VM 124 ran before | running [s1] | none
clone-stopped clone unread there: 500 incomplete | VM 150 was cloned, but did not start: Proxmox's\
 files (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | + What is left cannot be read: cat /pve/lxc/150.conf on node 'pve2' did not finish in 0.5 s and\
 was ended | stopped [s1] | stopped
clone-stopped clone lost: 504 unknown | The connection to node 'pve2' was lost during pct clone\
 126, which goes on if the node does. Ask for the container's state before trying again\
 | stopped [s1] | stopped
clone-stopped start lost: 504 unknown | VM 150 was cloned, but whether it started is not known: The\
 connection to node 'pve2' was lost during pct start 150, which goes on if the node does. Ask for\
 the container's state before trying again | = VM 150 was cloned | stopped [s1] | running
clone-runs snapshot lost: 504 unknown | The connection to node 'pve2' was lost during pct snapshot\
 124, which goes on if the node does. Ask for the container's state before trying again\
 | + The temporary snapshot 'TEMPORARY' of VM 124 may be left; once no task of VM 124 runs, remove\
 it{there} with: pct delsnapshot 124 TEMPORARY | running parent=TEMPORARY [s1] [TEMPORARY] | none
clone-runs clone unread there: 500 incomplete | VM 150 was cloned, but did not start: Proxmox's\
 files (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again\
 | + What is left cannot be read: cat /pve/lxc/150.conf on node 'pve2' did not finish in 0.5 s and\
 was ended | running [s1] | stopped
clone-runs clone lost: 504 unknown | The connection to node 'pve2' was lost during pct clone 124,\
 which goes on if the node does. Ask for the container's state before trying again\
 | + The temporary snapshot 'TEMPORARY' of VM 124 may be left; once no task of VM 124 runs, remove\
 it{there} with: pct delsnapshot 124 TEMPORARY | running parent=TEMPORARY [s1] [TEMPORARY] | stopped
clone-runs delsnapshot unread there: 500 incomplete | VM 150 was cloned, but did not start:\
 Proxmox's files (/etc/pve) do not answer; see: systemctl status pve-cluster\
 | = VM 150 was cloned | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again\
 | + What is left cannot be read: cat /pve/lxc/124.conf on node 'pve2' did not finish in 0.5 s and\
 was ended | running [s1] | stopped
clone-runs delsnapshot lost: 200 - | - | + The temporary snapshot 'TEMPORARY' of VM 124 may be\
 left; once no task of VM 124 runs, remove it{there} with: pct delsnapshot 124 TEMPORARY\
 | running [s1] | running
clone-runs start lost: 504 unknown | VM 150 was cloned, but whether it started is not known: The\
 connection to node 'pve2' was lost during pct start 150, which goes on if the node does. Ask for\
 the container's state before trying again | = VM 150 was cloned\
 | = The temporary snapshot 'TEMPORARY' of VM 124 was removed again | running [s1] | running
clone-ip clone unread there: 500 incomplete | VM 150 was cloned, but did not get its address: cat\
 /pve/lxc/150.conf on node 'pve2' did not finish in 0.5 s and was ended | = VM 150 was cloned\
 | + What is left cannot be read: cat /pve/lxc/150.conf on node 'pve2' did not finish in 0.5 s and\
 was ended | stopped [s1] | stopped
clone-ip clone lost: 504 unknown | The connection to node 'pve2' was lost during pct clone 126,\
 which goes on if the node does. Ask for the container's state before trying again\
 | + VM 150 will not have the address 192.0.2.5/24, but what VM 126 has; do not start it with that\
 | stopped [s1] | stopped
clone-ip set unread there: 500 incomplete | VM 150 was cloned, but did not start: Proxmox's files\
 (/etc/pve) do not answer; see: systemctl status pve-cluster | = VM 150 was cloned\
 | = VM 150 got its address | + What is left cannot be read: cat /pve/lxc/150.conf on node 'pve2'\
 did not finish in 0.5 s and was ended | stopped [s1] | stopped ip=192.0.2.5/24
clone-ip set lost: 504 unknown | VM 150 was cloned, but whether it got its address is not known:\
 The connection to node 'pve2' was lost during pct set 150, which goes on if the node does. Ask for\
 the container's state before trying again | = VM 150 was cloned\
 | + VM 150 may not have the address 192.0.2.5/24, but what VM 126 has; do not start it with that\
 | stopped [s1] | stopped ip=192.0.2.5/24
clone-ip start lost: 504 unknown | VM 150 was cloned, but whether it started is not known: The\
 connection to node 'pve2' was lost during pct start 150, which goes on if the node does. Ask for\
 the container's state before trying again | = VM 150 was cloned | = VM 150 got its address\
 | stopped [s1] | running ip=192.0.2.5/24
destroy destroy lost: 504 unknown | The connection to node 'pve2' was lost during pct destroy 124,\
 which goes on if the node does. Ask for the container's state before trying again\
 | = VM 124 ran before | none | none
reboot reboot lost: 504 unknown | The connection to node 'pve2' was lost during pct reboot 124,\
 which goes on if the node does. Ask for the container's state before trying again\
 | = VM 124 ran before | running [s1] | none
""".strip().splitlines())
SPECIAL = {row: [*columns.partition(" | ")[0].split(), *columns.partition(" | ")[2].split(" | ")]
           for row, columns in SPECIAL.items()}


def parameters(story):
    return {**story.body, **story.defaults}


def error_of(text, outcome, details):
    return error(text, outcome=outcome, **({} if details is None else {"details": details}))


def expected(name, step, fault, there=""):
    """The whole of what is to be seen of a row; `there` is " on node 'pve2'" or nothing."""
    story = STORIES[name]
    title = " ".join([story.line, f"vm_id={story.vm_id}", *(
        f"{key}={value}" for key, value in parameters(story).items() if key != "vm_id")])
    found = (there and SPECIAL.get(f"{name} {step} {fault} there")
             or SPECIAL.get(f"{name} {step} {fault}"))
    vm, new, notes, left = story.vm, story.new, [], []
    if found:
        status, outcome, error, *details, vm, new = found
        said = [each for each in details if each[:2] not in ("= ", "+ ")]
        notes, left = ([each[2:].replace("{there}", there) for each in details
                        if each.startswith(mark)] for mark in ("= ", "+ "))
        status, outcome = int(status), outcome.strip("-") or None
    else:
        status, outcome, error, said = (AT_A_LOOK if step == "status" else AT_FIRST)[fault]
        said = [said] if said else []
    error = error and error.format(
        title=title, step=step, vm_id=story.vm_id, on=" on node 'pve2'" if there else "")
    if fault == "killed" and there and error:   # there a shell says it
        said = [*said, "Killed"]
    if outcome == "nothing_done":
        vm, new = "running [s1]" if story.vm_id == RUNS else "stopped [s1]", "none"
    details = "\n".join(said + notes + left) or ("" if fault == "killed" else None)
    if status == 200:
        data = {**({"vm_id": NEW, "started": True} if name.startswith("clone") else {}),
                **({"warnings": left} if left else {})}
        told = ok(story.message, data or None)
    else:
        told = error_of(("Nothing was done: " if status == 503 else "") + error, outcome, details)
    if outcome == "running":
        told["operation"] = "ID"
    row = {"id": "ID", "endpoint": story.line.split()[1],
           "parameters": {"vm_id": story.vm_id, **parameters(story)},
           "client": ASKER, "requested": "TIME", "began": "TIME", "ended": "TIME", "warnings": left}
    done = {**row, "state": "done", "outcome": None, "status": 200, "error": None}
    now = done if status == 200 else {
        **row, "state": "failed", "outcome": outcome, "status": status, "error": error,
        "warnings": notes + left}
    if outcome == "running":
        now = {**row, "state": "running", "outcome": "running", "ended": None, "status": None,
               "error": None}
    well = status == 200 or outcome == "running"
    result = "done" if well else f"{status} {error} ({outcome})"
    scaled = {}
    if story.counted:
        resource, action = story.counted
        why = {409: "conflict", 503: "unavailable"}.get(status, "failed")
        scaled = {
            f'actions_total{{container_id="124",resource="{resource}",action="{action}"}}': 1
        } if well else {
            f'failures_total{{container_id="124",resource="{resource}",reason="{why}"}}': 1}
    return {"status": status, "after": "30" if status == 503 else None, "body": told, "row": now,
            "later": done if well else now,
            "log": f"INFO change {title} by {ASKER}: {result}, after",
            "scaled": scaled, "vm": vm, "new": new}


def mend(stage, told):
    """Run the commands that an answer names, in their order; of two between which one may choose,
    the first."""
    stage.host.faults()
    for maybe, commands in re.findall(
            r"^.*?(may be left)?;.* with: (pct .*?)(?:$|, or )", told, re.MULTILINE):
        for command in commands.split(" && "):
            if maybe and command.split()[-1] not in stage.host.snapshots(command.split()[2]):
                continue
            done = subprocess.run([stage.host.root / "bin" / "pct", *command.split()[1:]],
                                  capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), command


def check_row(stage, name, step, fault, there=""):
    seen, told = stage.play(name, step, fault), stage.told
    assert seen == expected(name, step, fault, there)
    mend(stage, told)
    before = ("running [s1]" if STORIES[name].vm_id == RUNS else "stopped [s1]", "none")
    whole = {before, (STORIES[name].vm, STORIES[name].new), MENDED.get((name, step), before)}
    if " with: pct" in told:
        assert (stage.show(STORIES[name].vm_id), stage.show(NEW)) in whole


@pytest.mark.parametrize("name, step, fault", ROWS_HERE, ids=map("-".join, ROWS_HERE))
def test_what_the_caller_hears_if_a_step_fails(stage_here, name, step, fault):
    check_row(stage_here, name, step, fault)


ROWS_THERE = [(name, step, fault) for name, story in STORIES.items() for step in story.steps.split()
              for fault in BEFALLS]


@pytest.mark.parametrize("name, step, fault", ROWS_THERE, ids=map("-".join, ROWS_THERE))
def test_what_the_caller_hears_if_a_step_fails_on_another_node(stage_there, name, step, fault):
    check_row(stage_there, name, step, fault, " on node 'pve2'")


@pytest.mark.parametrize("leaves_cgroup", [False, True])
def test_a_rollback_whose_container_does_not_start_again_is_no_success(api, host, leaves_cgroup):
    """pct ends with 0: the start is a task of its own."""
    api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": "s1"})
    host.faults(rollback={"start_fails": True, "leaves_cgroup": leaves_cgroup})
    reply = api.post("/snapshot/rollback", {"vm_id": 104, "snapshot_name": "s1"})
    said = ('Logical volume "vm-104-disk-0" successfully removed.\n'
            "startup for container '104' failed")
    assert (reply.status, reply.body) == (500, error(
        "VM 104 was rolled back to snapshot 's1', but did not start", outcome="incomplete",
        details=said + "\nVM 104 ran before and is stopped now; start it with: pct start 104"))
    assert not host.running(104) and host.calls()[-2:] == ["pct status 104"] * 2


def test_a_container_that_a_rollback_stopped_before_it_failed_is_told(api, host):
    """Its file is as before then, and it does not run."""
    host.faults(rollback={"pause": True, "exit": 255, "stderr": "container did not stop\n"})
    with held_up(host, "rollback", api.post, "/snapshot/rollback", {
            "vm_id": 104, "snapshot_name": "s1"}) as asked:
        (host.cgroup / "lxc/104").rename(host.root / "trash/104")
    reply = asked.result()
    assert (reply.status, reply.body) == (409, error(
        "The container is just starting or stopping; look at its state", outcome="incomplete",
        details="container did not stop\n"
                "VM 104 ran before and is stopped now; start it with: pct start 104"))


def test_a_failed_start_or_shutdown_tells_the_state_now_whatever_the_file_says(api, host):
    """Whether a container runs, its file does not tell; a shutdown was to stop it."""
    host.faults(start={"work_fails": "unable to get PID for CT 106 (not running?)"},
                shutdown={"dies_after": True})
    reply = api.post("/power/start", {"vm_id": 106})
    assert (reply.status, reply.body) == (409, error(
        "The container is just starting or stopping; look at its state", outcome="incomplete",
        details="unable to get PID for CT 106 (not running?)\nVM 106 is stopped now"))
    reply = api.post("/power/shutdown", {"vm_id": 104})
    assert (reply.status, reply.body) == (500, error(
        "pct shutdown 104 failed with exit status 255", outcome="incomplete",
        details="VM 104 is stopped now"))


def test_a_lock_that_a_container_had_before_is_not_told_as_left(api, host):
    host.add(107, lock="backup")
    host.faults(set={"signal": 9})
    reply = api.post("/scale/cores", {"vm_id": 107, "cores": 4})
    assert (reply.status, reply.body) == (500, error(
        "pct set 107 was ended by SIGKILL", outcome="incomplete",
        details="Its task may still be at work: look again before trying again"))


def test_a_container_that_a_killed_snapshot_has_left_frozen_is_told(api, host):
    (host.cgroup / "lxc/104/ns/cgroup.events").write_text("populated 1\nfrozen 1\n")
    host.faults(snapshot={"kills_pct": True})
    reply = api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": "s1"})
    assert (reply.status, reply.body) == (500, error(
        "pct snapshot 104 was ended by SIGKILL", outcome="incomplete",
        details="VM 104 is frozen, so that all its processes stand still; if no task of it runs, "
                "thaw it with: lxc-unfreeze -n 104\n"
                "VM 104 is left with the lock 'snapshot'; if no task of it runs, mend it with: "
                "pct unlock 104 && pct delsnapshot 104 s1"))
    (host.cgroup / "lxc/104/ns/cgroup.events").write_text("populated 1\nfrozen 0\n")
    host.faults(snapshot={"work_fails": "odd"})
    reply = api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": "s2"})
    assert "frozen" not in reply.body["details"]


@pytest.mark.parametrize("says, status", [
    ("error during cfs-locked 'storage-local-lvm' operation: got lock request timeout", 500),
    ("lvremove 'pve/vm-106-disk-1' error:   Logical volume pve/vm-106-disk-1 in use.", 409)])
def test_a_destroy_that_fails_may_have_freed_volumes_though_the_configuration_stays(
        api, host, says, status):
    """PVE::LXC, destroy_lxc_container, changes the file when all volumes have gone."""
    host.faults(destroy={"exit": 255, "stderr": says + "\n"})
    reply = api.delete("/clone/delete", {"vm_id": 106})
    assert (reply.status, reply.headers.get("Retry-After"), reply.body["outcome"]) == (
        status, None, "incomplete")
    assert reply.body["details"] == says + (
        "\nVM 106 is stopped now, and its volumes or snapshots may be gone already; "
        "remove it with: pct destroy 106")
    row, = api.get("/operations?vm_id=106").body["data"]
    assert (row["outcome"], row["status"]) == ("incomplete", status)
    assert "incomplete: DELETE /clone/delete vm_id=106" in api.log("error")


def test_a_container_that_is_gone_after_a_destroy_that_failed_is_not_asked_for_its_state(api, host):
    host.faults(destroy={"dies_after": True})
    reply = api.delete("/clone/delete", {"vm_id": 106})
    assert (reply.status, reply.body) == (500, error(
        "pct destroy 106 failed: Logical volume \"vm-106-disk-0\" successfully removed.",
        outcome="incomplete", details="Logical volume \"vm-106-disk-0\" successfully removed.\n"
                                      "VM 106 is gone now"))
    assert not host.path(106).exists() and host.calls()[-1] == "pct destroy 106 --force 1"


def test_the_lock_of_a_snapshot_that_the_storage_has_lost_is_mended_by_force(api, host):
    """Without it, snapshot_delete fails at the volume each time (PVE::AbstractConfig)."""
    subprocess.run([host.root / "bin/pct", "snapshot", "106", "a1"], check=True)
    says = "lvremove 'pve/snap_vm-106-disk-0_a1' error:   Failed to find logical volume " \
           '"pve/snap_vm-106-disk-0_a1"'
    host.faults(delsnapshot={"work_fails": says})
    reply = api.delete("/snapshot/delete", {"vm_id": 106, "snapshot_name": "a1"})
    told = reply.body["details"].splitlines()[-1]
    assert (reply.status, reply.body["error"], reply.body["outcome"], told) == (
        409, module.SNAPSHOT_GONE, "incomplete",
        "VM 106 is left with the lock 'snapshot-delete'; if no task of it runs, mend it with: "
        "pct unlock 106 && pct delsnapshot 106 a1 --force 1")
    assert obey(host, told) == [0, 0] and host.snapshots(106) == []
    subprocess.run([host.root / "bin/pct", "snapshot", "106", "a1"], check=True)
    host.faults(rollback={"work_fails": says})
    reply = api.post("/snapshot/rollback", {"vm_id": 106, "snapshot_name": "a1"})
    assert (reply.status, reply.body["details"].splitlines()[-1]) == (409, (
        "VM 106 is left with the lock 'rollback'; if no task of it runs, mend it with: "
        "pct unlock 106"))


def test_a_rollback_that_could_not_make_the_volume_anew_tells_how_that_is_done(api, host):
    """LvmThinPlugin, volume_snapshot_rollback, removes it first; a second rollback would fail."""
    subprocess.run([host.root / "bin/pct", "snapshot", "106", "a1"], check=True)
    again = ("If the volume vm-106-disk-0 is missing, first make it anew from its snapshot, with "
             "the name of its volume group in place of GROUP: lvcreate -kn -n vm-106-disk-0 "
             "-s GROUP/snap_vm-106-disk-0_a1",
             "mend it with: pct unlock 106 && pct rollback 106 a1")
    never = ("If the volume vm-106-disk-0 is missing, it cannot be made anew from snapshot 'a1': "
             "restore it from another snapshot or a backup", "mend it with: pct unlock 106")
    removed = '  Logical volume "vm-106-disk-0" successfully removed.\n'
    for stdout, says, (volume, mend) in (
            (removed, "lvm rollback 'pve/snap_vm-106-disk-0_a1' error:   Cannot create new thin "
                      "volume, free space in thin pool pve/data reached threshold.", again),
            # an earlier one has removed it
            ("", "lvremove 'pve/vm-106-disk-0' error:   Failed to find logical volume "
                 '"pve/vm-106-disk-0"', again),
            (removed, "lvm rollback 'pve/snap_vm-106-disk-0_a1' error:   Snapshot origin LV "
                      "snap_vm-106-disk-0_a1 not found in Volume group pve.", never)):
        host.faults(rollback={"stdout": stdout, "work_fails": says})
        reply = api.post("/snapshot/rollback", {"vm_id": 106, "snapshot_name": "a1"})
        assert (reply.status, reply.body["outcome"], reply.body["details"].splitlines()[-2:]) == (
            409, "incomplete", [
                volume, "VM 106 is left with the lock 'rollback'; if no task of it runs, " + mend])
        subprocess.run([host.root / "bin/pct", "unlock", "106"], check=True)


def test_a_pct_that_is_too_old_for_an_option_has_done_nothing(api, host):
    """PVE::JSONSchema, get_options; of rollback, --start is there since pve-container 4.3-1."""
    says = "Unknown option: start\n400 unable to parse option\npct rollback <vmid> <snapname>"
    host.faults(rollback={"exit": 255, "stderr": says + "\n"})
    reply = api.post("/snapshot/rollback", {"vm_id": 104, "snapshot_name": "a1"})
    assert (reply.status, reply.body) == (500, refused(
        "This pct does not know an option that is needed here; Proxmox VE 7.3 or later has it",
        details=says))


@pytest.mark.parametrize("left", [True, False])
def test_a_clone_that_was_refused_for_a_lock_may_have_left_an_empty_container(api, host, left):
    """Before pve-container 4.2-2, clone_vm made that before it looked for the lock."""
    host.faults(clone={"pause": True, "exit": 255, "stderr": "CT is locked (backup)\n"})
    with held_up(host, "clone", api.post, "/clone/create", {
            "vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"}) as asked:
        host.path(106).write_text("lock: backup\n" + host.path(106).read_text())
        if left:
            host.path(105).write_text("lock: create\n")
    reply = asked.result()
    assert (reply.status, reply.body["outcome"]) == (
        409, "incomplete" if left else "nothing_done")
    assert reply.body["details"].splitlines()[1:] == [
        "VM 106 is locked by Proxmox (backup), by another task",
        "VM 105 is being created, perhaps by another task; look at it"] * left


def test_a_destroy_that_left_its_lock_is_mended_in_one_way_only(api, host):
    host.faults(destroy={"pause": True, "exit": 255, "stderr": "odd\n"})
    with held_up(host, "destroy", api.delete, "/clone/delete", {"vm_id": 106}) as asked:
        host.path(106).write_text("lock: destroyed\n" + host.path(106).read_text())
    reply = asked.result()
    assert (reply.status, reply.body) == (500, error(
        "pct destroy 106 failed: odd", outcome="incomplete", details=(
            "odd\nVM 106 is left with the lock 'destroyed'; if no task of it runs, mend it with: "
            "pct unlock 106 && pct destroy 106\n"
            "VM 106 is stopped now, and its volumes or snapshots may be gone already")))


@pytest.mark.parametrize("path, command, asked", [
    ("/power/stop", "stop", "stop"), ("/power/shutdown", "shutdown", "stop"),
    ("/power/start", "start", "start")])
def test_what_only_ha_was_asked_for_is_said(api, host, path, command, asked):
    """PVE::API2::LXC::Status: of a container under HA, the task asks HA and ends."""
    vm_id = 106 if command == "start" else 104
    host.faults(**{command: {"exit": 0, "stdout": f"Requesting HA {asked} for CT {vm_id}\n"}})
    reply = api.post(path, {"vm_id": vm_id})
    assert (reply.status, reply.body["data"]["warnings"]) == (200, [
        f"Proxmox HA was asked to {asked} VM {vm_id} and may do so later; "
        "ask for the container's state"])
    # which it refuses before it does anything (pve-ha-manager, check_service_state)
    failed = f"command 'ha-manager set ct:{vm_id} --state started' failed: exit code 255"
    said = f"service 'ct:{vm_id}' in error state, must be disabled and fixed first"
    host.faults(**{command: {"exit": 255, "stderr": failed + "\n", "stdout":
                             f"Requesting HA {asked} for CT {vm_id}\n{said}\n"}})
    reply = api.post(path, {"vm_id": vm_id})
    assert (reply.status, reply.body) == (409, refused(
        "Proxmox HA has the container in its error state; disable and mend it there first",
        details=f"Requesting HA {asked} for CT {vm_id}\n{said}\n{failed}"))


@pytest.mark.parametrize("command", ["start", "stop", "shutdown", "reboot"])
def test_a_task_for_whose_log_the_node_has_no_room_has_done_nothing(api, host, command):
    """fork_worker ends it before its work begins (PVE::RESTEnvironment)."""
    vm_id = 106 if command == "start" else 104
    says = (f"unable to create file '/var/log/pve/tasks/B/UPID:pve:0:0:6:vz{command}:{vm_id}:"
            "root@pam:' - No space left on device")
    host.faults(**{command: {"exit": 255, "stderr": says + "\n"}})
    reply = api.post(f"/power/{command}", {"vm_id": vm_id})
    assert (reply.status, reply.body) == (503, refused(
        "Nothing was done: The node has no room on its own disk for the log of a task",
        details=says))


def test_a_container_that_somebody_else_creates_under_the_clone_s_id_is_not_ours(api, host):
    def foreign(hostname):
        host.path(105).write_text(f"arch: amd64\nhostname: {hostname}\nlock: create\n")
    body = {"vm_id": 106, "new_vm_id": 105, "new_vm_name": "x_1", "start": False}
    for hostname, said in (
            ("payroll", "VM 105 is being created, perhaps by another task; look at it"),
            ("x-1", "VM 105 is left half-made; if no task of it runs, remove it with: "
                    "pct unlock 105 && pct destroy 105\n"
                    "A volume that was being copied stays, for its configuration does not name it; "
                    "look for it with: pvesm list STORAGE --vmid 105")):
        host.faults(clone={"pause": True, "exit": 255, "stderr": "odd\n"})
        with held_up(host, "clone", api.post, "/clone/create", body) as asked:
            foreign(hostname)
        assert asked.result().body["details"] == "odd\n" + said
        host.path(105).unlink()


def test_a_clone_without_a_name_yet_is_ours_while_its_source_is_locked_for_it(api, host):
    host.faults(clone={"pause": True, "exit": 255, "stderr": "odd\n"})
    with held_up(host, "clone", api.post, "/clone/create", {
            "vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"}) as asked:
        host.path(106).write_text("lock: disk\n" + host.path(106).read_text())
        host.path(105).write_text("arch: amd64\nlock: create\n")
    details = asked.result().body["details"]
    assert details.splitlines()[:3] == [
        "odd", "VM 106 is left with the lock 'disk'; if no task of it runs, mend it with: "
               "pct unlock 106",
        "VM 105 is left half-made; if no task of it runs, remove it with: "
        "pct unlock 105 && pct destroy 105"]


def test_a_step_that_was_not_begun_is_named_for_others_were(api, host):
    host.faults(clone={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(api.post, "/clone/create", {
            "vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"})
        wait_until(lambda: host.path(105).exists())
        (host.root / "bin/pct").unlink()
        host.go()
        reply = asked.result()
    assert (reply.status, reply.body["outcome"], reply.body["error"]) == (
        500, "incomplete", "VM 105 was cloned, but did not start: pct start 105 was not begun: "
                           "pct is not installed, or not on the daemon's PATH")


def test_after_a_fault_of_ours_what_the_last_steps_did_is_called_unknown(launch, host):
    api = launch(constants={"start_clone": Code("lambda *_: 1 / 0")})
    reply = api.post("/clone/create", {"vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"})
    assert (reply.status, reply.body["outcome"], reply.body["details"]) == (
        500, "unknown", "VM 105 was cloned")


def test_a_fault_of_ours_while_a_change_is_waited_for_is_not_called_nothing_done(launch, host):
    api = launch(constants={"Changes.answer": Code("lambda *_: 1 / 0")})
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    row, = operations(api)
    assert (reply.status, reply.body) == (500, error(
        "Internal error (ZeroDivisionError); the daemon's error log says more",
        outcome="unknown", operation=row["id"]))
    assert "internal error in POST /scale/cores vm_id=104 cores=4" in api.log("error")
    wait_until(lambda: operations(api)[0]["state"] == "done")
    assert host.conf(104)["cores"] == "4"


def test_that_a_change_begins_is_logged_for_its_end_may_be_in_no_log(api, host):
    host.faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 4})
        wait_until(host.calls)
        wait_until(lambda: api.log().endswith(
            f" INFO change POST /scale/cores vm_id=104 cores=4 by {ASKER}: begun\n"))
        api.process.kill()
        assert api.process.wait(10) == -signal.SIGKILL
        host.go()
        wait_until(lambda: host.ended("set"))
        assert isinstance(asked.exception(), (OSError, http.client.HTTPException))


def test_a_fault_of_ours_in_telling_what_is_left_costs_nobody_the_answer(launch, host):
    host.faults(set={"exit": 255, "stderr": "odd\n"})
    api = launch(constants={"Change.remains": Code("lambda self: 1 / 0")})
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4}, timeout=5)
    assert (reply.status, reply.body) == (500, error(
        "pct set 104 failed: odd", outcome="incomplete", details="odd"))


def test_a_temporary_snapshot_that_a_killed_command_may_yet_take_is_told(api, host):
    host.faults(snapshot={"signal": 9})
    reply = api.post("/clone/create", {"vm_id": 104, "new_vm_id": 105, "new_vm_name": "x"})
    name, = re.findall(r"autoscale_clone_[0-9a-f]{8}", " ".join(host.calls()))
    assert (reply.status, reply.body) == (500, error(
        "pct snapshot 104 was ended by SIGKILL", outcome="incomplete",
        details=f"The temporary snapshot '{name}' of VM 104 may be left; once no task of VM 104 "
                f"runs, remove it with: pct delsnapshot 104 {name}"))


@pytest.mark.parametrize("says", [
    "close (rename) atomic file '/etc/pve/nodes/proxmox/lxc/104.conf' failed: Permission denied",
    "unable to open file '/etc/pve/nodes/proxmox/lxc/104.conf.tmp.99' - Permission denied",
    "unable to write '/etc/pve/nodes/proxmox/lxc/104.conf.tmp.99' - "
    "Transport endpoint is not connected"])
def test_a_resize_whose_size_could_not_be_noted_may_have_grown_the_volume(api, host, says):
    """PVE::API2::LXC, resize_vm, grows the volume first and writes its size then; pct ends with 0
    even so."""
    host.faults(resize={"exit": 0, "stderr": says + "\n"})
    reply = api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5})
    assert (reply.status, reply.headers.get("Retry-After"), reply.body["outcome"]) == (
        500, None, "incomplete")
    assert reply.body["details"] == says + (
        "\nThe volume of VM 104 may have grown, though its configuration does not have the new "
        "size; to enter what it has: pct rescan --vmid 104")


def test_a_resize_that_held_its_storage_s_lock_for_too_long_may_go_on(api, host):
    """The tool that grows the volume is not ended with it (PVE::Cluster, cfs_lock)."""
    says = ("error resizing volume '/dev/san/vm-104-disk-0': 'storage-san'-locked command timed "
            "out - aborting")
    host.faults(resize={"exit": 0, "stderr": says + "\n"})
    reply = api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5})
    assert (reply.status, reply.headers.get("Retry-After"), reply.body) == (500, None, error(
        "The storage is busy with another Proxmox command", outcome="incomplete", details=says + (
            "\nThe volume of VM 104 may have grown, though its configuration does not have the new "
            "size; to enter what it has: pct rescan --vmid 104")))


@pytest.mark.parametrize("pending, told", [
    (False, "VM 104 has memory 512 now"),
    (True, "VM 104 has memory 512 from its next start on; take that back with: "
           "pct set 104 --revert memory")])
def test_a_set_that_failed_after_it_had_set_something_tells_so(api, host, pending, told):
    """Until pve-container 5.2.2, update_vm writes what waits before it tells that the running
    container did not take it; and update_lxc_config comes after write_config in all."""
    host.faults(set={"pause": True, "exit": 255, "stderr": "odd\n"})
    with held_up(host, "set", api.post, "/scale/ram", {"vm_id": 104, "memory": 512}) as asked:
        text = host.path(104).read_text()
        host.path(104).write_text(
            text + "\n[pve:pending]\nmemory: 512\n" if pending
            else text.replace("memory: 2048", "memory: 512"))
    reply = asked.result()
    assert (reply.status, reply.body) == (500, error(
        "pct set 104 failed: odd", outcome="incomplete", details="odd\n" + told))


def test_what_others_changed_while_a_set_failed_is_not_told_as_its_work(api, host):
    host.add(108, net0="name=eth0,bridge=vmbr0,ip=192.0.2.8/24,type=veth")
    clone = {"new_vm_name": "x", "ip": "192.0.2.5/24"}
    for path, body, before, after in (
            ("/scale/cores", {"cores": 4}, "cores: 2\n", ""),
            ("/clone/create", {**clone, "new_vm_id": 205}, "bridge=vmbr0", "bridge=vmbr1"),
            ("/clone/create", {**clone, "new_vm_id": 206}, "net0: name=eth0", "hookscript: x")):
        host.faults(set={"pause": True, "exit": 255, "stderr": "odd\n"})
        with held_up(host, "set", api.post, path, {"vm_id": 108, **body}) as asked:
            text = host.path(108).read_text()
            assert before in text
            host.path(108).write_text(text.replace(before, after))
        reply = asked.result()
        host.path(108).write_text(text)
        new = body.get("new_vm_id")
        assert reply.body["details"].splitlines() == ["odd"] + [
            f"VM {new} was cloned", f"VM {new} is stopped, without its address; remove it with: "
            f"pct destroy {new}"] * bool(new)
    assert "internal error" not in api.log("error")


def test_a_resize_whose_task_was_killed_is_no_success_whatever_it_has_done(api, host):
    """PVE::RESTEnvironment, tee_worker, says no more of such a task, and pct ends with 0."""
    for moment, size, failure, left in (
            ("early", "8G", "was not grown as asked; its size is now 8G",
             "\nThe volume of VM 104 may have grown, though its configuration does not have the "
             "new size; to enter what it has: pct rescan --vmid 104"),
            ("late", "13G", "has grown to 13G, but its file system may not have followed", "")):
        host.faults(resize={"kills_task": moment})
        reply = api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5})
        assert host.conf(104)["rootfs"].endswith(f"size={size}")
        details = reply.body.pop("details")
        assert (reply.status, reply.body) == (
            500, error(f"The rootfs of VM 104 {failure}", outcome="incomplete"))
        assert details.endswith("got unexpected control message:" + left)


def test_a_linked_clone_of_a_running_container_is_refused_before_a_snapshot_is_taken(api, host):
    reply = api.post("/clone/create", {
        "vm_id": 104, "new_vm_id": 105, "new_vm_name": "x", "full": False})
    assert (reply.status, reply.body) == (409, refused(
        "VM 104 runs, and a linked clone would need its temporary snapshot for good; "
        "stop it first, or leave out full"))
    assert host.calls() == ["pct status 104"] and host.snapshots(104) == []


def test_a_stop_bears_a_waiting_change_whose_client_has_left(launch, host):
    api = launch(constants={"LOOK_SECONDS": 0.05})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        clone = begin_clone(pool, api, host, 104, 105)
        body = '{"vm_id": 104, "cores": 4}'
        with api.connect() as sock:
            sock.sendall(framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                                f"Content-Length: {len(body)}", body=body))
            wait_until(lambda: len(api.get("/operations").body["data"]) == 2)
        wait_until(lambda: "change POST /scale/cores" in api.log())
        api.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not answers(api.port))
        host.go()
        assert clone.result().status == 200
    assert api.process.wait(5) == 0 and host.snapshots(104) == []
    ended = [line.partition(": ")[2] for line in api.log().splitlines()
             if "change POST /scale/cores" in line]
    assert len(ended) == 1 and ended[0].startswith(
        "499 The client left before this began (nothing_done), after ")
    assert api.log().endswith("INFO stopped\n") and "Traceback" not in api.said()


def test_the_end_of_a_change_is_logged_and_counted_before_operations_tell_of_it():
    change, told = change_of("/scale/cores", vm_id=104, cores=4), []
    changes = module.Changes(None, module.SimpleNamespace(start=lambda *_: None), lambda change: (
        told.append((change.row()["ended"], change.started.done(), change.future.done()))))
    changes.take(change)
    assert changes.end(change) == [] and changes.pending == set()
    assert told == [(None, False, False)] and change.row()["ended"] is not None
    assert change.started.done() and change.future.done()


def test_a_clock_that_is_set_does_not_count_into_the_time_of_a_change(monkeypatch):
    said, change = [], change_of("/scale/cores", vm_id=104, cores=4)
    monkeypatch.setattr(module.log, "info", lambda text, *values, **_: said.append(text % values))
    change.requested += 3600
    changes = module.Changes(None, module.SimpleNamespace(start=lambda *_: None), lambda _: None)
    changes.take(change)
    changes.end(change)
    assert said == ["change POST /scale/cores vm_id=104 cores=4 by 127.0.0.1: done, after 0.0 s"]


def test_a_change_is_not_called_done_before_its_end_is_known():
    change = change_of("/scale/cores", vm_id=104, cores=4)
    change.began = time.time()
    change.problem = change.conclude(module.Problem(409, "locked"))     # its thread has come so far
    row = change.row()
    assert (row["state"], row["outcome"], row["ended"], row["status"], row["error"]) == (
        "running", "running", None, None, None)


def test_a_template_whose_snapshot_is_not_deleted_is_left_locked_and_that_is_told(api, host):
    """PVE::AbstractConfig, snapshot_delete, sets its lock before it looks whether this is a
    template."""
    host.add(107, template=1)
    host.path(107).write_text(
        host.path(107).read_text() + "\n[s1]\ncores: 2\nsnaptime: 1700000000\n")
    reply = api.delete("/snapshot/delete", {"vm_id": 107, "snapshot_name": "s1"})
    assert (reply.status, reply.body, host.conf(107)["lock"]) == (409, error(
        "The container is a template", outcome="incomplete",
        details="you can't delete a snapshot if vm is a template\n"
        "VM 107 is left with the lock 'snapshot-delete'; if no task of it runs, mend it with: "
        "pct unlock 107 && pct delsnapshot 107 s1"), "snapshot-delete")


@pytest.mark.parametrize("moment", ["before", "in between"])
def test_a_change_that_meets_the_stop_is_refused_whichever_comes_first(moment):
    class Workers:                      # whose thread gets to run only when the stop has passed
        def start(self, work, *arguments):
            changes.refuse_waiting()
            work(*arguments)
    begun, counted = [], []
    host = module.SimpleNamespace(
        pve=module.SimpleNamespace(changeable=None),
        files=module.SimpleNamespace(read=lambda *_: None),
        commands=module.SimpleNamespace(
            reachable=lambda *_: None, slot=lambda *_: contextlib.nullcontext()))
    changes = module.Changes(host, Workers(), counted.append)
    if moment == "before":
        changes.refuse_waiting()
    change = change_of("/scale/cores", vm_id=104, cores=4)
    change.run = lambda *_: begun.append(1)
    with pytest.raises(module.Problem) as stopped:
        changes.take(change)
        changes.answer(change, module.Client(None, "127.0.0.1"), 1)
    assert (stopped.value.status, stopped.value.error) == (503, "The daemon is stopping")
    assert begun == [] and changes.pending == set()
    assert [each.problem.error for each in counted] == (
        ["The daemon is stopping"] if moment == "in between" else [])
    assert len(changes.recent) == (moment == "in between")


# Endpoints

def test_cores_and_memory_are_set(api, host):
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    assert (reply.status, reply.body) == (200, ok("CPU cores set to 4 for VM 104"))
    reply = api.post("/scale/ram", {"vm_id": "104", "memory": "4096"})
    assert (reply.status, reply.body) == (200, ok("Memory set to 4096 MB for VM 104"))
    assert (host.conf(104)["cores"], host.conf(104)["memory"]) == ("4", "4096")
    assert host.calls() == ["pct set 104 --cores 4", "pct set 104 --memory 4096"]


def test_all_spellings_work_and_may_come_together(api, host):
    assert api.post("/scale/cores", {"lxc_id": 104, "cores": 2}).status == 200
    assert api.post("/scale/cores", {"container_id": "104", "cores": 4}).status == 200
    assert api.post("/scale/cores", {
        "vm_id": "104", "lxc_id": 104, "container_id": "0104", "cores": 3}).status == 200
    assert api.get("/resource/vm/config?container_id=104").body["data"]["cores"] == 3
    for path in ("/resource/vm/config?lxc_id=104", "/resource/lxc/config?vm_id=104",
                 "/resource/lxc/config?vm_id=104&lxc_id=104"):
        assert api.get(path).body["data"]["cores"] == 3
    assert api.get("/resource/lxc/status?lxc_id=104").body["data"]["name"] == "web-01"
    reply = api.post(
        "/clone/create", {"lxc_id": 106, "new_lxc_id": 105, "new_lxc_name": "test_clone"})
    assert reply.body == ok(
        "Cloned VM 106 to new VM 105 (test_clone)", {"vm_id": 105, "started": True})
    reply = api.post("/clone/create", {
        "container_id": 106, "new_lxc_id": 108, "new_lxc_name": "c", "hostname": "c"})
    assert reply.body == ok("Cloned VM 106 to new VM 108 (c)", {"vm_id": 108, "started": True})


def test_storage_grows_by_what_was_asked(api, host):
    reply = api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5})
    assert (reply.status, reply.body) == (200, ok("Storage increased by 5 GB for VM 104"))
    assert host.conf(104)["rootfs"] == "local-lvm:vm-104-disk-0,size=13G"
    assert host.calls() == ["pct resize 104 rootfs +5G"]


def test_a_disk_that_a_container_does_not_have_is_not_grown(steady):
    before = steady.host.calls()
    reply = steady.post(
        "/scale/storage/increase", {"vm_id": 104, "disk_size": 1, "disk": "mp7"})
    assert (reply.status, reply.body, steady.host.calls()) == (
        409, refused("VM 104 has no mp7"), before)


def test_a_resize_that_fails_with_exit_status_0_is_a_failure(api, host):
    host.add(107, rootfs="local-lvm:vm-107-disk-0,size=16380G")
    reply = api.post("/scale/storage/increase", {"vm_id": 107, "disk_size": 16384})
    assert (reply.status, reply.body["error"]) == (
        500, "The rootfs of VM 107 has grown to 32764G, but its file system has not followed")
    assert "Failed to update the container's filesystem" in reply.body["details"]
    host.faults(resize={"work_fails": (
        "error resizing volume '/dev/pve/vm-104-disk-0':   "
        "Error during parsing of command line.")})
    reply = api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5})
    assert (reply.status, reply.body) == (500, error(
        "The rootfs of VM 104 was not grown as asked; its size is now 8G", outcome="incomplete",
        details=("error resizing volume '/dev/pve/vm-104-disk-0':   "
                 "Error during parsing of command line.")))
    host.faults(resize={"exit": 0, "stdout": "nothing happened\n"})
    assert api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5}).status == 500
    metrics = api.get("/metrics").body
    assert ('lxc_autoscale_scaling_failures_total'
            '{container_id="104",resource="storage",reason="failed"} 2') in metrics
    assert 'lxc_autoscale_scaling_actions_total' not in metrics.replace("# ", "").split(
        "lxc_autoscale_scaling_actions_total{")[0]


NOISE = [       # what pct prints on stderr at every call, though all goes well
    'Plugin "PVE::Storage::Custom::ExamplePlugin" is implementing an older storage API, '
    'an upgrade is recommended',
    "vm 104 - unable to parse config: lxc.cgroup.devices.allow = c 10:200 rwm",
    "  /dev/sr0: open failed: No medium found",
    "Task finished with 1 warning(s)!",
]
CHANGES = [     # method, path, body, message, data: in this order each of them works
    ("POST", "/scale/cores", {"cores": 4}, "CPU cores set to 4 for VM 104", {}),
    ("POST", "/scale/ram", {"memory": 4096}, "Memory set to 4096 MB for VM 104", {}),
    ("POST", "/scale/storage/increase", {"disk_size": 5},
     "Storage increased by 5 GB for VM 104", {}),
    ("POST", "/snapshot/create", {"snapshot_name": "s1"}, "Snapshot 's1' created for VM 104", {}),
    ("POST", "/snapshot/rollback", {"snapshot_name": "s1"},
     "Rolled back VM 104 to snapshot 's1'", {}),
    ("DELETE", "/snapshot/delete", {"snapshot_name": "s1"}, "Snapshot 's1' of VM 104 deleted", {}),
    ("POST", "/clone/create", {"new_vm_id": 105, "new_vm_name": "x", "start": True},
     "Cloned VM 104 to new VM 105 (x)", {"vm_id": 105, "started": True}),
    ("DELETE", "/clone/delete", {}, "Deleted VM 104", {}),
]


def test_a_change_that_succeeded_has_what_pct_said_on_stderr_as_warnings(api, host):
    commands = ("set", "resize", "snapshot", "rollback", "delsnapshot", "clone", "start",
                "destroy", "status")
    host.faults(**{command: {"stderr": "\n".join([*NOISE, ""])} for command in commands})
    for method, path, body, message, data in CHANGES:
        reply = api.request(method, path, {"vm_id": 104, **body})
        assert (reply.status, reply.body) == (
            200, ok(message, {**data, "warnings": [line.strip() for line in NOISE]}))
    assert host.running(105) and host.snapshots(105) == [] and not host.path(104).exists()
    assert (host.conf(105)["rootfs"], host.conf(105)["cores"]) == (
        "local-lvm:vm-105-disk-0,size=13G", "4")
    assert api.log("error") == ""
    assert parse_exposition(api.get("/metrics").body)[1][
        'lxc_autoscale_scaling_actions_total'
        '{container_id="104",resource="storage",action="increase"}'] == 1


def test_warnings_are_bounded(api, host):
    host.faults(set={"stderr": "".join(f"line {number}\n" for number in range(100000))})
    warnings = api.post("/scale/cores", {"vm_id": 104, "cores": 4}).body["data"]["warnings"]
    assert warnings[-1] == "line 99999" and 300 < len(warnings) < 400


@pytest.mark.parametrize("said", [
    ("Failed to update the container's filesystem: "
     "command 'resize2fs /dev/pve/vm-104-disk-0' failed: exit code 1"),
    "internal error: CT running but mount point not attached to a loop device",
    "internal error: CT running but mountpoint not attached to a loop device",
    "command 'losetup --set-capacity /dev/loop3' failed: exit code 1",
    "can't map rbd volume vm-104-disk-0: rbd: sysfs write failed",
])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_volume_that_has_grown_alone_is_a_failure_wherever_pct_says_so(api, host, stream, said):
    host.faults(resize={stream: "\n".join([*NOISE, said, ""])})
    reply = api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5})
    assert (reply.status, reply.body["error"]) == (
        500, "The rootfs of VM 104 has grown to 13G, but its file system has not followed")
    assert said in reply.body["details"] and host.conf(104)["rootfs"].endswith("size=13G")


def test_a_resize_that_failed_stays_one_among_what_pct_always_says(api, host):
    why = "error resizing volume '/dev/pve/vm-104-disk-0':   Error during parsing of command line."
    host.faults(resize={"work_fails": why, "stderr": "\n".join([*NOISE, ""])})
    reply = api.post("/scale/storage/increase", {"vm_id": 104, "disk_size": 5})
    assert (reply.status, reply.body) == (500, error(
        "The rootfs of VM 104 was not grown as asked; its size is now 8G", outcome="incomplete",
        details="\n".join([*NOISE, why])))


@pytest.mark.parametrize("before, after, status", [
    ("x,size=8G", "x,size=13G", 200), ("x,size=8G", "x,size=13312M", 200),
    ("x,size=1019G", "x,size=1T", 200),
    ("x,size=8G", "x,size=15G", 200),                           # somebody else grew it as well
    ("x,size=8G", "x,size=12G", 500), ("x,size=8G", "x,size=8192M", 500),
    ("x,size=8G", "x,size=8G,mountoptions=noatime", 500),
    ("x,size=8G", "x,size=3G", 500), ("x,size=8G", "x", 500), ("x,size=8G", None, 500),
    ("x,size=8392708K", "x,size=13635588K", 200), ("x,size=8392708K", "x,size=13635587K", 500),
    ("x,size=8594132993", "x,size=13962842113", 200),       # bytes, if it is no whole number of K
    ("x", "x,size=13G", 200),                               # pct writes the size with each success
    ("x", "x", 500), ("/mnt/bind", "/mnt/bind", 500), ("x,size=0T", "x,size=5G", 200),
    ("x,size=0T", "x,size=4G", 500),
])
def test_a_resize_succeeded_if_the_configured_size_rose_by_what_was_asked(
        before, after, status, monkeypatch):
    sizes = [module.Conf({}, {"rootfs": rootfs}, {}) for rootfs in (before, after)]
    change = module.Change(
        module.PATHS["/scale/storage/increase"], {"vm_id": 104}, "127.0.0.1", None)
    monkeypatch.setattr(change, "conf", lambda: sizes.pop(0))
    commands = module.SimpleNamespace(
        run=lambda node, argv, changes: module.Result(0, "", NOISE[0], False))
    change.host = module.SimpleNamespace(commands=commands)
    if status == 200:
        assert module.grow_storage(change, 104, 5, "rootfs", None) == (
            "Storage increased by 5 GB for VM 104")
        assert change.warnings == [NOISE[0]]
    else:
        size = module.option(after, "size") or "unknown"
        with pytest.raises(module.Problem) as caught:
            module.grow_storage(change, 104, 5, "rootfs", None)
        assert (caught.value.status, caught.value.error) == (
            500, f"The rootfs of VM 104 was not grown as asked; its size is now {size}")
    assert sizes == [] and change.steps == [["pct", "resize", "104", "rootfs", "+5G"]]


def test_snapshots_are_taken_listed_and_rolled_back(api, host):
    before = int(time.time())
    reply = api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": "backup_20241224"})
    assert (reply.status, reply.body) == (200, ok("Snapshot 'backup_20241224' created for VM 104"))
    subprocess.run([host.root / "bin/pct", "snapshot", "104", "second",
                    "--description", "line one\nline two: x"], check=True)
    reply = api.get("/snapshot/list?vm_id=104")
    times = [row["timestamp"] for row in reply.body["data"]]
    assert reply.body == ok("Found 2 snapshots for VM 104", [
        {"name": "backup_20241224", "timestamp": times[0], "description": None, "parent": None,
         "state": None},
        {"name": "second", "timestamp": times[1], "description": "line one\nline two: x",
         "parent": "backup_20241224", "state": None}])
    assert all(module.utc(before) <= moment <= module.utc(time.time()) for moment in times)
    api.post("/scale/cores", {"vm_id": 104, "cores": 8})
    reply = api.post("/snapshot/rollback", {"vm_id": 104, "snapshot_name": "backup_20241224"})
    assert (reply.status, reply.body) == (
        200, ok("Rolled back VM 104 to snapshot 'backup_20241224'"))
    assert host.conf(104)["cores"] == "2" and host.running(104)


def test_an_incomplete_snapshot_has_its_state(api, host):
    with open(host.path(104), "a") as file:
        file.write("\n[whole]\nsnaptime: 1795461031\n"
                   "\n[vzdump]\nsnaptime: 1795461032\nparent: whole\nsnapstate: prepare\n"
                   "\n[gone]\nsnaptime: 1795461033\nsnapstate: delete\n")
    assert [(row["name"], row["state"])
            for row in api.get("/snapshot/list?vm_id=104").body["data"]] == [
        ("whole", None), ("vzdump", "prepare"), ("gone", "delete")]


def test_a_rolled_back_container_runs_again_only_if_it_ran(api, host):
    for vm_id, ran in ((104, True), (106, False)):
        api.post("/snapshot/create", {"vm_id": vm_id, "snapshot_name": "s1"})
        assert api.post("/snapshot/rollback", {"vm_id": vm_id, "snapshot_name": "s1"}).status == 200
        assert host.running(vm_id) == ran
    assert [call for call in host.calls() if "rollback" in call] == [
        "pct rollback 104 s1 --start 1", "pct rollback 106 s1"]


@pytest.mark.parametrize("name, says", [
    ("2024-backup", "Invalid snapshot_name: Proxmox takes 2 to 40 characters: "
                    "a letter, then letters, digits, _ and -"),
    ("x", "Invalid snapshot_name: Proxmox takes 2 to 40 characters: "
          "a letter, then letters, digits, _ and -"),
    ("x" * 41, "Invalid snapshot_name: Proxmox takes 2 to 40 characters: "
               "a letter, then letters, digits, _ and -"),
    ("current", "Invalid snapshot_name: Proxmox reserves the name 'current'"),
])
def test_snapshot_names_that_pct_refuses_are_a_clear_400(api, name, says):
    reply = api.post("/snapshot/create", {"vm_id": 104, "snapshot_name": name})
    assert (reply.status, reply.body["error"]) == (400, says)


@pytest.mark.parametrize("source", [104, 106])
def test_a_container_is_cloned_running_or_not(api, host, source):
    reply = api.post(
        "/clone/create", {"vm_id": source, "new_vm_id": 105, "new_vm_name": "test_clone"})
    assert (reply.status, reply.body) == (200, ok(
        f"Cloned VM {source} to new VM 105 (test_clone)", {"vm_id": 105, "started": True}))
    assert host.conf(105)["hostname"] == "test-clone" and host.running(105)
    assert host.snapshots(source) == [] and "lock" not in host.conf(source)
    assert api.delete("/clone/delete", {"vm_id": 105}).body == ok("Deleted VM 105")
    assert not host.path(105).exists()


def test_a_clone_is_started_if_asked(api, host):
    body = {"vm_id": 106, "new_vm_id": 105, "new_vm_name": "test_clone"}
    assert api.post("/clone/create", {**body, "start": "true"}).status == 400
    assert api.post("/clone/create", {**body, "start": True}).status == 200
    assert host.running(105)
    # a running one is stopped and destroyed
    assert api.delete("/clone/delete", {"vm_id": 105}).status == 200
    assert host.calls()[-1] == "pct destroy 105 --force 1" and not host.running(105)
    host.faults(start={"work_fails": "unable to get PID for CT 105 (not running?)"})
    reply = api.post("/clone/create", {**body, "start": True})
    assert (reply.status, reply.body["error"]) == (
        409, "VM 105 was cloned, but did not start: The container is just starting or stopping; "
             "look at its state")
    assert reply.body["details"].endswith(
        "start it with: pct start 105, or remove it with: pct destroy 105")


def test_a_clone_s_new_address_leaves_all_else_of_its_network_as_it_was_but_a_gateway_under_dhcp(
        api, host):
    net = "name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:01,{}type=veth"
    for vm_id, before, ip, after in (
            (107, "ip=dhcp,ip6=auto,", "192.0.2.5/24", "ip6=auto,type=veth,ip=192.0.2.5/24"),
            (108, "gw=192.0.2.1,ip=192.0.2.7/24,", "dhcp", "type=veth,ip=dhcp")):
        host.add(vm_id, net0=net.format(before))
        assert api.post("/clone/create", {
            "vm_id": vm_id, "new_vm_id": vm_id + 100, "new_vm_name": "x", "ip": ip,
            "start": False}).status == 200
        hwaddr = f"BC:24:11:{vm_id + 100:02X}:00:00"
        assert host.conf(vm_id + 100)["net0"] == f"name=eth0,bridge=vmbr0,hwaddr={hwaddr},{after}"


def test_twice_the_time_that_a_shutdown_or_reboot_was_given_is_waited_for_on_top(launch):
    """For so long pct may take to tell that a container has not followed (PVE::LXC, vm_stop)."""
    api = launch(constants={"Changes.answer": Code(
        "lambda self, change, client, seconds: daemon.success(f'{seconds} s')")})
    for path, body, seconds in (("shutdown", {"timeout": 100}, 260), ("reboot", {}, 180),
                                ("stop", {}, 60)):
        assert api.post(f"/power/{path}", {"vm_id": 106, **body}).body == ok(f"{seconds} s")


def test_a_clone_needs_an_id_of_its_own(api, host):
    body = {"vm_id": 104, "new_vm_id": 104, "new_vm_name": "x"}
    assert api.post("/clone/create", body).body == refused(
        "Invalid new_vm_id: must differ from vm_id")
    assert api.post("/clone/create", {**body, "new_vm_id": 106}).body["error"] == (
        "The id 106 is taken")
    for name in ("a..b", "a-", "test_clone_", "_x", ".a", "a.", "a._b"):
        reply = api.post("/clone/create", {**body, "new_vm_id": 105, "new_vm_name": name})
        assert (reply.status, reply.body) == (400, refused(
            f"Invalid new_vm_name: {module.NEW_VM_NAME.rule}"))
    asynchronous = {"Prefer": "respond-async"}
    assert api.request("POST", "/clone/create", body, headers=asynchronous).status == 400
    assert host.snapshots(104) == [] and not host.path(105).exists()
    assert "pct clone 104" not in " ".join(host.calls())


def test_the_old_service_s_client_reads_sixty_configurations_and_scales_them_at_the_first_try(
        api, host):
    text = host.path(106).read_text()
    ids = [str(vm_id) for vm_id in range(200, 260)]
    for vm_id in ids:
        host.path(vm_id).write_text(
            text.replace("db-01", f"ct{vm_id}").replace("vm-106", f"vm-{vm_id}"))

    def patiently(method, path, body=None):
        """-> (number of tries, answer); three tries with 5 s for each, as that client has them."""
        for tries in (1, 2, 3):
            with contextlib.suppress(OSError, http.client.HTTPException):
                reply = api.request(method, path, body, timeout=5)
                if reply.status == 200:
                    return tries, reply.body
        return tries, None

    def read(vm_id):
        return patiently("GET", f"/resource/vm/config?vm_id={vm_id}&lxc_id={vm_id}")

    def scale(vm_id):
        return patiently("POST", "/scale/cores", {"vm_id": vm_id, "lxc_id": vm_id, "cores": "3"})
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        started = time.monotonic()
        found = list(pool.map(read, ids))
        assert time.monotonic() - started < 5
        assert host.calls() == []
        scaled = list(pool.map(scale, ids))
    limits = api.get("/resource/vm/config?vm_id=106").body["data"]["limits"]
    assert found == [(1, ok(f"Successfully retrieved configuration for VM {vm_id}", {
        "vm_id": int(vm_id), "lxc_id": int(vm_id),
        "cores": 2, "memory_mb": 2048, "swap_mb": 512, "disk_gb": 8,
        "hostname": f"ct{vm_id}", "limits": limits, "mountpoints": []})) for vm_id in ids]
    assert scaled == [(1, ok(f"CPU cores set to 3 for VM {vm_id}")) for vm_id in ids]
    assert sorted(host.calls()) == [f"pct set {vm_id} --cores 3" for vm_id in ids]
    assert {host.conf(vm_id)["cores"] for vm_id in ids} == {"3"}


def test_a_snapshot_is_deleted(api, host):
    body = {"vm_id": 104, "snapshot_name": "backup_20241224"}
    assert api.delete("/snapshot/delete", body).status == 404
    api.post("/snapshot/create", body)
    assert api.delete("/snapshot/delete", body).body == ok(
        "Snapshot 'backup_20241224' of VM 104 deleted")
    assert host.snapshots(104) == []


def test_a_change_takes_nothing_but_the_key_from_its_query(api, host):
    body = {"vm_id": 104, "cores": 4}
    for query in ("cores=8", "vm_id=106", "x", f"api_key={KEY}&cores=8"):
        reply = api.post(f"/scale/cores?{query}", body)
        assert (reply.status, reply.body) == (400, refused(
            "Unknown query parameter; POST /scale/cores takes its parameters from a JSON body"))
    assert host.calls() == []
    assert api.post(f"/scale/cores?api_key={KEY}", body, key=None).status == 200
    assert host.calls() == ["pct set 104 --cores 4"]


# The description

def test_the_description_has_every_route_parameter_and_code(steady):
    document = steady.get("/openapi.json").body
    assert document["openapi"] == "3.1.0" and list(document["paths"]) == list(module.PATHS)
    cores = document["paths"]["/scale/cores"]["post"]
    assert cores["requestBody"]["content"]["application/json"]["schema"] == {
        "type": "object", "additionalProperties": False, "required": ["vm_id", "cores"],
        "properties": {
            "vm_id": {"type": "integer", "minimum": 100, "maximum": 999999,
                      "description": "must be an integer between 100 and 999999; "
                                     "may also be called lxc_id or container_id"},
            "cores": {"type": "integer", "minimum": 1, "maximum": 128,
                      "description": "must be an integer between 1 and 128"}}}
    assert (set(cores["responses"]) == {"200", "202", *map(str, module.STATUSES)}
            and cores["security"] == [{"header": []}, {"query": []}])
    name = document["paths"]["/snapshot/create"]["post"]["requestBody"]["content"][
        "application/json"]["schema"]["properties"]["snapshot_name"]
    for value in SNAPSHOT_NAMES + ["-x", "a.b", "", "x" * 101]:
        matches = (bool(re.search(name["pattern"], value))
                   and name["minLength"] <= len(value) <= name["maxLength"])
        assert matches == bool(module.SNAPSHOT_NAME.test(value))
    assert document["paths"]["/health/check"]["get"]["security"] == []
    assert document["paths"]["/metrics"]["get"]["security"] == [{}, {"header": []}, {"query": []}]
    headers = document["components"]["headers"]
    assert headers["Retry-After"] == {
        "description": "Seconds after which to try again.", "schema": {"type": "integer"}}
    assert {each["schema"]["type"] for each in headers.values()} == {"integer", "string"}


def test_the_description_tells_units_defaults_and_what_happens_without_a_parameter(steady):
    paths = steady.get("/openapi.json").body["paths"]

    def described(path, name):
        found = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return found["properties"][name]
    assert described("/power/shutdown", "timeout") == {
        "type": "integer", "minimum": 1, "maximum": 3600, "default": 60,
        "description": "must be an integer between 1 and 3600; in seconds"}
    assert described("/scale/storage/increase", "disk")["default"] == "rootfs"
    assert described("/scale/ram", "memory")["description"].endswith("; in MB")
    assert described("/clone/create", "full") == {
        "type": "boolean",
        "description": "must be true or false (a JSON boolean); without it, a template is cloned "
                       "linked, and all else in full"}
    # which limits it if a setting says that it needs a key
    assert set(paths["/metrics"]["get"]["responses"]["200"]["headers"]) == set(module.RATE_HEADERS)


JSON_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool,
              "number": (int, float), "integer": int, "null": type(None)}


def violations(value, schema, document, where="$"):
    """What in a JSON value is not as its schema says (type, const, enum, properties,
    required, items, oneOf, anyOf, $ref)."""
    if "$ref" in schema:
        schema = functools.reduce(dict.__getitem__, schema["$ref"].split("/")[1:], document)
    if "anyOf" in schema:
        found = [violations(value, each, document, where) for each in schema["anyOf"]]
        return [] if [] in found else sum(found, [])
    if "oneOf" in schema:
        fitting = [each for each in schema["oneOf"] if not violations(value, each, document)]
        return [] if len(fitting) == 1 else [
            f"{where} fits {len(fitting)} of its schemas: {value!r}"]
    kinds = schema.get("type", list(JSON_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, JSON_TYPES[kind])
               and (kind == "boolean" or not isinstance(value, bool)) for kind in kinds):
        return [f"{where} is no {kinds}: {value!r}"]
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return [f"{where} may not be {value!r}"]
    found = []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [f"{where}.{name} is missing"
                  for name in schema.get("required", []) if name not in value]
        found += [f"{where}.{name} is not described"
                  for name in value if properties and name not in properties]
        for name in set(value) & set(properties):
            found += violations(value[name], properties[name], document, f"{where}.{name}")
    for number, item in enumerate(value if isinstance(value, list) else []):
        found += violations(item, schema.get("items", {}), document, f"{where}[{number}]")
    return found


@pytest.mark.parametrize("value, schema, count", [
    ({"a": 1, "b": None},
     module.record("", a=module.shown("integer", ""), b=module.shown("string?", "")), 0),
    ({"a": True, "b": 5},
     module.record("", a=module.shown("integer", ""), b=module.shown("string?", "")), 2),
    ({"a": 1.5, "c": 5},
     module.record("", a=module.shown("integer", ""), b=module.shown("string?", "")), 3),
    ([{"cpu": 1, "memory": 2, "io": None}, {"cpu": 1}], module.list_of("Pressure"), 2),
    ("success", {"const": "error"}, 1), ("lost", {"type": "string", "enum": ["unknown"]}, 1),
    (None, {"oneOf": [module.called("Pressure"), {"type": "null"}]}, 0),
    (5, {"oneOf": [module.called("Pressure"), {"type": "null"}]}, 1),
    (5, {"anyOf": [{"type": "integer"}, {"type": "number"}]}, 0),
    (5, {"anyOf": [{"type": "string"}, {"type": "null"}]}, 2),
])
def test_the_validator_sees_what_does_not_fit(value, schema, count):
    assert len(violations(value, schema, module.openapi())) == count


def described(document, method, path, reply):
    """What of a reply is not as the description says: its status, body, and headers."""
    row = document["paths"][path][method.lower()]["responses"].get(str(reply.status))
    if row is None:
        return [f"{reply.status} is not described"]
    if "$ref" in row:
        row = functools.reduce(dict.__getitem__, row["$ref"].split("/")[1:], document)
    (kind, content), = row["content"].items()
    known = {"Connection", "Content-Length", "Content-Type", "Date", "Server",
             "Cache-Control", "X-Content-Type-Options", *row["headers"]}
    found = [f"{name} is not described" for name in reply.headers if name not in known]
    if reply.headers["Content-Type"].partition(";")[0] != kind:
        found.append(reply.headers["Content-Type"])
    return found + violations(reply.body, content["schema"], document)


def test_every_answer_is_as_the_description_says(launch, host):
    """Of each GET route, from files and by asking pct; of each change that works, and of errors."""
    host.add(107, "golden", lock="backup", template=1, tags="a;b", cores=None,
             mp0="/mnt/photos,mp=/photos")
    subprocess.run([host.root / "bin/pct", "snapshot", "104", "first"], check=True)
    api = launch()
    document = api.get("/openapi.json").body
    pct = launch(proxmox={"pve_dir": str(host.root / "nowhere"), "cgroup_dir": "/nowhere"})
    parameters = {"vm_id": (104, 106, 107, 999), "node_name": ("proxmox", "nosuch"),
                  "id": ("0123456789abcdef",)}
    seen = Counter()
    for path, route in module.PATHS.items():
        if route.method != "GET":
            continue
        name = route.parameters[0].name if route.parameters else None
        for query in ([f"?{name}={value}" for value in parameters[name]] + ["?x=1"] if name
                      else [""]):
            for daemon in (api, pct):
                reply = daemon.get(path + query)
                assert described(document, "GET", path, reply) == [], (path, query)
                seen[path] += reply.status == 200
    assert (set(seen) == {path for path, route in module.PATHS.items() if route.method == "GET"}
            and min(seen.values()) > 0)
    host.faults(**{command: {"stderr": "a warning\n"} for command in ("set", "resize", "destroy")})
    for method, path, body, *_ in CHANGES:
        reply = api.request(method, path, {"vm_id": 104, **body})
        assert (reply.status, described(document, method, path, reply)) == (200, []), (path, reply)
    for body, status in (({"vm_id": 999, "cores": 4}, 404), ({"vm_id": 104}, 400),
                         ({"vm_id": 107, "cores": 4}, 409)):
        reply = api.post("/scale/cores", body)
        assert (reply.status, described(document, "POST", "/scale/cores", reply)) == (
            status, []), reply
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4},
                     headers={"Content-Encoding": "gzip"})
    assert (reply.status, described(document, "POST", "/scale/cores", reply)) == (415, [])
    assert {"Accept-Encoding"} <= set(reply.headers) & set(
        document["components"]["responses"]["ChangeError415"]["headers"])
    # what a place that is not there is answered with
    reply = Reply(503, error("Too many connections; try again later", outcome="nothing_done"),
                  {"Content-Type": "application/json", "Retry-After": "1"})
    assert [described(document, "GET", path, reply) for path in (
        "/health/check", "/resource/vm/list")] == [[], []]
    # one schema does not forbid what the other has more, so it may fit both
    turned_away = [module.called("Error"), module.called("ChangeError")]
    assert [row["content"]["application/json"]["schema"] for row in (
        document["components"]["responses"]["Error503"],
        document["paths"]["/health/check"]["get"]["responses"]["503"])] == [
            {"anyOf": turned_away}, {"anyOf": [module.called("Health"), *turned_away]}]
    reply = api.get("/operations?vm_id=107")
    assert (reply.body["data"][0]["outcome"], described(document, "GET", "/operations", reply)) == (
        "nothing_done", [])
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4},
                     headers={"Prefer": "respond-async"})
    assert (reply.status, described(document, "POST", "/scale/cores", reply)) == (202, [])


def test_a_limited_answer_is_as_the_description_says(launch):
    api, via = (launch(rate_limiting={"max_requests_per_minute": 2}),
                {"X-Forwarded-For": "198.51.100.7"})
    document = module.openapi()
    replies = [
        api.post("/scale/cores", {"vm_id": 104, "cores": 4}, headers=via),
        api.get("/routes", headers=via, key="wrong"), api.get("/routes", headers=via)]
    assert [reply.status for reply in replies] == [200, 401, 429]
    assert [described(document, method, path, reply) for reply, method, path in zip(
        replies, ("POST", "GET", "GET"), ("/scale/cores", "/routes", "/routes"))] == [[], [], []]
    limited = document["components"]["responses"]["Error429"]
    assert set(limited["headers"]) == {
        "Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"}
    assert limited["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/RateLimited"}
    assert set(replies[2].body) == set(document["components"]["schemas"]["RateLimited"]["required"])


def test_errors_of_changes_are_described_with_their_outcome(steady):
    document = steady.get("/openapi.json").body
    schemas, routes = document["components"]["schemas"], {
        path: row for path, row in document["paths"].items()}
    assert schemas["ChangeError"]["properties"]["outcome"]["enum"] == [
        "nothing_done", "incomplete", "running", "unknown"]
    assert "outcome" not in schemas["Error"]["properties"]
    for path, route in module.PATHS.items():
        row = routes[path][route.method.lower()]["responses"]["500"]
        assert row == {"$ref": "#/components/responses/"
                               f"{'Error' if route.method == 'GET' else 'ChangeError'}500"}
    assert (document["components"]["responses"]["ChangeError401"]
            == document["components"]["responses"]["Error401"])


def test_the_description_is_valid_openapi(steady):
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(steady.get("/openapi.json").body)


# From a request to an answer

def test_routes_are_listed_from_the_table(steady):
    rows = steady.get("/routes").body["routes"]
    assert [(row["endpoint"], row["methods"]) for row in rows] == [
        ("/health/check", ["GET"]), ("/metrics", ["GET"]), ("/routes", ["GET"]),
        ("/openapi.json", ["GET"]), ("/scale/cores", ["POST"]), ("/scale/ram", ["POST"]),
        ("/scale/storage/increase", ["POST"]), ("/snapshot/create", ["POST"]),
        ("/snapshot/list", ["GET"]), ("/snapshot/delete", ["DELETE"]),
        ("/snapshot/rollback", ["POST"]), ("/clone/create", ["POST"]),
        ("/clone/delete", ["DELETE"]),
        ("/power/start", ["POST"]), ("/power/stop", ["POST"]), ("/power/shutdown", ["POST"]),
        ("/power/reboot", ["POST"]),
        ("/operations", ["GET"]), ("/resource/vm/list", ["GET"]), ("/resource/lxc/list", ["GET"]),
        ("/resource/vm/status", ["GET"]), ("/resource/lxc/status", ["GET"]),
        ("/resource/vm/config", ["GET"]), ("/resource/lxc/config", ["GET"]),
        ("/resource/node/status", ["GET"]), ("/resource/cluster/status", ["GET"])]
    assert all(row["description"].endswith(".") for row in rows)


def test_head_options_and_wrong_methods(either):
    with either.connect() as sock:
        sock.sendall(f"HEAD /routes HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n\r\n".encode())
        head = read_answer(sock, head=True)
        sock.sendall(f"GET /routes HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n\r\n".encode())
        full = read_answer(sock)
    assert (head.status, head.body, head.headers["Content-Length"]) == (
        200, "", full.headers["Content-Length"])
    wait_until(lambda: " HEAD /routes 200 0 " in either.log("access"))
    for path, allow in (("/routes", "GET, HEAD, OPTIONS"), ("/scale/cores", "POST, OPTIONS"),
                        ("/clone/delete", "DELETE, OPTIONS")):
        reply = either.request("OPTIONS", path)
        assert (reply.status, reply.body, reply.headers["Allow"]) == (204, "", allow)
        assert not {"Content-Length", "Content-Type"} & set(reply.headers)
        reply = either.request("PATCH", path)
        assert (reply.status, reply.body, reply.headers["Allow"]) == (
            405, error(f"Wrong method; {path} takes {allow}"), allow)
    for path in ("/", "/nowhere", "/routes/", "//routes", "/ROUTES", "/%72outes", "/routes%00"):
        reply = either.get(path)
        assert (reply.status, reply.body) == (
            404, error("Unknown path; GET /routes lists the endpoints"))


@pytest.mark.parametrize("given", [
    {}, {"X-API-Key": ""}, {"X-API-Key": "x"}, {"X-API-Key": KEY[:-1]}, {"X-API-Key": KEY + "x"},
    {"X-API-Key": KEY.upper()}, {"X-API-Key": "é" * 20}, {"Authorization": f"Bearer {KEY}"},
])
def test_without_a_valid_key_every_path_but_two_is_401(steady, given):
    paths = list(module.PATHS) + [
        "/", "/nowhere", "/health", "/metrics/", "/health/check/x", "/routes?x=%ff", "/%00",
        "/routes?api_key=", "/routes?api_key=x"]
    for path in paths:
        for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT"):
            reply = steady.request(method, path, headers=given, key=None)
            if path in ("/health/check", "/metrics"):
                assert reply.status in (200, 204, 405)
            else:
                assert reply.status == 401 and reply.headers["WWW-Authenticate"]
                assert method == "HEAD" or reply.body == error("Missing or invalid API key")


def test_a_key_may_come_in_the_header_or_in_the_query(steady):
    assert steady.get("/routes").status == 200
    assert steady.get(f"/routes?api_key={KEY}", key=None).status == 200
    assert steady.get(f"/routes?api%5Fkey={KEY.replace('-', '%2D')}", key=None).status == 200
    # one guess a request
    assert steady.get(f"/routes?api_key={KEY}&api_key={KEY}", key=None).status == 401
    assert steady.get(f"/routes?api_key={KEY}", key="wrong").status == 401
    assert statuses(steady.raw(
        f"GET /routes HTTP/1.0\r\nX-API-Key: {KEY}\r\nX-API-Key: {KEY}\r\n\r\n".encode())
    )[0] == [401]


def test_several_keys_are_valid_at_once_and_none_is_needed_if_switched_off(launch):
    api = launch(authentication={"api_keys": ["second-key-0123456789", "third-key-0123456789"]})
    assert [api.get("/routes", key=key).status for key in (
        KEY, "second-key-0123456789", "third-key-0123456789", "fourth-key-0123456789")] == [
            200, 200, 200, 401]
    assert launch(authentication={"enabled": False, "api_key": None}).get(
        "/routes", key=None).status == 200


READING_KEY = "reading-key-0123456789"


def test_a_key_that_may_only_read_reads_everything_and_changes_nothing(launch, host):
    api = launch(authentication={"read_only_keys": [READING_KEY]}, rate_limiting={"enabled": False})
    valid = {"vm_id": 104, "cores": 4, "memory": 4096, "disk_size": 1, "snapshot_name": "x",
             "new_vm_id": 105, "new_vm_name": "y", "node_name": "proxmox"}
    for path, route in module.PATHS.items():
        values = {each.name: valid[each.name] for each in route.parameters if each.name in valid}
        if route.method == "GET":
            query = ("?" + "&".join(f"{name}={value}" for name, value in values.items())
                     if values else "")
            for method in ("GET", "HEAD"):
                assert api.request(method, path + query, key=READING_KEY).status == 200, path
        for key_in in ({"key": READING_KEY},
                       {"key": None, "path": f"{path}?api_key={READING_KEY}"}):
            for method in ("POST", "DELETE") if route.key is True else ():
                reply = api.request(method, **{"path": path, "body": values, **key_in})
                assert (reply.status, reply.body["error"]) == (403, "This key may only read"), path
        assert api.request("OPTIONS", path, key=READING_KEY).status == 204
    assert (api.post("/nowhere", {}, key=READING_KEY).status == 403
            and api.get("/nowhere", key=READING_KEY).status == 404)
    assert [call for call in host.calls() if not call.startswith(
        ("pct list", "pct config", "pct status", "pct listsnapshot", "pvesh get"))] == []
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 4}).status == 200
    host.faults(set={"exit": 255, "stderr": f"said {READING_KEY}"})
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 5}).status == 500
    assert ("said [API key]" in api.log("error")
            and READING_KEY not in api.log() + api.log("error") + api.log("access"))


def test_metrics_ask_for_a_key_if_they_are_told_to(launch, host):
    api = launch(authentication={"read_only_keys": [READING_KEY], "metrics": "key"},
                 rate_limiting={"max_requests_per_minute": 7})
    for path in ("/metrics", "/metrics?api_key=x", "/metrics?_=1"):
        reply = api.get(path, key=None)
        assert (reply.status, reply.body, reply.headers["WWW-Authenticate"]) == (
            401, error("Missing or invalid API key"), 'ApiKey realm="lxc_autoscale_api"')
    assert [api.get("/metrics", key=key).status for key in (KEY, READING_KEY, "x")] == [
        200, 200, 401]
    assert api.get(f"/metrics?api_key={READING_KEY}", key=None).status == 200
    assert api.get("/health/check", key=None).status == 200
    guesses = [api.get("/metrics", key="x", headers={"X-Forwarded-For": "198.51.100.7"}).status
               for _ in range(9)]
    assert guesses == [401] * 7 + [429] * 2


def test_time_does_not_tell_how_much_of_a_key_is_right():
    """All keys are compared, as digests of one length, whatever was sent."""
    config = module.load_settings(
        f'authentication:\n  api_key: "{KEY}"\n  read_only_keys: ["second-key-0123456789"]\n')
    api, compared = module.Api(config, None, module.Metrics(), module.Workers()), []
    real, module.hmac.compare_digest = module.hmac.compare_digest, lambda a, b: (
        compared.append((len(a), len(b))) or real(a, b))
    try:
        for key in (KEY, KEY[:-1] + "x", "x", "second-key-0123456789"):
            request = module.Request(
                "GET", "/routes", "", {"x-api-key": key}, None, None, module.Client(None, "-"))
            with contextlib.suppress(module.Problem):
                api.authenticate(request, True)
    finally:
        module.hmac.compare_digest = real
    assert compared == [(32, 32)] * 8


def test_no_key_appears_in_any_log_answer_or_metric(launch, host):
    api = launch(inside=["env"])        # with a command line of its own
    quoted = "".join(f"%{ord(char):02x}" for char in KEY)
    for line in (
            f"GET /routes?api_key={KEY} HTTP/1.1", f"GET /routes?api_key={quoted} HTTP/1.1",
            f"GET /routes?api_key={KEY}&api_key={KEY} HTTP/1.1",
            f"GET /nowhere?api_key={KEY} HTTP/1.1", f"GET /routes%3Fapi_key={KEY} HTTP/1.1",
            f"GET /routes%3Fapi_key={quoted} HTTP/1.1", f"GET /routes&api_key={KEY} HTTP/1.1",
            f"GET /{KEY} HTTP/1.1", f"GET /x;api_key={KEY} HTTP/1.1",
            f"GET /{'a' * (98 - len(KEY))}/{KEY} HTTP/1.1", f"GET /{'a' * 80}/{KEY} HTTP/1.1",
            f"GET /routes?{KEY}=1 HTTP/1.1", f"GET /routes api_key={KEY} HTTP/1.1",
            f"{KEY} / HTTP/1.1", f"GET http://x/?api_key={KEY} HTTP/1.1",
            f"GET https://x:5000/routes?api_key={KEY} HTTP/1.1",
            f"GET http://{KEY}/routes HTTP/1.1", f"GET http://u:{KEY}@x/ HTTP/1.1",
            f"GET http://x/{KEY} HTTP/1.1", f"GET http://x?{KEY} HTTP/1.1",
            f"GET http://x&api_key={KEY} HTTP/1.1",
            f"GET HTTP://x/routes%3Fapi_key={quoted} HTTP/1.2",
            f"GET /?api_key={KEY} HTTP/{KEY}", KEY):
        api.raw(f"{line}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        api.raw((f"{line}\r\nHost: x\r\nConnection: close\r\nX-API-Key: {KEY}\r\n"
                 f"X-Forwarded-For: {KEY}\r\nReferer: {KEY}\r\n\r\n").encode())
    answers = api.raw((f"POST /scale/cores HTTP/1.0\r\nX-API-Key: {KEY}\r\n"
                       "Content-Type: application/json\r\n"
                       f"Content-Length: {len(KEY) + 8}\r\n\r\n"
                       f'{{"{KEY}":1}}  ').encode())
    api.get("/last")
    wait_until(lambda: " GET /last 404 " in api.log("access"))
    everything = answers.decode() + api.get("/metrics").body + api.said() + "".join(
        api.log(name) for name in ("main", "access", "error"))
    cmdline = Path(f"/proc/{api.process.pid}/cmdline").read_text()
    for part in (KEY, quoted, KEY[:12], KEY[-12:]):
        assert part not in everything and part not in cmdline


def test_without_a_key_the_log_names_the_address_alone(launch):
    api = launch(authentication={"enabled": False})
    api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    assert "POST /scale/cores vm_id=104 cores=4 by 127.0.0.1: done" in api.log()


def test_of_a_long_path_the_log_has_its_beginning():
    assert module.loggable_path("/" + "x" * 5000) == "/" + "x" * 99


def test_logs_say_who_did_what(api, host):
    api.post("/scale/cores", {"vm_id": 104, "cores": 4},
             headers={"X-Forwarded-For": "198.51.100.7"})
    main = api.log()
    assert re.search(r"Z INFO ran pct set 104 --cores 4: exit 0 in \d+\.\d{3} s\n", main)
    assert re.search(r"Z INFO change POST /scale/cores vm_id=104 cores=4 by 198\.51\.100\.7 "
                     rf"with key {FINGERPRINT}: done, after \d+\.\d s\n", main)
    assert (f"Z INFO lxc_autoscale_api {module.VERSION} listens on 127.0.0.1 port {api.port}\n"
            in main)
    assert re.search(r"Z 198\.51\.100\.7 POST /scale/cores 200 \d+ \d+\.\d ms\n",
                     wait_until(lambda: api.log("access")))
    api.stop()
    assert (api.log().splitlines()[-2].endswith("INFO stopping on SIGTERM")
            and api.log().splitlines()[-1].endswith("INFO stopped"))


def test_protected_containers_are_not_changed_and_allowed_ones_only(launch, host):
    api = launch(containers={"protected": [104], "allowed": [104, 106, 108]})
    for path, body in (
            ("/scale/cores", {"cores": 4}), ("/snapshot/create", {"snapshot_name": "s1"}),
            ("/clone/create", {"new_vm_id": 108, "new_vm_name": "x"})):
        assert api.post(path, {"vm_id": 104, **body}).body == refused(
            "VM 104 is protected: containers.protected in the daemon's configuration names it")
        assert api.post(path, {"vm_id": 107, **body}).body == refused(
            "VM 107 must not be changed: "
            "containers.allowed in the daemon's configuration does not name it")
    reply = api.post("/clone/create", {"vm_id": 106, "new_vm_id": 105, "new_vm_name": "x"})
    assert (reply.status, reply.body["error"][:27]) == (403, "VM 105 must not be changed:")
    assert api.delete("/clone/delete", {"vm_id": 104}).status == 403
    assert host.calls() == []
    assert api.post(
        "/clone/create", {"vm_id": 106, "new_vm_id": 108, "new_vm_name": "x"}).status == 200
    assert api.get("/resource/vm/config?vm_id=104").status == 200


def test_ceilings_are_kept_and_told(launch, host):
    api = launch(containers={"max_cores": 1, "max_memory_mb": 1024})
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 2})
    assert (reply.status, reply.body) == (400, refused(
        "Invalid cores: must be an integer between 1 and 1 "
        "(containers.max_cores in the daemon's configuration)"))
    assert api.post("/scale/ram", {"vm_id": 104, "memory": 1025}).status == 400
    assert api.post("/scale/ram", {"vm_id": 104, "memory": 1024}).status == 200
    limits = api.get("/resource/vm/config?vm_id=104").body["data"]["limits"]
    assert limits == {
        "cores": {"min": 1, "max": 1}, "memory_mb": {"min": 64, "max": 1024}, "disk_gb": {"min": 8}}


# TLS

HEALTH = framed("GET /health/check HTTP/1.1", "Host: x")


def client_context(daemon, **attributes):
    """A client's context that trusts the daemon; without attributes as Python makes it."""
    context = ssl.create_default_context(cafile=daemon.host.root / "tls.pem")
    for name, value in attributes.items():
        setattr(context, name, value)
    return context


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_1_2_and_1_3_are_spoken_and_nothing_older_nor_without_forward_secrecy(steady_tls):
    for version, name in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
        with client_context(
                steady_tls, minimum_version=version, maximum_version=version
        ).wrap_socket(steady_tls.connect_plainly(), server_hostname="127.0.0.1") as sock:
            assert sock.version() == name and sock.compression() is None
            sock.sendall(HEALTH)
            assert read_answer(sock).status == 200
    old = client_context(steady_tls, minimum_version=ssl.TLSVersion.TLSv1,
                         maximum_version=ssl.TLSVersion.TLSv1_1)
    old.set_ciphers("ALL:@SECLEVEL=0")
    weak = client_context(steady_tls, maximum_version=ssl.TLSVersion.TLSv1_2)
    weak.set_ciphers("ECDHE-ECDSA-AES128-SHA256:AES128-GCM-SHA256:DHE-RSA-AES128-GCM-SHA256")
    for context, alert in ((old, "PROTOCOL_VERSION"), (weak, "HANDSHAKE_FAILURE")):
        with steady_tls.connect_plainly() as sock, pytest.raises(ssl.SSLError, match=alert):
            context.wrap_socket(sock, server_hostname="127.0.0.1")


def test_renegotiation_and_compression_are_off(tmp_path):
    context, _ = module.load_tls(*tls_files(tmp_path).values())
    off = ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    assert context.options & off == off


def test_plain_http_on_a_tls_port_is_told_so(steady_tls):
    for data in (HEALTH, framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                                "Content-Length: 27", body='{"vm_id": 104, "cores": 4}\n'),
                 b"\x00", b"\r\n"):
        with steady_tls.connect_plainly() as sock:
            sock.sendall(data)
            told = refused if data.startswith(b"POST") else error
            assert statuses(read_all(sock)) == ([400], told(
                "This port speaks TLS: ask for https:// instead of http://"))
    with steady_tls.connect_plainly() as sock:
        sock.sendall(framed("HEAD /health/check HTTP/1.1", "Host: x"))
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") and body == b"", "there is none of a HEAD"


def test_what_is_no_tls_within_tls_ends_its_connection_and_nothing_else(steady_tls):
    hello = b"\x16\x03\x01\x00\x05hello"
    for before, data in (
            (False, hello), (False, b"\x16"), (False, b"\x16\x03\x01\xff\xff" + b"x" * 70000),
            (True, b"\x17\x03\x03\x00\x20" + b"x" * 32), (True, HEALTH), (True, hello)):
        plain = steady_tls.connect_plainly()
        with socket.socket(fileno=os.dup(plain.fileno())) as raw:
            raw.settimeout(10)
            sock = (steady_tls.tls.wrap_socket(plain, server_hostname="127.0.0.1") if before
                    else plain)
            with contextlib.suppress(OSError):      # the daemon may have closed it already
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
            assert b"HTTP/1.1" not in read_all(raw)
            sock.close()
    assert (steady_tls.get("/routes").status == 200
            and "Traceback" not in steady_tls.log("error") + steady_tls.said())


def test_a_connection_ends_as_tls_wants_it_so_that_nobody_takes_it_for_cut_off(steady_tls):
    for data in (framed("GET /routes HTTP/1.1", "Host: x", LOGIN, "Connection: close"),
                 b"x\r\n\r\n"):
        with steady_tls.tls.wrap_socket(
                steady_tls.connect_plainly(), server_hostname="127.0.0.1",
                suppress_ragged_eofs=False) as sock:
            sock.sendall(data)
            assert read_all(sock).startswith(b"HTTP/1.1 ")


def test_a_handshake_is_part_of_the_first_request_s_time(launch):
    api = launch(tls=True, constants={"REQUEST_SECONDS": 2})
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = api.tls.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with api.connect_plainly(5) as sock:
        started = time.monotonic()
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        for byte in outgoing.read():                # for a second
            sock.sendall(bytes([byte]))
            time.sleep(0.002 if time.monotonic() - started < 1 else 0)
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
            incoming.write(sock.recv(65536))
        tls.write(b"GET /routes")
        sock.sendall(outgoing.read())
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                answer = tls.read(65536)
                break
            incoming.write(sock.recv(65536))
        assert statuses(answer) == ([408], error("The request did not arrive within 2 s"))
        assert 1.8 < time.monotonic() - started < 2.8
    with api.connect_plainly(0.02) as sock:         # bytes of a handshake without end
        started, received = time.monotonic(), None
        while received is None and time.monotonic() - started < 5:
            with contextlib.suppress(ConnectionError):
                sock.sendall(b"\x16\x03\x01\x40\x00" if time.monotonic() - started < 0.02
                             else b"\x00")
            with contextlib.suppress(socket.timeout, ConnectionError):
                received = sock.recv(1000)
        assert not received and 1.8 < time.monotonic() - started < 2.8


def test_what_the_network_takes_in_pieces_arrives_whole(tmp_path):
    """A send may take a part only; no byte of a record may be lost or sent twice."""
    context, _ = module.load_tls(*tls_files(tmp_path).values())
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sock = module.SimpleNamespace(recv=to_server.read, sendall=to_client.write,
                                  send=lambda data, *_: to_client.write(data[:7000]))
    server, client = (module.Tls(sock, context),
                      module.unverified().wrap_bio(to_client, to_server))
    for _ in range(2):
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        if to_server.pending:
            server.recv(65536)
    data, sent, received = random.Random(1).randbytes(300000), 0, b""
    while sent < len(data):
        sent += server.send(memoryview(data)[sent:])
    with contextlib.suppress(ssl.SSLWantReadError):
        while True:
            received += client.read(65536)
    assert received == data


def test_500_handshakes_that_never_end_delay_nobody_and_are_gone_in_time(launch):
    api = launch(tls=True, server={"max_connections": 600}, constants={
        "REQUEST_SECONDS": 1.3, "LINGER_SECONDS": 0.3, "WORKER_SECONDS": 0.2})
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        api.tls.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1").do_handshake()
    hello = outgoing.read()
    slow, begun, times = [], time.monotonic(), []
    for number in range(500):
        slow.append(api.connect_plainly())
        # and the last waits for its answer
        slow[-1].sendall((b"", hello[:1], hello[:-1], hello)[number % 4])
    while time.monotonic() - begun < 1.2:
        for sock in slow[1::4]:
            with contextlib.suppress(OSError):
                sock.send(hello[1:2])
        started = time.monotonic()
        assert api.get("/health/check").status == 200
        times.append(time.monotonic() - started)
    assert sorted(times)[len(times) // 2] < 0.1
    wait_until(lambda: threads(api) < 5 and descriptors(api) < 20, 5)
    for sock in slow:
        sock.close()


def api_metrics(sock):
    """The metrics, asked for over a connection that is there already."""
    sock.sendall(framed("GET /metrics HTTP/1.1", "Host: x"))
    return read_answer(sock).body


def test_one_connection_too_many_is_closed_before_tls_begins(launch):
    api = launch(tls=True, server={"max_connections": 2}, constants={
        "YIELD_SECONDS": 60, "WORKER_SECONDS": 0.1})

    def let_in():
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            return api.connect()
    held = [wait_until(let_in) for _ in range(2)]
    refused = int(re.search(r"connections_refused_total (\d+)", api_metrics(held[0]))[1])
    with api.connect_plainly() as sock:
        assert sock.recv(10) == b""
    wait_until(lambda: threads(api) <= 2)
    assert f"lxc_autoscale_api_connections_refused_total {refused + 1}\n" in api_metrics(held[0])
    held.pop().close()


def certificate_of(api):
    """The certificate that a new connection is shown."""
    with module.unverified().wrap_socket(api.connect_plainly()) as sock:
        return ssl.DER_cert_to_PEM_cert(sock.getpeercert(binary_form=True)).replace("\n", "")


def test_a_reload_takes_a_renewed_certificate_and_closes_nothing(launch, host):
    api = launch(tls=True)
    with api.connect() as sock:
        for certificate, taken in ((RENEWED, RENEWED), ("nonsense", RENEWED), (EXPIRED, EXPIRED)):
            tls_files(host.root, certificate)
            api.process.send_signal(signal.SIGHUP)
            if taken is certificate:
                wait_until(lambda: certificate_of(api) == taken.replace("\n", ""))
            else:
                said = (f"not reloaded, the old settings stay: {host.root}/api.yaml:4: "
                        f"server.tls_certificate {host.root}/tls.pem "
                        "must hold a certificate in PEM")
                wait_until(lambda: said in api.log("error") and said in api.said())
                assert certificate_of(api) == taken.replace("\n", "")
            sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
            assert read_answer(sock).status == 200
    wait_until(lambda: (
        f"WARNING server.tls_certificate {host.root}/tls.pem has expired "
        "(20210101000000, in UTC); clients will refuse it\n") in api.log("error"))
    assert "may need a restart" not in api.log()


def test_a_certificate_that_hangs_is_read_by_one_thread_only(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FILE_SECONDS", 0.05)
    names, files = tls_files(tmp_path), module.Files(module.Workers())
    config = module.load_settings(
        GOOD_KEY + "server:\n  tls_certificate: {}\n  tls_key: {}\n".format(*names.values()))
    os.remove(names["tls_certificate"])
    os.mkfifo(names["tls_certificate"])
    for _ in range(3):
        with pytest.raises(module.ConfigError) as caught:
            module.read_tls(config, files)
        assert (caught.value.code, caught.value.text, len(files.hung)) == (
            1, f"server.tls_certificate: {HANGING}", 1)
    os.close(os.open(names["tls_certificate"], os.O_WRONLY))
    wait_until(lambda: not files.hung)


def test_a_certificate_that_hangs_at_a_reload_delays_nobody_and_no_key(launch, host):
    api, new = launch(tls=True, constants={"FILE_SECONDS": 0.3}), "another-key-0123456789"
    (host.root / "tls.pem").unlink()
    os.mkfifo(host.root / "tls.pem")
    config = host.root / "api.yaml"
    config.write_text(config.read_text().replace(KEY, new))
    api.process.send_signal(signal.SIGHUP)
    started = time.monotonic()
    assert api.get("/routes").status == 200 and time.monotonic() - started < 0.25
    wait_until(lambda: " INFO reloaded " in api.log())
    assert f"WARNING not read anew: server.tls_certificate: {HANGING}\n" in api.log("error")
    assert (api.get("/routes").status, api.get("/routes", key=new).status) == (401, 200)
    config.write_text(config.read_text().replace("tls.pem", "./tls.pem"))       # now another one
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: (f"not reloaded, the old settings stay: {host.root}/api.yaml:4: "
                        f"server.tls_certificate: {HANGING}") in api.log("error"))
    assert api.get("/routes", key=new).status == 200
    assert api.stop() == 0


def test_while_etc_pve_is_gone_a_reload_takes_over_keys_and_leaves_its_certificate(launch, host):
    (host.pve / "local").mkdir()
    api, new = launch(server=tls_files(host.pve / "local")), "another-key-0123456789"
    api.tls = ssl.create_default_context(cafile=host.pve / "local/tls.pem")
    host.pve.rename(host.root / "elsewhere")
    host.pve.mkdir()
    config = host.root / "api.yaml"
    config.write_text(config.read_text().replace(KEY, new))
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: " INFO reloaded " in api.log())
    assert (f"WARNING not read anew: server.tls_certificate {host.pve}/local/tls.pem cannot be "
            "read: No such file or directory\n") in api.log("error")
    assert (api.get("/routes").status, api.get("/routes", key=new).status) == (401, 200)


def test_while_etc_pve_hangs_a_reload_takes_over_keys(launch, host):
    new, files = "another-key-0123456789", range(200, 200 + module.MAX_HUNG)
    api = launch(constants={"FILE_SECONDS": 0.5})
    for vm_id in files:
        os.mkfifo(host.path(vm_id))
    replies = side_by_side(*[(api.get, f"/resource/vm/config?vm_id={each}") for each in files])
    assert {reply.status for reply in replies} == {503}
    config = host.root / "api.yaml"
    config.write_text(config.read_text().replace(KEY, new))
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: " INFO reloaded " in api.log())
    assert (api.get("/routes").status, api.get("/routes", key=new).status) == (401, 200)


@pytest.mark.parametrize("pem, end", [
    (CERTIFICATE, "21261101031243"), (EXPIRED, "20210101000000"),
    ("text before\n" + EXPIRED + CERTIFICATE, "20210101000000"), ("", None),
    ("# -----BEGIN CERTIFICATE----- für pve1\n" + CERTIFICATE, "21261101031243"),
    ("".join(f"# {line}\n" for line in EXPIRED.splitlines()) + CERTIFICATE, "21261101031243"),
    (CERTIFICATE.replace("\n", " \r\n"), "21261101031243"),
    ("-----BEGIN CERTIFICATE-----\nfür pve1\n-----END CERTIFICATE-----\n" + CERTIFICATE, None)])
def test_the_end_of_a_certificate_is_read_from_it(pem, end):
    assert module.end_of_certificate(pem) == end


# HTTP/1.1

@pytest.mark.parametrize("method, path, header, code", [
    ("POST", "/scale/cores", "Transfer-Encoding: chunked", 411),
    ("DELETE", "/clone/delete", "Host: y", 400), ("POST", "/scale/ram", "Expect: foo", 417),
    ("GET", "/routes", "X: " + "x" * 40000, 431), ("GET", "/x?api_key=secret", "no colon", 400)])
def test_a_refused_request_whose_line_was_understood_is_logged_and_counted_by_it(
        api, method, path, header, code):
    answer = api.raw(framed(f"{method} {path} HTTP/1.1", "Host: x", header))
    assert statuses(answer)[0] == [code]
    path = path.partition("?")[0]
    wait_until(lambda: re.search(
        rf"^\S+Z 127\.0\.0\.1 {method} {path} {code} \d+ 0\.0 ms$", api.log("access"), re.M))
    endpoint = path if path in module.PATHS else "unknown"
    assert (f'lxc_autoscale_api_requests_total{{method="{method}",endpoint="{endpoint}",'
            f'status="{code}"}} 1\n') in api.get("/metrics").body


@pytest.mark.parametrize("request_line, header", [
    ("HEAD /routes HTTP/1.1", "no colon"), ("HEAD /é HTTP/1.1", "Host: x"),
    ("HEAD /routes HTTP/2.0", "Host: x")])
def test_the_answer_to_a_head_that_cannot_be_read_has_no_body(api, request_line, header):
    head, _, body = api.raw(framed(request_line, header)).partition(b"\r\n\r\n")
    code = 505 if "2.0" in request_line else 400
    path = "/routes" if "1.1" in request_line and "/routes" in request_line else "-"
    assert (int(head.split()[1]), body) == (code, b"")
    assert int(re.search(rb"\r\nContent-Length: (\d+)", head)[1]) > 50
    wait_until(lambda: f" HEAD {path} {code} 0 0.0 ms\n" in api.log("access"))


def test_where_a_body_s_end_is_not_known_nothing_after_it_is_read(launch):
    api = launch(constants={"REQUEST_SECONDS": 0.3})
    head = ("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND)
    for received, answer in (
            (api.raw(framed(*head) + HEALTH), (411, refused(
                "Missing Content-Length: send the parameters as a JSON object, "
                "with Content-Type: application/json"))),
            (api.raw(framed(*head, "Content-Length: 9", body="{")), (408, refused(
                "The request did not arrive within 0.3 s")))):
        assert statuses(received) == ([answer[0]], answer[1])
        assert b"\r\nConnection: close\r\n" in received


BAD_FRAMES = [
    (b"\x00\x01\x02\r\n\r\n", 400), (b"GET\r\n\r\n", 400), (b"GET /\r\n", 400),
    (b"GET / \r\n\r\n", 400), (b"GET  / HTTP/1.1\r\n\r\n", 400),
    (b" GET / HTTP/1.1\r\n\r\n", 400), (b"GET / HTTP/1.1 \r\n\r\n", 400),
    (b"GET / http/1.1\r\n\r\n", 400), (b"G@T / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505), (b"GET / HTTP/0.9\r\n\r\n", 505),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505), (b"GET / HTTP/1.10\r\n\r\n", 505),
    (framed("GET ftp://x/routes HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http:/routes HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http:///routes HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http://u:p@x/routes HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http://x#y HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http://x:y/ HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http://[::1/ HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http://x\\y/ HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET x/routes HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET ?x HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("GET http://x/routes HTTP/1.1", LOGIN), 400),
    (framed("GET http://x/routes HTTP/1.1", "Host: x", "Host: x", LOGIN), 400),
    (framed("GET http://x/routes HTTP/1.1", "Host: a/b", LOGIN), 400),
    (framed("GET http://x/routes HTTP/2.0", "Host: x"), 505),
    (framed("GET /routes HTTP/1.2", LOGIN), 400),
    (framed("GET /routes HTTP/01.1", "Host: x"), 505),
    (b"\r\n" * 4097 + framed("GET /routes HTTP/1.1", "Host: x", LOGIN), 400),
    (b"\n" + framed("GET /routes HTTP/1.1", "Host: x", LOGIN), 400),
    (b"\r\r\n" + framed("GET /routes HTTP/1.1", "Host: x", LOGIN), 400),
    (b"\r\n " + framed("GET /routes HTTP/1.1", "Host: x", LOGIN), 400),
    (framed("CONNECT x:80 HTTP/1.1", "Host: x"), 400),
    (framed("OPTIONS * HTTP/1.1", "Host: x"), 400),
    (framed("GET /a\x80b HTTP/1.1", "Host: x"), 400),
    (framed("GET /a\x00b HTTP/1.1", "Host: x"), 400),
    (framed("GET /caf\xc3\xa9 HTTP/1.1", "Host: x"), 400),
    (framed("GET /routes HTTP/1.1", LOGIN), 400),
    (framed("GET /routes HTTP/1.1", "Host: a", "Host: b", LOGIN), 400),
    (framed("GET /routes HTTP/1.1", "Host: a/b", LOGIN), 400),
    (framed("GET / HTTP/1.1", "Host: x", "Bad Name: y"), 400),
    (framed("GET / HTTP/1.1", "Host: x", "Name : y"), 400),
    (framed("GET / HTTP/1.1", "Host: x", ": y"), 400),
    (framed("GET / HTTP/1.1", "Host: x", "A: b", " folded"), 400),
    (framed("GET / HTTP/1.1", "Host: x", "no colon"), 400),
    (framed("GET / HTTP/1.1", "Host: x", "A: b\rc"), 400),
    (framed("GET / HTTP/1.1", "Host: x", "A: b\nc: d"), 400),
    (framed("GET / HTTP/1.1", "Host: x", "A: b\x00c"), 400), (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 400), (b"GET / HTTP/1.1\rHost: x\r\r", 400),
] + [
    (framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND, *lengths, body="{}"), status)
    for lengths, status in (
        (("Content-Length: 2", "Content-Length: 3"), 400),
        (("Content-Length: 2", "Content-Length: 2"), 400),
        (("Content-Length: 2, 2",), 400), (("Content-Length: -2",), 400),
        (("Content-Length: +2",), 400), (("Content-Length: 2 2",), 400),
        (("Content-Length: 0x2",), 400), (("Content-Length: \xb2",), 400),
        (("Content-Length:",), 400),
        (("Content-Length: " + "0" * 500 + "2",), 400), (("Content-Length: 2.0",), 400),
        (("Transfer-Encoding: chunked",), 411), (("Transfer-Encoding: identity",), 411),
        (("Transfer-Encoding: chunked", "Content-Length: 2"), 411),
        (("Transfer-Encoding: \x0bchunked",), 400), (("transfer-encoding: xchunked",), 411),
        (("Content-Length: 2", "Expect: more"), 417), ((), 411), (("Content-Length: 65537",), 413),
        (("Content-Length: 999999999999",), 413))
] + [
    (framed("GET /" + "x" * 9000 + " HTTP/1.1", "Host: x"), 414),
    (framed("GET /routes?" + "a=1&" * 10000 + " HTTP/1.1", "Host: x", LOGIN), 414),
    (framed("GET / HTTP/1.1", "Host: x", "A: " + "x" * 40000), 431),
    (framed("GET / HTTP/1.1", "Host: x", *(f"A{n}: x" for n in range(5000))), 431),
    (b"x" * 100000, 414),
]


@pytest.mark.parametrize("data, status", BAD_FRAMES, ids=range(len(BAD_FRAMES)))
def test_a_badly_framed_request_is_refused_in_json_and_ends_the_connection(either, data, status):
    smuggled = framed("GET /metrics HTTP/1.1", "Host: x")
    codes, body = statuses(either.raw(data + smuggled))
    assert codes == [status]
    assert body["status"] == "error" and re.fullmatch(r"[A-Z][\x20-\x7e]+", body["error"])


@pytest.mark.parametrize("line, status", [
    (b"POST /scale/cores HTTP/2.0", 505), (b"POST /scale/c\xc3\xb6res HTTP/1.1", 400),
    (b"DELETE /" + b"x" * 9000 + b" HTTP/1.1", 414), (b"POST /scale/cores", 400)])
def test_a_change_whose_request_line_cannot_be_read_has_an_outcome(either, line, status):
    codes, body = statuses(either.raw(line + b"\r\nHost: x\r\n\r\n"))
    assert (codes, body) == ([status], refused(body["error"]))
    codes, body = statuses(either.raw(b"GET" + line[line.index(b" "):] + b"\r\nHost: x\r\n\r\n"))
    assert (codes, body) == ([status], error(body["error"]))


@pytest.mark.parametrize("line, headers, status", [
    ("POST /scale/cores HTTP/1.1", [], 401), ("POST /nowhere HTTP/1.1", [LOGIN], 404),
    ("POST /routes HTTP/1.1", [LOGIN], 405),
    ("POST /scale/cores HTTP/1.1", [LOGIN, "Content-Type: text/plain"], 415),
    ("GET /routes HTTP/1.1", [LOGIN], 200),
])
def test_a_body_that_nobody_reads_is_never_the_next_request(either, line, headers, status):
    body = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    data = framed(line, "Host: x", f"Content-Length: {len(body)}", *headers, body=body) \
        + framed("GET /health/check HTTP/1.1", "Host: x", "Connection: close")
    assert statuses(either.raw(data))[0] == [status, 200]
    big = "G" * 70000
    data = framed(line, "Host: x", f"Content-Length: {len(big)}", *headers, body=big) \
        + framed("GET /health/check HTTP/1.1", "Host: x", "Connection: close")
    assert statuses(either.raw(data))[0] == [413 if status == 415 else status]


@OVER_BOTH
def test_an_over_limit_body_is_no_request_either(launch, tls):
    api = limited(launch, tls=tls, max_requests_per_minute=1)
    via = "X-Forwarded-For: 198.51.100.7"
    body = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    data = framed("GET /health/check HTTP/1.1", "Host: x", via) \
        + framed("POST /scale/cores HTTP/1.1", "Host: x", via,
                 f"Content-Length: {len(body)}", body=body) \
        + framed("GET /metrics HTTP/1.1", "Host: x", "Connection: close")
    assert statuses(api.raw(data))[0] == [200, 429, 200]


@pytest.mark.parametrize("target, status", [
    ("http://x/routes", 200), ("https://pve.example.org:5000/routes?", 200),
    ("HTTP://[2001:db8::1]:/routes", 200),
    ("http://192.0.2.1:80/resource/vm/config?vm_id=104", 200),
    ("http://x", 404), ("http://x?vm_id=104", 404), ("http://x/http://x/routes", 404),
    ("/http://x/routes", 404), ("//x/routes", 404),
])
def test_a_target_may_be_a_whole_url_whatever_host_it_names(either, target, status):
    codes, body = statuses(either.raw(
        framed(f"GET {target} HTTP/1.1", "Host: other:81", LOGIN, "Connection: close")))
    assert codes == [status] and body == (
        error("Unknown path; GET /routes lists the endpoints") if status == 404 else body)


@pytest.mark.parametrize("lines, says", [
    ([], "Missing Host: HTTP/1.1 needs one"),
    (["Host: a", "host: a"], "Bad Host: there are 2, and one is needed"),
    *[([f"Host: {value}"], "Bad Host: expected a name or an address, and perhaps a port, "
                           "such as pve.example.org:5000 or [2001:db8::1]:5000")
      for value in ("a/b", "a b", "a, b", "u@a", "a:b", "a:1:2", "[::1", "::1", "http://a",
                    "a\xe9", ":5000")],
])
def test_a_missing_host_two_and_a_bad_one_are_told_apart(either, lines, says):
    assert statuses(either.raw(framed("GET /routes HTTP/1.1", *lines, LOGIN))) == (
        [400], error(says))
    for value in ("", "x", "x:", "pve-1.example.org:5000", "a_b", "192.0.2.1:80", "[2001:db8::1]",
                  "[fe80::1%25eth0]:5000", "a%20b:5000"):
        assert statuses(either.raw(framed(
            "GET /routes HTTP/1.1", f"Host: {value}", LOGIN, "Connection: close")))[0] == [200]
    assert statuses(either.raw(framed("GET /routes HTTP/1.0", LOGIN)))[0] == [200]


def test_what_is_as_long_as_it_may_be_is_taken(steady):
    more = ["Host: x", LOGIN, "Connection: close"]
    path = "x" * (module.MAX_LINE - len("GET / HTTP/1.1"))
    assert statuses(steady.raw(framed(f"GET /{path} HTTP/1.1", *more)))[0] == [404]
    assert statuses(steady.raw(framed(f"GET /{path}x HTTP/1.1", *more)))[0] == [414]
    value = "x" * (module.MAX_HEAD - len(framed("GET /nowhere HTTP/1.1", *more, "A: ")) + 4)
    assert statuses(steady.raw(framed("GET /nowhere HTTP/1.1", *more, f"A: {value}")))[0] == [404]
    assert statuses(steady.raw(framed("GET /nowhere HTTP/1.1", *more, f"A: {value}x")))[0] == [431]
    for size, says in (
            (module.MAX_BODY, "Invalid cores: must be an integer between 1 and 128"),
            (module.MAX_BODY + 1, "The body is too large: at most 65536 bytes are taken")):
        assert steady.post("/scale/cores", '{"vm_id": 104, "cores": 0}'.ljust(size), headers={
            "Content-Type": "application/json"}).body == refused(says)


def test_a_tab_may_stand_in_a_header_s_value(steady):
    """RFC 9110 section 5.5."""
    assert statuses(steady.raw(framed(
        "GET /routes HTTP/1.1", "Host: x", LOGIN, "A: b\tc", "Connection: close")))[0] == [200]


@pytest.mark.parametrize("version", ["1.2", "1.9"])
def test_a_later_http_1_is_answered_as_http_1_1(either, version):
    with either.connect(5) as sock:
        for _ in range(2):              # the connection is kept, as in HTTP/1.1
            sock.sendall(framed(f"GET /routes HTTP/{version}", "Host: x", LOGIN))
            reply = http.client.HTTPResponse(sock)
            reply.begin()
            assert (reply.status, reply.version, reply.headers.get("Connection")) == (
                200, 11, None) and reply.read()


def test_empty_lines_before_a_request_are_dropped(either):
    first, last = (
        framed("GET /routes HTTP/1.1", "Host: x", LOGIN),
        framed("GET /nowhere HTTP/1.1", "Host: x", LOGIN, "Connection: close"))
    body = '{"vm_id": 104, "cores": 0}'
    post = framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                  f"Content-Length: {len(body)}", body=body)
    assert statuses(either.raw(b"\r\n" + first + b"\r\n\r\n" + post + b"\r\n" + last))[0] == [
        200, 400, 404]
    assert statuses(either.raw(b"\r\n" * 4096 + last))[0] == [404]
    with either.connect(5) as sock:
        for part in (b"\r", b"\n", b"\r\n\r", b"\n" + post, b"\r", b"\n" + last[:1], last[1:]):
            sock.sendall(part)
            time.sleep(0.02)
        assert statuses(read_all(sock))[0] == [400, 404]


@OVER_BOTH
def test_empty_lines_alone_are_no_request_that_is_late(launch, tls):
    api = launch(tls=tls, constants={"REQUEST_SECONDS": 0.4, "IDLE_SECONDS": 0.6})

    def closed_after(before):
        with api.connect(5) as sock:
            sock.sendall(before)
            assert not before or read_answer(sock).status == 200
            started, received = time.monotonic(), None
            sock.settimeout(0.05)
            while received is None and time.monotonic() - started < 3:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(b"\r\n")
                with contextlib.suppress(socket.timeout, ConnectionError):
                    received = sock.recv(1000)
            assert not received and 0.3 < time.monotonic() - started < 2
    side_by_side((closed_after, b""),
                 (closed_after, framed("GET /routes HTTP/1.1", "Host: x", LOGIN)))


def test_pipelined_requests_are_answered_in_order(either):
    paths = ["/routes", "/nowhere", "/health/check", "/metrics",
             "/resource/vm/config?vm_id=104"] * 5
    data = b"".join(framed(f"GET {path} HTTP/1.1", "Host: x", LOGIN) for path in paths) \
        + framed("GET /nowhere HTTP/1.1", "Host: x", "Connection: close", LOGIN)
    assert statuses(either.raw(data))[0] == [200, 404, 200, 200, 200] * 5 + [404]


def test_the_connection_is_kept_as_the_version_and_the_client_say(either):
    for version, headers, kept in (
            ("1.1", [], True), ("1.1", ["Connection: close"], False), ("1.0", [], False),
            ("1.0", ["Connection: keep-alive"], True), ("1.1", ["Connection: TE, Close"], False)):
        with either.connect(5) as sock:
            sock.sendall(framed(f"GET /health/check HTTP/{version}", "Host: x", *headers))
            reply = read_answer(sock)
            said = "close" if not kept else "keep-alive" if version == "1.0" else None
            assert (reply.status, reply.headers.get("Connection")) == (200, said)
            if kept:
                sock.sendall(framed("GET /health/check HTTP/1.1", "Host: x"))
                assert read_answer(sock).status == 200
            else:
                assert sock.recv(1) == b""


def test_a_body_is_asked_for_only_if_it_will_be_read(either):
    expect = ["Host: x", "Expect: 100-continue", "Content-Length: 27", JSON_KIND]
    with either.connect(5) as sock:
        sock.sendall(framed("POST /scale/cores HTTP/1.1", *expect, LOGIN))
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b'{"vm_id": 104, "cores": 0}\n')
        assert read_answer(sock).body["error"].startswith("Invalid cores")
    for line, headers, status in (
            ("POST /scale/cores HTTP/1.1", [], 401), ("POST /nowhere HTTP/1.1", [LOGIN], 404),
            ("GET /scale/cores HTTP/1.1", [LOGIN], 405)):
        said = either.raw(framed(line, *expect, *headers))
        assert statuses(said)[0] == [status] and b"\r\nConnection: close\r\n" in said


def test_nothing_is_asked_for_in_http_1_0_nor_where_there_is_no_body(steady):
    """RFC 9110 section 10.1.1: in HTTP/1.0 the expectation is ignored."""
    body = '{"vm_id": 104, "cores": 0}'
    assert statuses(steady.raw(framed(
        "POST /scale/cores HTTP/1.0", LOGIN, JSON_KIND, "Expect: 100-continue",
        f"Content-Length: {len(body)}", body=body)))[0] == [400]
    assert statuses(steady.raw(
        framed("GET /routes HTTP/1.1", "Host: x", LOGIN, "Expect: 100-continue")
        + framed("GET /nowhere HTTP/1.1", "Host: x", LOGIN, "Connection: close")))[0] == [200, 404]


def test_every_answer_has_the_headers_it_should(either):
    reply = either.get("/routes")
    moment = time.mktime(time.strptime(
        reply.headers["Date"], "%a, %d %b %Y %H:%M:%S GMT")) - time.timezone
    assert abs(moment - time.time()) < 5
    assert reply.headers["Server"] == f"lxc_autoscale_api/{module.VERSION}"
    assert (reply.headers["Cache-Control"], reply.headers["X-Content-Type-Options"]) == (
        "no-store", "nosniff")
    assert (either.get("/metrics").headers["Content-Type"]
            == "text/plain; version=0.0.4; charset=utf-8")


def cpu_seconds(daemon):
    """The processor time of a daemon and its ended threads: its clock as clock_getcpuclockid(3)
    numbers it."""
    return time.clock_gettime((~daemon.process.pid << 3) | 2)


def test_heads_that_end_in_a_forbidden_byte_delay_nobody(either):
    head = framed("GET /metrics HTTP/1.1", "Host: x", "A:" + " " * 32600 + "\x01")
    with contextlib.ExitStack() as stack:
        hostile = [stack.enter_context(either.connect()) for _ in range(12)]
        started, before = time.monotonic(), cpu_seconds(either)
        for sock in hostile:
            sock.sendall(head)
        assert either.get("/routes").status == 200
        assert time.monotonic() - started < 1
        said = {statuses(read_all(sock))[1]["error"] for sock in hostile}
        spent = cpu_seconds(either) - before
    assert said == {"Bad header: expected 'Name: value' on a line of its own"}
    # by twelve of them and an honest request; each would cost seconds in the square
    assert spent < 0.2


def test_a_head_that_comes_byte_by_byte_costs_the_same_for_each_however_long_it_is(either):
    head = framed("GET /routes HTTP/1.1", "Host: x", LOGIN, "Connection: close",
                  "A: " + "x" * 16384, "B: " + "y" * 2000)
    with either.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        sock.sendall(head[:-2000])
        time.sleep(0.05)
        before = cpu_seconds(either)
        for byte in head[-2000:-4]:
            sock.sendall(bytes([byte]))
            time.sleep(0.0002)          # or the kernel would hand over several at once
        spent = cpu_seconds(either) - before
        sock.sendall(head[-4:])
        assert read_answer(sock).status == 200
    assert spent < 0.25


@OVER_BOTH
def test_a_line_end_may_be_torn_apart_and_a_bare_one_is_refused_at_once(launch, tls):
    api = launch(tls=tls, constants={"REQUEST_SECONDS": 30})
    whole = framed("GET /routes HTTP/1.1", "Host: x", LOGIN, "A: b", "Connection: close")
    for places in (range(1, len(whole)), range(2, len(whole), 3)):
        with api.connect(5) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            for begin, end in zip([0, *places], [*places, len(whole)]):
                sock.sendall(whole[begin:end])
                time.sleep(0.0005)
            assert read_answer(sock).status == 200
    for bare in (b"GET / HTTP/1.1\r\nHost: x\r\nA: b\n", b"GET / HTTP/1.1\r\nHost: x\r\nA: b\rc",
                 b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\n\n"):
        with api.connect(5) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            for byte in bare:
                sock.sendall(bytes([byte]))
                time.sleep(0.0005)
            assert statuses(read_all(sock)) == ([400], error(
                "Bad line ending: a line ends in CR LF, and neither stands alone"))


def test_the_shipped_deadlines_are_those_of_the_documentation():
    assert (module.REQUEST_SECONDS, module.IDLE_SECONDS, module.LOCK_SECONDS, module.SLOT_SECONDS,
            module.PROBE_SECONDS, module.STOP_SECONDS) == (10, 30, 60, 30, 10, 30)
    assert (module.FILE_SECONDS, module.KILL_SECONDS, module.REACH_SECONDS,
            module.YIELD_SECONDS) == (5, 1, 4, 1)


@OVER_BOTH
def test_a_request_that_trickles_is_cut_off_at_its_deadline(launch, tls):
    api = launch(tls=tls, constants={"REQUEST_SECONDS": 0.4, "IDLE_SECONDS": 0.6})
    begun = framed("GET /routes HTTP/1.1", "Host: x", LOGIN)
    body = framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND, "Content-Length: 500",
                  body="{" * 400)

    def trickled(data, late):
        started = time.monotonic()
        with api.connect(5) as sock:
            sock.settimeout(0.05)
            received = b""
            sock.sendall(data[:-300] if len(data) > 300 else b"")
            for byte in data[-300:]:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(bytes([byte]))
                with contextlib.suppress(socket.timeout, ConnectionError):
                    received += sock.recv(1000)
                if received:
                    break
        assert statuses(received) == ([408], late("The request did not arrive within 0.4 s"))
        assert 0.3 < time.monotonic() - started < 2.5

    def silent():                                   # no byte at all: closed without a word
        with api.connect(5) as sock:
            started = time.monotonic()
            assert sock.recv(10) == b"" and 0.3 < time.monotonic() - started < 2

    def idle():                                     # between two requests
        with api.connect(5) as sock:
            sock.sendall(begun)
            assert read_answer(sock).status == 200
            started = time.monotonic()
            assert sock.recv(10) == b"" and 0.5 < time.monotonic() - started < 3
    side_by_side((trickled, begun, error), (trickled, body, refused), (silent,), (idle,))


@pytest.mark.parametrize("key, status", [(KEY, 404), ("wrong", 401)])
def test_a_body_that_comes_after_its_refusal_does_not_reset_the_connection(launch, key, status):
    with launch(constants={"LINGER_SECONDS": 10}).connect() as sock:
        sock.sendall(framed("POST /nothing HTTP/1.1", "Host: x", f"X-API-Key: {key}",
                            JSON_KIND, "Content-Length: 9", "Connection: close"))
        answer = read_all(sock)
        assert statuses(answer)[0] == [status]
        for part in (b'{"a"', b': 1}\n'):
            sock.sendall(part)
            assert sock.recv(1) == b""              # closed, and neither reset nor lost


@contextlib.contextmanager
def listening(handle, serving=True):
    """-> a Server whose connections handle(sock, address, server) handles, and a function that
    connects to it."""
    config = module.load_settings(
        GOOD_KEY + f'server:\n  host: "127.0.0.1"\n  port: {free_port()}\n')
    workers = module.Workers()
    api = module.SimpleNamespace(metrics=module.Metrics(), workers=workers,
                                 changes=module.Changes(None, workers, None))
    with contextlib.ExitStack() as stack:
        server = module.Server(config, api, handle)
        stack.callback(wait_until, lambda: not server.accepting.locked())
        thread = threading.Thread(target=server.serve_forever)
        if serving:
            thread.start()
            stack.callback(thread.join, 10)
        stack.callback(lambda: server.stopping.is_set() or server.stop_listening())
        yield server, lambda: stack.enter_context(
            socket.create_connection(server.server_address, 10))


def test_each_connection_comes_to_a_thread_that_waits_for_it(monkeypatch):
    """Each has what the listening socket had: no delay in sending, and bounds to its waiting.
    While others are held up, a thread waits for the next; no more than one does."""
    handled, threads, released = [], [], threading.Event()
    monkeypatch.setattr(module, "WORKER_SECONDS", 0.2)

    def handle(sock, address, server):
        handled.append((
            sock.getpeername() == address, server.clients[sock].address, sock.gettimeout(),
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)))
        threads.append(threading.current_thread())
        sock.sendall(b"%d" % len(handled))
        assert released.wait(10)
    with listening(handle) as (server, connect):
        socks = [connect() for _ in range(3)]
        assert sorted(sock.recv(1) for sock in socks) == [b"1", b"2", b"3"]
        bound = module.timeval(module.REQUEST_SECONDS)
        assert handled == [(True, "127.0.0.1", None, 1, bound, bound)] * 3
        assert len(set(threads)) == 3
        monkeypatch.setattr(server, "make_room", lambda address: False)
        server.max_connections = 3
        assert [read_all(connect()) for _ in range(2)] == [module.TOO_MANY] * 2
        released.set()
        assert [read_all(sock) for sock in socks] == [b""] * 3
        wait_until(lambda: sum(map(threading.Thread.is_alive, threads)) <= 1)
        wait_until(server.accepting.locked)
        assert len(handled) == 3 and server.clients == {}


def test_a_connection_that_holds_its_thread_up_costs_another_one_or_two(monkeypatch):
    released, started, start = threading.Event(), [], threading.Thread.start

    def handle(sock, address, server):
        sock.sendall(b"1")
        assert released.wait(10)
    monkeypatch.setattr(module.threading.Thread, "start", lambda thread: (
        started.append(thread), start(thread)))
    with listening(handle) as (server, connect):
        for _ in range(12):
            wait_until(server.accepting.locked)
            assert connect().recv(1) == b"1"
        wait_until(server.accepting.locked)
        assert 12 <= len(started) <= 30         # with serve_forever's own
        released.set()


def test_threads_are_added_where_each_is_held_up_for_a_moment_and_the_processor_is_idle(
        monkeypatch):
    """One thread would take 1.2 s for these, and take some in each of HELD_SECONDS."""
    monkeypatch.setattr(module, "HELD_SECONDS", 0.05)

    def handle(sock, address, server):
        time.sleep(0.03)
        sock.sendall(b"1")
    with listening(handle) as (server, connect):
        wait_until(server.accepting.locked)
        started = time.monotonic()
        for _ in range(5):
            for sock in [connect() for _ in range(8)]:
                assert sock.recv(1) == b"1"
        assert time.monotonic() - started < 0.9


def test_where_no_thread_is_left_who_connects_is_told_to_try_again(monkeypatch):
    released = threading.Event()

    def handle(sock, address, server):
        sock.sendall(b"1")
        assert released.wait(10)
    with listening(handle) as (server, connect):
        wait_until(server.accepting.locked)
        with no_thread_left(monkeypatch) as refused:
            assert connect().recv(1) == b"1"
            # threads that were begun before take some
            wait_until(lambda: [connect().recv(1) for _ in range(5)] == [b"H"] * 5)
            before = time.monotonic()
            assert [read_all(connect()) for _ in range(3)] == [module.TOO_MANY] * 3
            assert time.monotonic() - before < 2 and len(refused) < 30
        wait_until(lambda: connect().recv(1) == b"1")       # the last ones may still be refused
        released.set()


def test_who_waits_to_be_accepted_when_the_daemon_stops_is_told_to_try_again():
    with listening(None, serving=False) as (server, connect):
        socks = [connect() for _ in range(3)]
        server.stop_listening()
        assert [read_all(sock) for sock in socks] == [module.TOO_MANY] * 3


def test_who_keeps_connecting_is_not_turned_away_for_ever():
    """A stop waits for that, and so does whoever looks after the threads."""
    with listening(None, serving=False) as (server, connect):
        socks = [connect() for _ in range(8)]
        server.request_queue_size = 5
        server.refuse_backlog()
        assert [read_all(sock) for sock in socks[:5]] == [module.TOO_MANY] * 5
        assert len(server.refused) == 5 and not server.accepting.locked()
        server.stop_listening()
        server.refuse_backlog()             # of a socket that is closed already
        assert not server.accepting.locked()


def test_a_limit_of_descriptors_that_was_lowered_does_not_end_the_look_at_who_has_left(
        monkeypatch):
    """poll(2) refuses more descriptors than RLIMIT_NOFILE allows, though they are open."""
    class Poll:
        def register(self, *_):
            pass

        def poll(self, _):
            raise OSError(errno.EINVAL, "Invalid argument")
    with listening(None, serving=False) as (server, _):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            client = server.clients[ours] = module.Client(ours, "127.0.0.1")
            client.asking, client.waited_for = time.monotonic() - 1, None
            theirs.close()
            with monkeypatch.context() as patched:
                patched.setattr(module.select, "poll", Poll)
                server.close_connections()
            assert not client.gone.done()
            server.close_connections()
            assert client.gone.done() and server.clients == {}


@pytest.mark.parametrize("version, more", [("1.0", b"\r\n"), ("1.1", HEALTH)])
def test_what_comes_after_the_last_request_does_not_break_its_answer_s_end(
        api, host, version, more):
    """A connection that is closed while bytes wait in it is reset; who is told first that no more
    will be sent reads the end all the same."""
    host.faults(set={"delay": True})
    body = '{"vm_id": 104, "cores": 4}'
    with api.connect() as sock:
        sock.sendall(framed(f"POST /scale/cores HTTP/{version}", "Host: x", LOGIN, JSON_KIND,
                            "Connection: close", f"Content-Length: {len(body)}", body=body))
        wait_until(host.calls)
        sock.sendall(more)
        host.go()
        answer = b""
        while data := sock.recv(65536):
            answer += data
        assert statuses(answer) == ([200], ok("CPU cores set to 4 for VM 104"))


def test_one_connection_too_many_is_told_so_at_once(launch, host):
    api = launch(server={"max_connections": 4}, constants={
        "YIELD_SECONDS": 60, "LINGER_SECONDS": 0.3, "WORKER_SECONDS": 0.1})
    # whoever asked whether it listens is accepted before
    assert api.get("/routes").status == 200
    wait_until(lambda: all(
        (host.root / f"{name}.log").exists() for name in ("main", "access", "error")))
    used = descriptors_at_rest(api) + 4
    held = [api.connect() for _ in range(4)]
    wait_until(lambda: (threads(api), descriptors(api)) == (4, used))
    started = time.monotonic()
    for _ in range(22):
        codes, body = statuses(api.raw(b""))
        assert (codes, body) == ([503], refused("Too many connections; try again later"))
    assert time.monotonic() - started < 1
    wait_until(lambda: threads(api) == 4)
    wait_until(lambda: descriptors(api) == used)    # they are closed when they had time to read
    assert b"\r\nRetry-After: 1\r\n" in api.raw(framed("GET /health/check HTTP/1.1", "Host: x"))
    held.pop().close()
    turned_away = 23

    def is_let_in():
        nonlocal turned_away
        let_in = b" 200 OK" in api.raw(
            framed("GET /health/check HTTP/1.1", "Host: x", "Connection: close"))
        turned_away += not let_in
        return let_in
    wait_until(is_let_in)
    metrics = wait_until(lambda: (reply := api.get("/metrics")).status == 200 and reply.body)
    assert f"lxc_autoscale_api_connections_refused_total {turned_away}\n" in metrics
    for sock in held:
        sock.close()


def test_no_more_connections_are_let_in_than_the_limit_of_open_files_bears(launch):
    api = launch(inside=("sh", "-c", 'ulimit -n 200; exec "$@"', "sh"),
                 server={"max_connections": 5000})
    held = [api.connect(source="127.0.0.2") for _ in range(250)]
    assert api.get("/routes", timeout=5).status == 200
    assert (" WARNING server.max_connections is 5000, but the limit of open files (200) "
            "lets 72 in\n") in api.log("error")
    for sock in held:
        sock.close()


def test_those_turned_away_leave_files_to_all_else(launch):
    api = launch(inside=("sh", "-c", 'ulimit -n 300; exec "$@"', "sh"),
                 server={"max_connections": 1000}, constants={"LINGER_SECONDS": 60})
    with contextlib.ExitStack() as held, api.connect() as sock:
        for _ in range(400):                    # 172 are let in
            held.enter_context(api.connect(source="127.0.0.2"))
        wait_until(lambda: "connections_refused_total 0" not in api_metrics(sock))
        assert descriptors(api) < 290
        sock.sendall(framed("GET /resource/vm/status?vm_id=104 HTTP/1.1", "Host: x", LOGIN))
        assert read_answer(sock).status == 200


def test_an_address_that_holds_too_many_connections_is_named_once_a_minute(monkeypatch):
    said = []

    def note(text, *values, extra):
        said.append((text % values, extra))
    monkeypatch.setattr(module.log, "warning", note)
    with listening(None, serving=False) as (server, _), contextlib.ExitStack() as socks:
        server.max_connections = 4
        for seconds in (0, 59, 61):             # since the line before
            while len(server.clients) < 4:
                sock = socks.enter_context(socket.socket())
                server.clients[sock] = module.Client(sock, "192.0.2.1")
            server.complained -= seconds
            assert server.make_room("192.0.2.9")
        assert said == [("192.0.2.1 holds 4 of 4 connections; one of them gives way to 192.0.2.9",
                         {"patience": 0})] * 2          # the others' places wait meanwhile


def test_of_those_turned_away_no_more_are_kept_open_than_may_connect(launch):
    api = launch(server={"max_connections": 2}, constants={
        "YIELD_SECONDS": 60, "LINGER_SECONDS": 60})
    held = [api.connect() for _ in range(2)]
    wait_until(lambda: statuses(api.raw(b""))[0] == [503])
    before = descriptors(api)
    for _ in range(10):
        assert statuses(api.raw(b""))[0] == [503]
    wait_until(lambda: descriptors(api) <= before + 2)
    for sock in held:
        sock.close()


def is_healthy(api):
    """Whether the health check is answered with 200; one connection too many is closed before TLS
    begins."""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        return api.get("/health/check").status == 200


@OVER_BOTH
def test_a_place_held_without_a_request_goes_to_an_honest_client(launch, tls):
    api = launch(tls=tls, server={"max_connections": 4}, constants={"YIELD_SECONDS": 0.2})
    held = [api.connect_plainly() for _ in range(4)]
    wait_until(lambda: is_healthy(api), 5)
    assert held[0].recv(10) == b""                  # the one that waited longest has lost its place
    for sock in held:
        sock.close()


def test_500_silent_or_slow_connections_do_not_delay_an_honest_request(launch):
    api = launch(constants={"REQUEST_SECONDS": 1.3, "YIELD_SECONDS": 0.5, "LINGER_SECONDS": 0.3,
                            "WORKER_SECONDS": 0.2})
    assert api.get("/health/check").status == 200
    slow = [api.connect() for _ in range(500)]
    begun, times = time.monotonic(), []
    while time.monotonic() - begun < 1.2:
        for sock in slow[::2]:
            with contextlib.suppress(OSError):
                sock.send(b"G")
        started = time.monotonic()
        status = api.get("/health/check").status
        times.append((time.monotonic() - started, status, started - begun))
        time.sleep(0.02)
    late = [status for _, status, moment in times if moment > 0.7]
    assert late == [200] * len(late) and late       # after half a second, the slow ones give way
    assert sorted(seconds for seconds, _, _ in times)[len(times) // 2] < 0.1
    wait_until(lambda: threads(api) < 5 and descriptors(api) < 20, 10)
    for sock in slow:
        sock.close()


@pytest.mark.parametrize("held, bound, tries", [
    (module.HELD_SECONDS, 0.25, 30), (0.04, 3, 1)])     # others need the processor, too
def test_a_crowd_of_silent_clients_holds_nobody_up_for_long(launch, held, bound, tries):
    """Threads are added for them, twice as many at a time; one at a time would take twice the
    bound or more, 250 times HELD_SECONDS."""
    api, times = launch(server={"max_connections": 300}, constants={
        "WORKER_SECONDS": 0.2, "HELD_SECONDS": held}), []
    while len(times) < tries and min(times, default=bound) >= bound:
        wait_until(lambda: threads(api) == 0)
        with contextlib.ExitStack() as crowd:
            for _ in range(250):
                crowd.enter_context(api.connect())
            started = time.monotonic()
            assert api.get("/routes").status == 200
            times.append(time.monotonic() - started)
    assert min(times) < bound
    wait_until(lambda: threads(api) == 0)


def test_one_address_that_holds_all_places_with_answered_requests_gives_way(launch):
    api = launch(server={"max_connections": 8})
    held = [api.connect(source="127.0.0.2") for _ in range(8)]
    for _ in range(5):
        for sock in held:
            with contextlib.suppress(OSError):
                sock.sendall(framed("OPTIONS /metrics HTTP/1.1", "Host: x"))
        assert [api.get("/routes").status for _ in range(5)] == [200] * 5
    assert api.stop() == 0                  # by then all lines are written
    warnings = re.findall(r"WARNING (.*)\n", api.log("error"))
    assert warnings == ["127.0.0.2 holds 8 of 8 connections; one of them gives way to 127.0.0.1"]
    for sock in held:
        sock.close()


@OVER_BOTH
def test_one_address_that_holds_all_places_with_work_gives_way_and_its_threads_end(
        launch, host, tls):
    host.faults(list={"pause": True})
    api = launch(tls=tls, server={"max_connections": 8}, constants={"WORKER_SECONDS": 0.2})
    held = [api.connect(source="127.0.0.2") for _ in range(8)]
    for sock in held:
        sock.sendall(HEALTH)
    with contextlib.ExitStack() as honest:
        # one connection, for each further one takes a place
        watch = honest.enter_context(api.connect())
        wait_until(lambda: "lxc_autoscale_api_requests_in_progress 8\n" in api_metrics(watch))
        others = [honest.enter_context(api.connect()) for _ in range(3)]
        for sock in others:
            sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
            assert read_answer(sock).status == 200
        wait_until(lambda: threads(api) <= 4 + 4 + 2)       # honest ones, those left, and the probe
        host.go()
        answered = [sock for sock in held if b" 200 OK" in sock.recv(100)]
        assert len(answered) == 4
    for sock in held:
        sock.close()


def test_of_an_address_s_connections_one_whose_change_runs_gives_way_last(launch, host):
    host.faults(set={"delay": True})
    api, body = launch(server={"max_connections": 2}), '{"vm_id": 104, "cores": 4}'
    with api.connect(source="127.0.0.2") as busy, api.connect(source="127.0.0.2") as idle:
        busy.sendall(framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                            f"Content-Length: {len(body)}", body=body))
        wait_until(host.calls)
        idle.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
        assert read_answer(idle).status == 200
        assert api.get("/routes").status == 200 and idle.recv(10) == b""
        host.go()
        assert read_answer(busy).body == ok("CPU cores set to 4 for VM 104")


def test_a_connection_gives_way_to_another_of_its_address_only_when_its_change_has_ended(
        launch, host):
    host.faults(set={"delay": True})
    api, body = launch(server={"max_connections": 1}, constants={"YIELD_SECONDS": 0}), (
        '{"vm_id": 104, "cores": 4}')
    with api.connect() as sock:
        sock.sendall(framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                            f"Content-Length: {len(body)}", body=body))
        wait_until(host.calls)
        assert api.get("/routes").body == refused("Too many connections; try again later")
        host.go()
        assert read_answer(sock).status == 200
        wait_until(lambda: is_healthy(api), 5)


def test_a_request_whose_connection_has_lost_its_place_is_not_begun():
    server = module.SimpleNamespace(
        changed=threading.Condition(), stopping=threading.Event(), clients={})
    client = module.Client(None, "127.0.0.1")
    with module.Server.request_in_work(server, client, "127.0.0.1", True) as may_begin:
        assert (may_begin, client.asking) == (False, None)


def test_a_request_that_came_too_late_is_logged_as_its_client_s(launch):
    api = launch(constants={"Server.request_in_work": Code(
        "daemon.contextmanager(lambda *_: (may_begin for may_begin in [False]))")})
    late = "The daemon is stopping, or this connection has lost its place"
    for method, body in (("GET", error(late)), ("DELETE", refused(f"Nothing was done: {late}"))):
        reply = api.request(
            method, "/clone/delete", headers={"X-Forwarded-For": "198.51.100.7"})
        assert (reply.status, reply.body, reply.headers["Connection"]) == (503, body, "close")
        wait_until(lambda: re.search(
            rf"Z 198\.51\.100\.7 {method} /clone/delete 503 \d+ 0\.0 ms$", api.log("access"), re.M))


def test_a_client_behind_a_proxy_is_counted_by_its_own_address(launch):
    api = launch(server={"max_connections": 4}, constants={"YIELD_SECONDS": 60})
    held = [api.connect() for _ in range(3)]
    for sock in held:
        sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN,
                            "X-Forwarded-For: 198.51.100.7"))
        assert read_answer(sock).status == 200
    with api.connect() as honest:
        honest.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN,
                              "X-Forwarded-For: 198.51.100.8"))
        assert read_answer(honest).status == 200
        assert api.get("/routes").status == 200
        honest.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
        assert read_answer(honest).status == 200, "who holds little keeps it"
    assert api.stop() == 0                  # by then all lines are written
    assert re.findall(r"WARNING (.*)\n", api.log("error")) == [
        "198.51.100.7 holds 3 of 4 connections; one of them gives way to 127.0.0.1"]
    for sock in held:
        sock.close()


@OVER_BOTH
def test_who_leaves_while_a_request_waits_gives_the_place_back(launch, host, tls):
    host.faults(list={"pause": True})
    api = launch(tls=tls, server={"max_connections": 4}, constants={"LOOK_SECONDS": 0.05})

    def in_progress(count):
        # all places are taken: with TLS that is told by the end
        with contextlib.suppress(OSError):
            return f"lxc_autoscale_api_requests_in_progress {count}\n" in api.get("/metrics").body
    for _ in range(3):
        gone = [api.connect() for _ in range(3)]
        for sock in gone:
            sock.sendall(HEALTH)
        wait_until(lambda: in_progress(4))
        for sock in gone:
            sock.close()
        wait_until(lambda: in_progress(1))
    host.go()
    wait_until(lambda: api.log("access").count(" 127.0.0.1 GET /health/check 499 0 ") == 9)
    assert host.calls() == ["pct list"] and api.get("/health/check").status == 200


def test_who_half_closes_the_connection_still_takes_a_change_s_answer_or_a_large_one(launch, host):
    host.faults(set={"delay": True})
    api = launch(constants={
        "LOOK_SECONDS": 0.02, "Metrics.render": Code("lambda *_: 8000000 * 'x'")})
    body = '{"vm_id": 104, "cores": 4}'
    change = framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                    f"Content-Length: {len(body)}", body=body)
    with api.connect() as changing, api.connect() as taking:
        changing.sendall(change)
        wait_until(host.calls)
        taking.sendall(framed("GET /metrics HTTP/1.1", "Host: x", "Connection: close"))
        assert taking.recv(10) == b"HTTP/1.1 2"
        for sock in (changing, taking):
            sock.shutdown(socket.SHUT_WR)
        with api.connect() as leaving:              # who leaves later is noticed no sooner
            leaving.sendall(change)
            wait_until(lambda: operations(api)[0]["state"] == "waiting")
        wait_until(lambda: operations(api)[0]["status"] == 499)
        host.go()
        assert read_answer(changing).body == ok("CPU cores set to 4 for VM 104")
        assert len(read_all(taking)) > 8000000


@OVER_BOTH
def test_slow_readers_of_a_large_answer_share_its_bytes(launch, tls):
    api = launch(tls=tls, constants={
        "Metrics.render": Code("lambda *_: daemon.time.sleep(0.3) or 8000000 * 'x'")})
    before = resident_kb(api)
    slow = [api.connect() for _ in range(20)]
    for sock in slow:
        sock.sendall(framed("GET /metrics HTTP/1.1", "Host: x"))
    assert len(api.get("/metrics").body) == 8000000
    assert resident_kb(api) - before < 50000        # of 160,000
    for sock in slow:
        sock.close()


@OVER_BOTH
def test_of_many_slow_readers_of_large_answers_the_oldest_gives_way(launch, tls):
    api = launch(tls=tls, constants={
        "Metrics.render": Code("lambda *_: 8000000 * 'x'"), "MAX_SENDING": 3,
        "YIELD_SECONDS": 0.2})
    slow = []
    for _ in range(5):
        slow.append(api.connect())
        slow[-1].sendall(framed("GET /metrics HTTP/1.1", "Host: x"))
        assert slow[-1].recv(10) == b"HTTP/1.1 2"
    assert api.get("/routes").status == 200
    whole = [len(read_all(sock)) > 8000000 for sock in slow if not sock.shutdown(socket.SHUT_WR)]
    assert whole == [False, False, True, True, True]
    for sock in slow:
        sock.close()
    wait_until(lambda: api.log("access").count(" GET /metrics ") == 5)
    assert sorted(re.findall(r" GET /metrics (\d+ \d+) ", api.log("access"))) == [
        "200 8000000"] * 3 + ["499 0"] * 2


@OVER_BOTH
def test_of_a_crowd_that_takes_large_answers_at_once_nobody_gives_way(launch, tls):
    api = launch(tls=tls, constants={
        "Metrics.render": Code("lambda *_: 300000 * 'x'"), "MAX_SENDING": 2})
    answers = side_by_side(*[(api.get, "/metrics")] * 40)
    assert [(reply.status, len(reply.body)) for reply in answers] == [(200, 300000)] * 40


def test_clients_that_leave_cost_one_line_and_end_nothing(launch, host):
    api = launch(constants={"WORKER_SECONDS": 0.2})
    host.faults(set={"delay": 0.3})
    body = '{"vm_id": 104, "cores": 5}'
    with api.connect() as sock:
        sock.sendall(framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                            f"Content-Length: {len(body)}", body=body))
        wait_until(host.calls)
    wait_until(lambda: host.conf(104)["cores"] == "5")
    wait_until(lambda: f"POST /scale/cores vm_id=104 cores=5 by 127.0.0.1 with key {FINGERPRINT}: "
                       "done" in api.log())
    lines = len((api.log("access") + api.log("error")).splitlines())
    # in the middle of a body, which is being waited for
    with api.connect() as sock:
        sock.sendall(framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                            "Content-Length: 50", "Expect: 100-continue"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b'{"vm_id"')
        sock.shutdown(socket.SHUT_WR)
        assert statuses(read_all(sock)) == (
            [400], refused("The connection ended before the body did"))
    lines += 1
    reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"
    for data in (b"", b"GET", framed("GET /routes HTTP/1.1", "Host: x", LOGIN),
                 framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                        "Content-Length: 50", body="{")):
        for _ in range(10):
            sock = api.connect()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            sock.sendall(data)
            sock.close()
    wait_until(lambda: threads(api) <= 1)
    assert "Traceback" not in api.log("error") + api.said() and "internal error" not in api.log()
    assert len((api.log("access") + api.log("error")).splitlines()) - lines <= 40
    assert api.get("/routes").status == 200


# The daemon

def test_nothing_of_python_is_taken_apart_while_threads_may_use_it(launch, host):
    """An atexit handler of an earlier start would run after the daemon's own, the last."""
    taken_apart = host.root / "taken apart"
    api = launch(constants={"EX_CONFIG": Code(
        f"__import__('atexit').register(open, {str(taken_apart)!r}, 'w') and 78")})
    assert api.get("/health/check").status == 200
    assert api.stop() == 0 and "INFO stopped\n" in api.log() and not taken_apart.exists()


def test_a_stop_lets_requests_in_work_finish(api, host):
    host.faults(set={"delay": True})
    idle = api.connect(timeout=5)           # less than it may take for its first request
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 5})
        wait_until(host.calls)
        api.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not answers(api.port), 1)
        assert idle.recv(10) == b"" and not answer.done()
        host.go()
        assert (answer.result().status, answer.result().headers["Connection"]) == (200, "close")
    assert api.process.wait(5) == 0
    idle.close()


def test_a_change_whose_body_comes_after_the_signal_is_not_begun(api, host):
    body = b'{"vm_id": 104, "cores": 5}'
    with api.connect() as sock:
        sock.sendall(framed("POST /scale/cores HTTP/1.1", "Host: x", LOGIN, JSON_KIND,
                            "Expect: 100-continue", f"Content-Length: {len(body)}"))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"          # it waits for the body
        api.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not answers(api.port))
        sock.sendall(body)
        reply = read_answer(sock)
    assert (reply.status, reply.body) == (503, refused("Nothing was done: The daemon is stopping"))
    assert (reply.headers["Retry-After"], reply.headers["Connection"]) == ("30", "close")
    assert api.process.wait(5) == 0
    assert host.calls() == [] and host.conf(104)["cores"] == "2" and " change " not in api.log()


def test_a_stop_in_the_middle_of_a_clone_leaves_it_to_proxmox(launch, host):
    api = launch(constants={"STOP_SECONDS": 5.2})
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        clone = begin_clone(pool, api, host, 104, 105)
        waiting = pool.submit(api.post, "/scale/cores", {"vm_id": 104, "cores": 4})
        wait_until(lambda: [row["state"] for row in operations(api)] == ["waiting", "running"])
        api.process.send_signal(signal.SIGTERM)
        assert waiting.result().body == refused("Nothing was done: The daemon is stopping")
        reply = clone.result()
        assert reply.status == 504 and (
            "the daemon stops: pct clone 104 105 goes on in Proxmox, and what was to follow it "
            "will not be done. Ask for" in reply.body["error"])
    assert api.process.wait(5) == 0
    assert ("left running: POST /clone/create vm_id=104 new_vm_id=105 new_vm_name=x by 127.0.0.1"
            in api.log("error"))
    assert "left running: POST /scale/cores" not in api.log("error")
    again = launch()                                            # while the old pct still runs
    assert again.get("/routes").status == 200
    name, = host.snapshots(104)
    wait_until(lambda: f"remove it with: pct delsnapshot 104 {name}" in again.log("error"))
    host.go()
    wait_until(lambda: "lock" not in host.conf(105) and "rootfs" in host.conf(105))
    assert host.conf(104)["cores"] == "2"


def test_a_daemon_that_was_started_without_stdout_stops_well(launch, host):
    api = launch(inside=["sh", "-c", 'exec "$@" >&-', "sh"])
    assert api.stop() == 0 and (host.root / "stderr.txt").read_text() == ""


def test_a_start_looks_for_temporary_snapshots_twice_for_one_may_come_late(launch, host):
    """So it is if the daemon is killed just after it has begun pct."""
    api = launch(constants={"LOCK_SECONDS": 1})
    api.process.send_signal(signal.SIGHUP)              # which does not come in between
    wait_until(lambda: " INFO reloaded " in api.log())
    add_snapshots(host, 106, autoscale_clone_00000000="")
    wait_until(lambda: api.log("error").endswith(
        " WARNING a temporary snapshot is there that this daemon has not taken; "
        "once no clone runs, remove it with: pct delsnapshot 106 autoscale_clone_00000000\n"))


def test_the_second_look_is_put_off_while_no_thread_is_left(monkeypatch):
    """Else the main thread would end, and with it the daemon, in the middle of its changes."""
    looked, moments, workers = module.SimpleQueue(), [], module.Workers()
    monkeypatch.setattr(
        module, "warn_of_temporary_snapshots", lambda api, told: looked.put((api, told)))
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    api = module.SimpleNamespace(workers=workers, changes=module.Changes(None, workers, None))
    server = module.SimpleNamespace(
        api=api, server_address=("127.0.0.1", 5000), serve_forever=lambda: None,
        stop_listening=lambda: None, wait_for_answers=lambda seconds: True)
    with contextlib.ExitStack() as full:
        def wait(until):
            moments.append(until and until - time.monotonic())
            if len(moments) == 1:
                assert looked.get(timeout=10) == (api, set())
                full.enter_context(no_thread_left(monkeypatch))
            if len(moments) == 2:
                assert looked.empty()
                full.close()
            if len(moments) == 3:
                assert looked.get(timeout=10) == (api, set())
                return signal.SIGTERM
            return None
        module.serve(server, module.SimpleNamespace(wait=wait), "")
    assert [moment and 50 < moment <= module.LOCK_SECONDS for moment in moments] == [
        True, True, None]


def test_a_temporary_snapshot_is_told_once_and_none_of_the_daemon_s_own(host, monkeypatch):
    said, names = [], [f"autoscale_clone_0000000{number}" for number in range(3)]
    change = change_of("/clone/create", vm_id=104, new_vm_id=105, new_vm_name="x")
    change.steps.append(["pct", "snapshot", "104", names[0]])       # of our own: it tells itself
    add_snapshots(host, 104, **{names[0]: ""})
    add_snapshots(host, 106, **{names[1]: ""})

    api = module.SimpleNamespace(
        host=proxmox_of(host), changes=module.SimpleNamespace(recent=[change]))
    monkeypatch.setattr(module.log, "warning", lambda text, *values: said.append(text % values))
    told = set()
    module.warn_of_temporary_snapshots(api, told)
    add_snapshots(host, 106, **{names[2]: ""})
    module.warn_of_temporary_snapshots(api, told)
    assert said == ["a temporary snapshot is there that this daemon has not taken; "
                    f"once no clone runs, remove it with: pct delsnapshot 106 {name}"
                    for name in names[1:]]
    host.pve.rename(host.root / "elsewhere")
    host.pve.mkdir()                        # as if it were not mounted
    del said[:]
    module.warn_of_temporary_snapshots(api, told)
    assert said == [
        "not looked for snapshots that an earlier stop left: Proxmox's cluster file system is not "
        f"mounted at {host.pve}; see: systemctl status pve-cluster"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_an_idle_daemon_at_once(api, number):
    started = time.monotonic()
    assert api.stop(number) == 0 and time.monotonic() - started < 1


def test_a_port_in_use_is_said(api, host):
    done = start_daemon(host, config_text(host, api.port, KEY), stderr=subprocess.PIPE, text=True)
    assert (done.communicate(timeout=10)[1], done.returncode) == (
        f"cannot listen on 127.0.0.1 port {api.port}: Address already in use\n", 1)


def test_ipv6_is_served(host):
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    api = Daemon(host, server={"host": "::"})
    with socket.create_connection(("::1", api.port)) as sock:
        sock.sendall(framed("GET /health/check HTTP/1.1", "Host: [::1]:5000", "Connection: close"))
        assert statuses(read_all(sock))[0] == [200]
    assert api.get("/health/check").status == 200 and api.stop() == 0
    assert (" ::1 GET /health/check 200 " in api.log("access")
            and " 127.0.0.1 GET /health/check 200 " in api.log("access"))


def fuzzed(chance):
    """One random request: from nearly right to nonsense."""
    path = chance.choice(list(module.PATHS) + ["/", "/x", "/%00", "//", "/routes/.."])
    query = chance.choice(["", "", "?vm_id=104", "?vm_id=" + str(chance.randint(-5, 10**7)),
                           "?%ff=%zz", "?" + "a&" * 50, "?node_name=-x", "?lxc_id=%31%30%34"])
    body = chance.choice([b"", b"{}", b"[]", b'{"vm_id": 999, "cores": 4}',
                          b'{"vm_id": "104", "memory": 1}', b'{"vm_id": 1e9}', b"{" * 200,
                          bytes(chance.randbytes(30)),
                          b'{"vm_id": 999, "snapshot_name": "\\ud800"}',
                          b'{"vm_id":999,"vm_id":999}', b"\xff\xfe{}", b'{"a":' * 500])
    headers = ["Host: x"] * chance.choice([1, 1, 1, 1, 1, 0, 2])
    headers += [LOGIN] * chance.choice([1, 1, 1, 0, 2]) + [JSON_KIND] * chance.choice([1, 1, 0])
    headers += chance.choice([[f"Content-Length: {len(body)}"]] * 8 + [
        [], ["Content-Length: x"], ["Transfer-Encoding: chunked"],
        ["Expect: 100-continue", f"Content-Length: {len(body)}"]])
    headers += chance.choice([[]] * 5 + [
        ["X-Forwarded-For: " + chance.choice(["1.2.3.4", "x", "::1, 5.6.7.8", "\x1b"])],
        ["A b: c"], ["Connection: close"]])
    data = framed(f"""{chance.choice(['GET', 'GET', 'POST', 'POST', 'DELETE', 'HEAD', 'OPTIONS',
                                      'PUT', 'get'])} {path}{query} HTTP/1.1""", *headers) + body
    if chance.random() < 0.1:
        place = chance.randrange(len(data))
        data = (data[:place] + chance.randbytes(chance.randint(0, 3))
                + data[place + chance.randint(0, 3):])
    return data


def fuzz(api, count, seed, workers=4):
    """Send random requests, a few in a row on each connection -> Counter of status codes."""
    def work(number):
        chance, codes = random.Random(seed * 1000 + number), Counter()
        for _ in range(count // workers // 5):
            with api.connect(10) as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(b"".join(fuzzed(chance) for _ in range(5)))
                    if chance.random() < 0.95:
                        sock.shutdown(socket.SHUT_WR)
                        for line in re.findall(rb"HTTP/1\.1 (\d+) ", read_all(sock)):
                            codes[int(line)] += 1
        return codes
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(work, range(workers)), Counter())


def test_random_requests_crash_and_leak_nothing(launch, host):
    api = launch(constants={"REQUEST_SECONDS": 2, "IDLE_SECONDS": 2, "WORKER_SECONDS": 0.2})
    # the HTTP layer is what is asked here
    (host.root / "bin/pct").write_text("#!/bin/sh\nexit 1\n")
    fuzz(api, 500, 1)
    before = descriptors_at_rest(api), children(api)
    codes = fuzz(api, 2000, 2)
    assert before == (descriptors_at_rest(api), children(api))
    assert {200, 204, 400, 401, 404, 405, 411} <= set(codes)
    unexpected = [line for line in api.log("error").splitlines() if "internal error" in line]
    assert unexpected == [] and "Traceback" not in api.said()
    assert api.get("/routes").status == 200


@pytest.fixture
def manager(tmp_path):
    """The socket that systemd listens on for a unit of Type=notify."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(10)
    yield sock
    sock.close()


def test_systemd_is_told_of_start_reload_and_stop(launch, manager):
    api = launch(env={"NOTIFY_SOCKET": manager.getsockname()})
    assert manager.recv(1000) == b"READY=1"
    api.process.send_signal(signal.SIGHUP)
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(1000))
    assert manager.recv(1000) == b"READY=1"
    api.process.send_signal(signal.SIGTERM)
    assert manager.recv(1000) == b"STOPPING=1"
    assert api.process.wait(5) == 0


def test_an_abstract_socket_is_spoken_to_and_a_missing_one_is_no_matter(launch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"lxc_autoscale_api_test_{os.getpid()}_{time.time_ns()}"
        sock.bind("\0" + name)
        sock.settimeout(10)
        launch(env={"NOTIFY_SOCKET": "@" + name})
        assert sock.recv(1000) == b"READY=1"
    assert launch(env={"NOTIFY_SOCKET": "/nowhere/notify"}).get("/routes").status == 200


def test_a_systemd_that_takes_no_word_is_waited_for_a_second_and_that_is_logged(
        manager, monkeypatch):
    said = []
    monkeypatch.setattr(module.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.sendto(b"x", manager.getsockname())
    used = time.thread_time()
    module.notify("READY=1\nX=2")
    assert said == ["systemd cannot be told READY=1: timed out"]
    assert time.thread_time() - used < 0.3, "it was asked again and again"


@OVER_BOTH
def test_the_watchdog_is_fed_only_while_the_daemon_answers(launch, manager, tls):
    env = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "300000"}
    api = launch(tls=tls, env=env)
    assert [manager.recv(1000) for _ in range(4)] == [b"READY=1"] + [b"WATCHDOG=1"] * 3
    assert api.stop() == 0
    while manager.recv(1000) != b"STOPPING=1":
        pass
    stuck = launch(tls=tls, env=env, constants={
        "REQUEST_SECONDS": 0.1, "Api.answer": Code("lambda *_: daemon.time.sleep(60)")})
    assert manager.recv(1000) == b"READY=1"
    manager.settimeout(0.6)             # six times as long as it takes else
    with pytest.raises(socket.timeout):
        manager.recv(1000)
    stuck.process.kill()
    stuck.stop()


def test_an_address_that_has_gone_says_nothing_of_the_daemon():
    server = module.SimpleNamespace(
        server_address=("192.0.2.1", 5000), address_family=socket.AF_INET)
    assert module.Server.answers(server) is True
    server.server_address = ("127.0.0.1", free_port())
    server.tls = None
    assert module.Server.answers(server) is False


@OVER_BOTH
def test_an_error_or_a_refusal_does_not_feed_the_watchdog(launch, manager, tls):
    api = launch(tls=tls, env={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "300000"},
                 constants={"Api.dispatch": Code("lambda *_: 1 / 0")})
    assert manager.recv(1000) == b"READY=1"
    wait_until(lambda: api.log("error").count("internal error in OPTIONS /health/check") >= 3)
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1000)


@OVER_BOTH
def test_the_watchdog_is_fed_while_all_places_are_taken(launch, host, manager, tls):
    host.faults(list={"pause": True})
    api = launch(tls=tls, env={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "300000"},
                 server={"max_connections": 2})

    def place(source):
        """A connection that has a place,
        or None while those that have been closed still take it."""
        with contextlib.suppress(OSError):
            sock = api.connect(source=source)
            sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
            return sock if read_answer(sock).status == 200 else sock.close()
    held = [wait_until(lambda: place(source)) for source in ("127.0.0.2", "127.0.0.3")]
    for sock in held:
        sock.sendall(HEALTH)
    # with TLS it is closed without a word
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        wait_until(lambda: statuses(api.raw(b""))[0] == [503])      # nobody holds more than others
    assert [manager.recv(1000) for _ in range(4)] == [b"READY=1"] + [b"WATCHDOG=1"] * 3
    host.go()
    for sock in held:
        assert read_answer(sock).status == 200
        sock.close()


def test_a_watchdog_that_waits_for_another_process_is_not_fed(monkeypatch):
    """sd_watchdog_enabled(3)."""
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    for pid, seconds in ((os.getppid(), None), (os.getpid(), 1)):
        monkeypatch.setenv("WATCHDOG_PID", str(pid))
        assert module.watchdog_seconds() == seconds


def test_reloads_do_not_starve_the_watchdog(launch, manager):
    api = launch(env={"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "900000"})
    fed = []
    while fed.count(b"WATCHDOG=1") < 2:             # before 300 ms without a reload
        api.process.send_signal(signal.SIGHUP)
        wait_until(lambda: fed.append(manager.recv(1000)) or fed[-1] == b"READY=1")
        assert len(fed) < 10000


def test_a_reload_takes_over_trusted_proxies_and_the_timeouts_of_changes(launch, host):
    api = limited(launch, max_requests_per_minute=1)
    via = {"X-Forwarded-For": "198.51.100.7"}
    assert [api.get("/routes", headers=via).status for _ in range(2)] == [200, 429]
    (host.root / "api.yaml").write_text(config_text(
        host, api.port, KEY, rate_limiting={"max_requests_per_minute": 1},
        server={"trusted_proxies": ["192.0.2.1"]}, proxmox={"change_timeout_seconds": 1}))
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: " INFO reloaded " in api.log())
    assert [api.get("/routes", headers=via).status for _ in range(2)] == [200, 200]
    host.faults(set={"delay": True})
    reply = api.post("/scale/cores", {"vm_id": 104, "cores": 4})
    assert (reply.status, "did not finish in 1 s" in reply.body["error"]) == (504, True)
    host.go()
    wait_until(lambda: api.get("/operations").body["data"][0]["ended"])
    assert "may need a restart" not in api.log()


def test_a_reload_takes_over_keys_limits_rails_and_logs_and_closes_nothing(launch, host):
    api = launch()
    new_key = "another-key-9876543210"
    with api.connect() as sock:
        sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
        assert read_answer(sock).status == 200
        (host.root / "api.yaml").write_text(config_text(
            host, api.port, new_key,
            rate_limiting={"max_requests_per_minute": 1}, containers={"protected": [104]},
            logging={"log_file": f"{host.root}/second.log", "log_level": "WARNING"},
            server={"max_connections": 17}))
        api.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "may need a restart" in api.log("second"))
        sock.sendall(framed("GET /routes HTTP/1.1", "Host: x", LOGIN))
        assert read_answer(sock).status == 401
        sock.sendall(framed("GET /routes HTTP/1.1", "Host: x",
                            f"X-API-Key: {new_key}", "X-Forwarded-For: 198.51.100.7"))
        assert (lambda reply: (reply.status, reply.headers["X-RateLimit-Limit"]))(
            read_answer(sock)) == (200, "1")
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 4}, key=new_key).status == 403
    assert " ran pct" not in api.log("second")


def test_a_reload_takes_over_the_level_and_the_keys_of_logs_that_stay_where_they_are(api, host):
    """The error log has warnings whatever the level."""
    new_key = "another-key-9876543210"
    (host.root / "api.yaml").write_text(config_text(
        host, api.port, new_key, logging={"log_level": "ERROR"}, server={"max_connections": 17}))
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "may need a restart" in api.log("error"))
    before = api.log()
    host.faults(set={"exit": 255, "stderr": new_key + "\n"})
    assert api.post("/scale/cores", {"vm_id": 104, "cores": 4}, key=new_key).status == 500
    assert (" WARNING failed: pct set 104 --cores 4: exit 255: [API key]\n" in api.log("error")
            and new_key not in api.log("error") and api.log() == before)


def test_a_reload_that_leaves_the_limits_as_they_were_forgets_no_request(launch):
    api = limited(launch, max_requests_per_minute=1)
    via = {"X-Forwarded-For": "198.51.100.7"}
    assert [api.get("/routes", headers=via).status for _ in range(2)] == [200, 429]
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: " INFO reloaded " in api.log())
    assert api.get("/routes", headers=via).status == 429


def test_a_bad_file_is_not_taken_over_and_said_with_its_line(api, host):
    path = host.root / "api.yaml"
    path.write_text(path.read_text().replace("port:", "prot:"))
    api.process.send_signal(signal.SIGHUP)
    text = f"not reloaded, the old settings stay: {path}:3: unknown key 'server.prot'"
    wait_until(lambda: text in api.log("error"))
    assert text in api.said() and api.get("/routes").status == 200


def test_a_fault_of_ours_in_a_reload_leaves_the_old_settings(launch, host):
    api = launch(constants={"load_settings": Code(
        "(lambda real, good: lambda *given: real(*given) if good.pop() else 1 / 0)"
        "(daemon.load_settings, [False, True])")})
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "ZeroDivisionError" in api.log("error"))
    assert "internal error in a reload; the old settings stay" in api.log("error")
    assert api.get("/routes").status == 200


def test_a_configuration_that_hangs_in_a_reload_holds_up_no_stop(launch, host):
    api, path = launch(constants={"FILE_SECONDS": 0.3}), host.root / "api.yaml"
    path.unlink()
    os.mkfifo(path)
    api.process.send_signal(signal.SIGHUP)
    wait_until(lambda: api.log("error").endswith(
        f"ERROR not reloaded, the old settings stay: {path}: Proxmox's files (/etc/pve) do not "
        "answer; see: systemctl status pve-cluster\n"))
    assert api.get("/routes").status == 200 and api.stop(seconds=5) == 0


def test_a_reload_that_is_refused_logs_all_that_is_wrong(api, host):
    path = host.root / "api.yaml"
    path.write_text(MANY_FAULTS)
    api.process.send_signal(signal.SIGHUP)
    said = [f"not reloaded, the old settings stay: {path}:{fault}" for fault in ALL_FAULTS]
    wait_until(lambda: api.log("error").count("\n") == len(said))
    assert [line.split(" ERROR ")[1] for line in api.log("error").splitlines()] == said
    assert [line for line in api.said().splitlines() if "not reloaded" in line] == said


def test_a_key_may_come_as_a_credential(host, launch, tmp_path):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "api_key").write_text("credential-key-0123456789\n")
    env = {"CREDENTIALS_DIRECTORY": str(folder)}
    api = launch(env=env, authentication={"api_key": None})
    assert [api.get("/routes", key=key).status
            for key in ("credential-key-0123456789", KEY)] == [200, 401]
    api = launch(env=env)
    assert [api.get("/routes", key=key).status
            for key in ("credential-key-0123456789", KEY)] == [401, 200]
    (folder / "api_key").write_text("short\n")
    done = start_daemon(host, config_text(host, free_port(), None), env=env,
                        stderr=subprocess.PIPE, text=True)
    said = done.communicate(timeout=10)[1]
    assert (done.returncode == 78
            and "the credential api_key must be at least 16 visible ASCII characters" in said
            and "short" not in said)


# What is installed

def install(folder, *arguments, source=HERE, **env):
    """Run install.sh below a folder of its own."""
    return subprocess.run([f"{source}/install.sh", *arguments], capture_output=True, text=True,
                          env={**os.environ, "DESTDIR": str(folder), **env})


def copy_project(folder, text):
    """Copy what install.sh installs into a folder, with a module of this text."""
    for name in ("install.sh", "lxc_autoscale_api.yaml", "lxc_autoscale_api.service"):
        shutil.copy(HERE / name, folder)
    (Path(folder) / MODULE.name).write_text(text)


@functools.lru_cache(maxsize=None)
def empty_module():
    """A folder with the project but for its module, which is an empty file and so checked and
    compiled at once: for what install.sh does with all the other files. It goes with this process.
    """
    folder = tempfile.TemporaryDirectory()
    copy_project(folder.name, "")
    return folder


def install_files(folder, *arguments, **env):
    return install(folder, *arguments, source=empty_module().name, **env)


MODULE_PATH, CONFIG_PATH, UNIT_PATH, LOGROTATE_PATH = (
    "usr/local/bin/lxc_autoscale_api.py", "etc/lxc_autoscale_ml/lxc_autoscale_api.yaml",
    "etc/systemd/system/lxc_autoscale_api.service", "etc/logrotate.d/lxc_autoscale_api")


def bytecode(folder):
    return [str(path.relative_to(folder))
            for path in folder.glob("usr/local/bin/__pycache__/lxc_autoscale_api.cpython-*.pyc")]


def test_an_installation_is_repeatable_and_keeps_the_key(tmp_path):
    first = install(tmp_path)
    assert first.returncode == 0, first.stderr
    config = tmp_path / CONFIG_PATH
    key = module.read_settings(config).keys[0]
    assert re.fullmatch("[0-9a-f]{64}", key) and stat.S_IMODE(config.stat().st_mode) == 0o600
    again = install(tmp_path)
    assert again.returncode == 0 and f"kept {config}" in again.stdout
    assert module.read_settings(config).keys == [key]
    assert (sorted(str(path.relative_to(tmp_path))
                   for path in tmp_path.rglob("*") if path.is_file())
            == sorted([MODULE_PATH, CONFIG_PATH, UNIT_PATH, LOGROTATE_PATH, *bytecode(tmp_path)])
            and len(bytecode(tmp_path)) == 1)
    assert (tmp_path / MODULE_PATH).read_bytes() == MODULE.read_bytes()
    config.write_text(config.read_text().replace("port: 5000", "port: 5001"))
    changed = config.read_text()
    assert install(tmp_path).returncode == 0
    assert config.read_text() == changed
    assert ((tmp_path / (CONFIG_PATH + ".new")).read_bytes()
            == (HERE / "lxc_autoscale_api.yaml").read_bytes())
    assert key not in first.stdout + first.stderr


def started_as_the_unit_says(folder, *options):
    """What the installed unit's command says, given options to end at once,
    with the files below a folder."""
    line = re.search(r"^ExecStart=(.*)", (folder / UNIT_PATH).read_text(), re.MULTILINE)[1]
    command = [word.replace("/usr/local/bin", f"{folder}/usr/local/bin")
               for word in shlex.split(line)]
    done = subprocess.run([*command, *options], capture_output=True, text=True,
                          cwd="/", env={"PATH": os.environ["PATH"]})
    return done.returncode, done.stdout, done.stderr


def test_the_unit_starts_from_bytecode_and_without_it_from_the_source(tmp_path):
    assert install(tmp_path).returncode == 0
    version = (0, f"lxc_autoscale_api {module.VERSION}\n", "")
    (tmp_path / "usr/local/bin/email.py").write_text("raise SystemExit('of an administrator')\n")
    assert started_as_the_unit_says(tmp_path, "--version") == version
    done = subprocess.run([tmp_path / MODULE_PATH, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == version
    assert started_as_the_unit_says(tmp_path, "--what")[2].startswith(
        "usage: lxc_autoscale_api.py [-h]")
    path, (pyc,) = tmp_path / MODULE_PATH, bytecode(tmp_path)
    source, times = path.read_bytes(), path.stat()
    path.write_bytes(b"?" * len(source))                    # so that only bytecode can run
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert started_as_the_unit_says(tmp_path, "--version") == version
    path.write_bytes(source)
    (tmp_path / pyc).write_bytes(b"of another Python")
    assert started_as_the_unit_says(tmp_path, "--version") == version
    shutil.rmtree((tmp_path / pyc).parent)
    (tmp_path / pyc).parent.write_text("nothing can be written into a file")
    assert started_as_the_unit_says(tmp_path, "--version") == version


def test_bytecode_goes_with_its_module_and_other_bytecode_stays(tmp_path):
    assert install(tmp_path).returncode == 0
    (tmp_path / bytecode(tmp_path)[0]).with_name(
        "lxc_autoscale_api.cpython-399.pyc").write_bytes(b"of another Python")
    other = (tmp_path / bytecode(tmp_path)[0]).with_name("lxc_autoscale.cpython-311.pyc")
    other.write_bytes(b"")
    assert install(tmp_path, "--uninstall").returncode == 0
    assert list((tmp_path / "usr/local/bin").rglob("*")) == [other.parent, other]
    other.unlink()
    assert install(tmp_path, "--uninstall").returncode == 0 and not other.parent.exists()


SYSTEMCTL = (r"""#!/bin/sh
# Stands in for systemctl: notes how it was called, and starts and stops the installed daemon.
echo "$*" >>{root}/systemctl.log
stop() {{ [ ! -e {root}/pid ] || kill "$(cat {root}/pid)" 2>/dev/null; rm -f {root}/pid; }}
case $1 in
restart)
    stop
    CREDENTIALS_DIRECTORY=$DESTDIR/run/credentials/lxc_autoscale_api.service PATH={bin}:$PATH """
    r"""{python} -IBc "import sys; del sys.argv[0]; sys.path.append('$DESTDIR/usr/local/bin'); """
    r"""from lxc_autoscale_api import main; sys.exit(main())" lxc_autoscale_api.py """
    r"""--config $DESTDIR/etc/lxc_autoscale_ml/lxc_autoscale_api.yaml >/dev/null 2>>{root}/journal &
    echo $! >{root}/pid ;;
disable) stop ;;
esac
""")


@pytest.fixture
def installed(tmp_path, host):
    """-> (folder, install): the daemon installed below a folder
    and run by a stand-in for systemctl."""
    folder, port = tmp_path / "root", free_port()
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        SYSTEMCTL.format(root=tmp_path, bin=host.root / "bin", python=sys.executable))
    systemctl.chmod(0o755)
    config = folder / CONFIG_PATH
    config.parent.mkdir(parents=True)
    config.write_text(config_text(host, port, KEY))

    def run(source=HERE, *arguments, tries=25, pve_dir="/etc/pve"):
        return subprocess.run(
            [str(source / "install.sh"), *arguments], capture_output=True, text=True,
            env={**os.environ, "DESTDIR": str(folder), "SYSTEMCTL": str(systemctl),
                 "HEALTH_TRIES": str(tries), "PVE_DIR": str(pve_dir)})
    yield folder, run, port
    subprocess.run([str(systemctl), "disable"], env={**os.environ, "DESTDIR": str(folder)})
    wait_until(lambda: not answers(port))


def newer_version(tmp_path, *changes):
    """A copy of the project in which the module differs."""
    source = tmp_path / "newer"
    source.mkdir()
    text = MODULE.read_text().replace(f'VERSION = "{module.VERSION}"', 'VERSION = "99.0.0"')
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    copy_project(source, text)
    return source


def version_that_runs(port):
    """The version of the first daemon that answers: one that ends may still accept."""
    def ask():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(
                OSError, http.client.HTTPException):
            connection.request("GET", "/health/check")
            return connection.getresponse().headers["Server"].partition("/")[2]
    return wait_until(ask)


def test_an_upgrade_of_a_running_daemon_keeps_its_settings(installed, tmp_path):
    folder, install, port = installed
    done = install()
    assert done.returncode == 0 and "it is healthy. Try:" in done.stdout, done.stdout + done.stderr
    assert f"curl -s -H \"X-API-Key: $KEY\" http://127.0.0.1:{port}/routes" in done.stdout
    config = (folder / CONFIG_PATH).read_text()
    assert version_that_runs(port) == module.VERSION
    done = install(newer_version(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert version_that_runs(port) == "99.0.0" and (folder / CONFIG_PATH).read_text() == config
    assert (tmp_path / "systemctl.log").read_text().splitlines() == [
        "daemon-reload", "enable --quiet lxc_autoscale_api.service",
        "restart lxc_autoscale_api.service"] * 2
    assert not list(folder.rglob("*.old"))


@pytest.mark.parametrize("own", [True, False])
def test_with_tls_the_health_is_asked_for_and_the_printed_line_works(
        installed, host, own, tmp_path):
    """Of the node's own certificate it names the CA, which is itself here."""
    folder, install, port = installed
    pve = tmp_path / "pve"
    (pve / "local").mkdir(parents=True)
    (pve / "pve-root-ca.pem").write_text(CERTIFICATE)
    files = tls_files(pve)
    if own:
        files = {name: str(Path(path).rename(
            pve / "local" / path.replace("/tls.", "/pve-ssl.").rpartition("/")[2]))
                 for name, path in files.items()}
    (folder / CONFIG_PATH).write_text(config_text(host, port, KEY, server=files))
    done = install(pve_dir=pve)
    trust = f"--cacert {pve}/pve-root-ca.pem" if own else "-k"
    line = f'curl -s -H "X-API-Key: $KEY" {trust} https://127.0.0.1:{port}/routes'
    assert done.returncode == 0 and f"  {line}\n" in done.stdout, done.stdout + done.stderr
    if shutil.which("curl"):
        asked = subprocess.run(["sh", "-c", line], capture_output=True, text=True,
                               env={**os.environ, "KEY": KEY})
        assert json.loads(asked.stdout)["status"] == "success"


def test_a_new_configuration_has_the_node_s_own_certificate_if_asked_for(tmp_path):
    (tmp_path / "pve/local").mkdir(parents=True)
    first = install_files(tmp_path, "--tls")
    tree, _ = module.load_yaml((tmp_path / CONFIG_PATH).read_text())
    files = {"tls_certificate": "/etc/pve/local/pve-ssl.pem",
             "tls_key": "/etc/pve/local/pve-ssl.key"}
    sample, _ = module.load_yaml((HERE / "lxc_autoscale_api.yaml").read_text())
    assert first.returncode == 0 and tree["server"] == {**sample["server"], **files}
    assert len(tree["authentication"]["api_key"]) == 64 and "for TLS" not in first.stdout
    for path in tls_files(tmp_path).values():
        Path(path).rename(tmp_path / "pve/local" / Path(path).name.replace("tls.", "pve-ssl."))
    config = tmp_path / CONFIG_PATH
    config.write_text(config.read_text().replace(': "/etc/pve/local', f': "{tmp_path}/pve/local'))
    again = install_files(tmp_path, "--tls")
    assert (again.returncode == 0 and "for TLS" not in again.stdout
            and not (tmp_path / (CONFIG_PATH + ".new")).exists())


def test_to_a_configuration_that_is_kept_tls_is_not_added_but_said(tmp_path):
    install_files(tmp_path)
    before = (tmp_path / CONFIG_PATH).read_text()
    (tmp_path / CONFIG_PATH).write_text(
        before.replace('tls_certificate: ""', "tls_certificate: ''"))
    assert "for TLS, set" in install_files(tmp_path, "--tls").stdout
    (tmp_path / CONFIG_PATH).write_text(before)
    done = install_files(tmp_path, "--tls")
    assert done.returncode == 0 and (tmp_path / CONFIG_PATH).read_text() == before
    assert """for TLS, set these in it under server:, and run: systemctl reload lxc_autoscale_api
  tls_certificate: "/etc/pve/local/pve-ssl.pem"
  tls_key: "/etc/pve/local/pve-ssl.key"
""" in done.stdout


def test_an_upgrade_that_does_not_become_healthy_is_taken_back(installed, tmp_path):
    folder, install, port = installed
    assert install().returncode == 0
    done = install(newer_version(tmp_path, (
        "def serve(server, signals, config_path):\n",
        "def serve(server, signals, config_path):\n    sys.exit(1)\n")), tries=1)
    assert (done.returncode == 1 and "the new version did not become healthy, "
            "and the old one was put back" in done.stderr)
    wait_until(lambda: answers(port))
    assert version_that_runs(port) == module.VERSION
    assert ((folder / MODULE_PATH).read_bytes() == MODULE.read_bytes()
            and not list(folder.rglob("*.old")))


def test_an_upgrade_whose_configuration_does_not_fit_changes_nothing(installed, tmp_path):
    folder, install, port = installed
    assert install().returncode == 0
    done = install(newer_version(tmp_path, (
        '        "port": (5000, integer(1, 65535)),\n',
        '        "ports": (5000, integer(1, 65535)),\n')))
    assert (done.returncode == 1 and "nothing was changed; mend the configuration" in done.stderr
            and f"{folder / CONFIG_PATH}:3:" in done.stderr)
    assert (version_that_runs(port) == module.VERSION
            and (folder / MODULE_PATH).read_bytes() == MODULE.read_bytes())
    assert (tmp_path / "systemctl.log").read_text().count("restart") == 1
    assert install(HERE, "--uninstall").returncode == 0
    wait_until(lambda: not answers(port))


# Where a credential stands, and whether its file can be read here: what only systemd opens is
# taken for granted.
CREDENTIALS = [
    ("unit", "LoadCredential=api_key:/etc/key", True),
    ("drop-in", "  LoadCredential = api_key:/etc/key ", True),
    ("unit", "LoadCredentialEncrypted=api_key:/etc/key", False),
    ("drop-in", "SetCredential=api_key:x", False),
    ("drop-in", "LoadCredential=api_key", False), ("drop-in", "ImportCredential=api*", False)]


def printed_key(done):
    """What the KEY= line of an installation gives a shell."""
    line = next(line for line in done.stdout.splitlines() if line.startswith("  KEY="))
    return subprocess.run(
        ["sh", "-ec", f'{line}; printf %s "$KEY"'], capture_output=True, text=True, check=True,
        env={"PATH": os.environ["PATH"]}).stdout


@pytest.mark.parametrize("place, line, readable", CREDENTIALS)
def test_an_upgrade_keeps_a_key_that_is_a_credential(installed, host, place, line, readable):
    folder, install, port = installed
    unit, drop_in, secret = folder / UNIT_PATH, folder / (UNIT_PATH + ".d"), folder / "etc/key"
    (folder / CONFIG_PATH).write_text(config_text(host, port, None))
    for path, text in (
            (unit, (HERE / unit.name).read_text()), (folder / MODULE_PATH, "old"),
            (secret, "credential-key-0123456789\n"),
            (folder / "run/credentials/lxc_autoscale_api.service/api_key",
             "credential-key-0123456789\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if place == "unit":
        unit.write_text(unit.read_text().replace("[Service]\n", f"[Service]\n{line}\n"))
    else:
        drop_in.mkdir()
        (drop_in / "own.conf").write_text(f"[Service]\n{line}\n")
    before = (unit.read_text(), [(path.name, path.read_text()) for path in drop_in.glob("*")])
    secret.write_text("short\n")
    done = install(tries=1) if readable else None
    assert not done or (done.returncode, done.stderr.splitlines()[-1]) == (
        1, "install.sh: nothing was changed; "
           "mend the configuration and run install.sh again."), done.stderr
    assert before == (
        unit.read_text(), [(path.name, path.read_text()) for path in drop_in.glob("*")])
    secret.write_text("credential-key-0123456789\n")
    done = install()
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed_key(done) == "credential-key-0123456789"
    name = {"unit": "credential.conf", "drop-in": "own.conf"}[place]
    assert [(path.name, path.read_text()) for path in drop_in.glob("*")] == [
        (name, f"[Service]\n{line}\n")]
    assert unit.read_text() == (HERE / unit.name).read_text()


def test_the_printed_line_finds_the_key_however_it_is_written(installed):
    folder, install, port = installed
    done, config = install(), folder / CONFIG_PATH
    text, plain, made = config.read_text(), "plain-key-0123456789", bytecode(folder)
    for written, key in [
            (f'api_key: "{KEY}"', KEY), (f"api_key: '{KEY}'", KEY), (f"api_key: {plain}", plain),
            (f"api_key:   {plain}   # a comment", plain),
            ("api_key: \"k\\x65y-'$(id)'-0123456789\" # a \"comment\"", "key-'$(id)'-0123456789"),
            ("api_key: 'it''s-a-key-0123456789'", "it's-a-key-0123456789"),
            (f'api_keys: ["{plain}", "{KEY}"]', plain),
            (f"api_keys:\n    - {plain}\n    - '{KEY}'", plain), ("enabled: false", "")]:
        config.write_text(text.replace(f'api_key: "{KEY}"', written))
        assert printed_key(done) == key, written
    assert [str(path.relative_to(folder)) for path in folder.rglob("__pycache__/*")] == made


OLD_MODULE, OLD_UNIT = "the really old version\n", (
    "[Service]\nExecStart=/usr/bin/python3 /usr/local/bin/lxc_autoscale_api.py\n"
    "LoadCredential=api_key:/etc/key\n")
KILLER = r"""#!/bin/sh
# Ends the shell that calls it: at its so-many-th call as mv, at a restart as systemctl.
[ "${0##*/} $1" = "systemctl restart" ] && kill -9 $PPID
[ "${0##*/}" = mv ] || exit 0
echo >>"$COUNT"
[ "$(wc -l <"$COUNT")" -lt "$LAST" ] && exec /bin/mv "$@"
kill -9 $PPID
"""


def test_wherever_an_upgrade_is_cut_off_the_next_one_can_put_the_old_version_back(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mv", "systemctl"):
        (tools / name).write_text(KILLER)
        (tools / name).chmod(0o755)
    for last in range(1, 20):
        folder, count = tmp_path / f"host{last}", tmp_path / f"count{last}"
        files = {MODULE_PATH: OLD_MODULE, UNIT_PATH: OLD_UNIT,
                 CONFIG_PATH: f"authentication:\n  api_key: {KEY}\n", "etc/key": KEY}
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        cut = install_files(
            folder, PATH=f"{tools}:{os.environ['PATH']}", COUNT=str(count), LAST=str(last),
            SYSTEMCTL=str(tools / "systemctl"), TMPDIR=str(tmp_path))
        assert cut.returncode == -signal.SIGKILL, cut.stdout + cut.stderr
        again = install_files(folder, SYSTEMCTL="false")
        assert (again.returncode, again.stderr) == (
            1, "install.sh: the new version did not become healthy, and the old one was put back; "
               "see: journalctl -u lxc_autoscale_api\n")
        left = {str(path.relative_to(folder)): path.read_text()
                for path in folder.rglob("*") if path.is_file()}
        left.pop(CONFIG_PATH + ".new", None)
        assert left == files, last
        assert not list(folder.rglob("*.old*"))
        if count.read_text().count("\n") < last:
            break
    assert last > 5                             # the last cut was in the restart, after every file


def test_over_a_unit_that_is_not_ours_a_failed_start_puts_that_one_back(tmp_path):
    folder, systemctl = tmp_path / "root", tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\n[ "$1" != restart ]\n')
    systemctl.chmod(0o755)
    unit, text = folder / UNIT_PATH, (
        "[Service]\n"
        "ExecStart=/usr/bin/python3 /usr/local/bin/lxc_autoscale_api/lxc_autoscale_api.py\n")
    unit.parent.mkdir(parents=True)
    unit.write_text(text)
    done = install(folder, SYSTEMCTL=str(systemctl))
    assert (done.returncode, done.stderr) == (
        1, "install.sh: the new version did not become healthy, and the old one was put back; "
           "see: journalctl -u lxc_autoscale_api\n")
    assert ({path for path in folder.rglob("*") if path.is_file()} == {unit, folder / CONFIG_PATH}
            and unit.read_text() == text)
    assert (tmp_path / "calls").read_text().split("\n")[-4:] == [
        "daemon-reload", "enable --quiet lxc_autoscale_api.service",
        "restart lxc_autoscale_api.service", ""]
    assert install(folder, "--purge", SYSTEMCTL=str(systemctl)).returncode == 0
    assert ([path for path in folder.rglob("*") if path.is_file()] == [unit]
            and "disable" not in (tmp_path / "calls").read_text())


def test_a_flask_service_that_is_put_back_needs_its_configuration_and_that_is_told(tmp_path):
    unit, config = tmp_path / UNIT_PATH, tmp_path / CONFIG_PATH
    for path in (unit, config.with_name(config.name + ".flask")):
        path.parent.mkdir(parents=True)
        path.write_text("[Service]\nExecStart=/usr/bin/gunicorn\n")
    done = install(tmp_path, SYSTEMCTL="false")
    assert (done.returncode, done.stderr) == (
        1, f"the old service needs its configuration: mv {config} {config}.new && "
           f"mv {config}.flask {config} && systemctl restart lxc_autoscale_api\n"
           "install.sh: the new version did not become healthy, and the old one was put back; "
           "see: journalctl -u lxc_autoscale_api\n")


def test_a_first_installation_that_does_not_become_healthy_stays_to_be_looked_at(tmp_path):
    done = install(tmp_path, SYSTEMCTL="false")
    assert (done.returncode, done.stderr) == (
        1, "install.sh: the service does not become healthy; "
           "see: journalctl -u lxc_autoscale_api\n")
    assert (tmp_path / MODULE_PATH).exists() and not list(tmp_path.rglob("*.old*"))


@pytest.mark.parametrize("umask", ["000", "002", "077"])
def test_whatever_the_umask_nothing_that_is_made_is_writable_by_others(tmp_path, umask):
    unit = tmp_path / UNIT_PATH
    unit.parent.mkdir(parents=True, mode=0o755)
    unit.write_text(OLD_UNIT)
    (tmp_path / "etc/key").write_text(KEY)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for changed in (False, True):
        done = subprocess.run(
            ["sh", "-c", f'umask {umask}; exec "$0"', f"{empty_module().name}/install.sh"],
            capture_output=True, text=True, env={**os.environ, "DESTDIR": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        (tmp_path / CONFIG_PATH).write_text(
            (tmp_path / CONFIG_PATH).read_text().replace("port: 5000", "port: 5001"))
    modes = {str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode))[2:]
             for path in tmp_path.rglob("*")}
    assert {name: modes.pop(name) for name in (
            CONFIG_PATH, CONFIG_PATH + ".new", UNIT_PATH, UNIT_PATH + ".d/credential.conf",
            MODULE_PATH, LOGROTATE_PATH)} == {
        CONFIG_PATH: "600", CONFIG_PATH + ".new": "600", UNIT_PATH: "644",
        UNIT_PATH + ".d/credential.conf": "600", MODULE_PATH: "755", LOGROTATE_PATH: "644"}
    modes.pop("etc/key")
    assert modes.pop(bytecode(tmp_path)[0]) == "644"
    assert set(modes.values()) == {"755"}, modes


@pytest.mark.parametrize("change, says", [
    (("import argparse\n", "import argparse_of_a_later_python\n"),
     "ModuleNotFoundError: No module named 'argparse_of_a_later_python'"),
    (("import argparse\n", "import argparse\nmatch = case = 1 +\n"), "SyntaxError: invalid syntax"),
    (("import argparse\n", "import os\nos._exit(3)\n"), "exit status 3")])
@pytest.mark.parametrize("first", [True, False])
def test_a_module_that_cannot_run_here_is_told_as_that(tmp_path, change, says, first):
    folder, source = tmp_path / "root", newer_version(tmp_path, change)
    if not first:
        (folder / CONFIG_PATH).parent.mkdir(parents=True)
        (folder / CONFIG_PATH).write_text("authentication:\n  api_key: wrong\n")
    done = subprocess.run([source / "install.sh"], capture_output=True, text=True,
                          env={**os.environ, "DESTDIR": str(folder)})
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1, f"install.sh: nothing was changed; the new version cannot run here: {says}")
    assert [path for path in folder.rglob("*") if path.is_file()] == (
        [] if first else [folder / CONFIG_PATH])


# The configuration of the Flask service that had this name, as its project ships it, without
# most comments.
FLASK_CONFIG = """\
server:
  host: "0.0.0.0"
  port: 5000
lxc:
  node: "proxmox"
  verify_ssl: false  # Not applicable since we are using local commands
  default_storage: "local-lvm"
  timeout_seconds: 10
  max_retries: 3
rate_limiting:
  enabled: true
  max_requests_per_minute: 120
  time_window_seconds: 60
authentication:
  enabled: false
  api_keys: []
    # Example:
    # - "a1b2c3d4e5f6g7h8i9j0k1l2m3n4o5p6q7r8s9t0u1v2w3x4y5z6"
logging:
  level: "INFO"
  rotate: true
  max_log_size_mb: 100
  backup_count: 5
  log_format: "%(asctime)s - %(name)s - %(levelname)s - %(message)s"
  access_log_file: "access.log"
  error_log_file: "error.log"
error_handling:
  show_stack_traces: false
  notification_recipients:
    # Email address to receive notifications.
    - "your-email@inbox.com"
gunicorn:
  workers: 2
  access_log_file: "/var/log/lxc_autoscale_api_access.log"
  error_log_file: "/var/log/lxc_autoscale_api_error.log"
"""


@pytest.mark.parametrize("document", [
    FLASK_CONFIG, FLASK_CONFIG.replace("\n", "\r\n"), "---\nlxc:\n  node: pve\n",
    "'gunicorn' :\n  workers: 2\n",
    "error_handling: {}\nrate_limiting:\n\tenabled: true\n"])
def test_the_flask_service_s_configuration_is_recognised_and_nothing_changed(tmp_path, document):
    config = tmp_path / CONFIG_PATH
    config.parent.mkdir(parents=True)
    config.write_bytes(document.encode())
    done = install(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    verdict, *steps = done.stderr.splitlines()
    assert verdict.startswith(
        f"install.sh: nothing was changed; {config} is that of lxc_autoscale_ml's Flask service")
    assert steps == [
        f"  1. mv {config} {config}.flask",
        "  2. run install.sh again, which installs a configuration of its own with a new key",
        "  3. carry over host, port, limits and, if it has at least 16 characters, the key; "
        "then: systemctl restart lxc_autoscale_api"]
    log = tmp_path / "var/log/autoscaleapi.log"
    log.parent.mkdir(parents=True)
    log.write_text("its own")
    done = install(tmp_path, "--purge")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", (
        "removed lxc_autoscale_api\n"
        f"left {config} and the logs, which are those of lxc_autoscale_ml's Flask service\n"))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [config, log]
    assert config.read_bytes() == document.encode()


def test_a_configuration_that_is_a_link_to_what_is_not_there_now_stays(tmp_path):
    config = tmp_path / CONFIG_PATH
    config.parent.mkdir(parents=True)
    config.symlink_to("/nowhere/shared.yaml")
    done = install(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", (
        f"install.sh: nothing was changed; {config} is a link to a file that is not there now.\n"))
    assert list(tmp_path.rglob("*.py")) == [] and os.readlink(config) == "/nowhere/shared.yaml"


def test_an_upgrade_keeps_how_the_administrator_has_the_logs_rotated(tmp_path):
    ours = tmp_path / LOGROTATE_PATH
    assert f"installed {ours}\n" in install_files(tmp_path).stdout
    assert f"installed {ours}\n" in install_files(tmp_path).stdout
    ours.write_text(ours.read_text().replace("rotate 8", "rotate 520"))
    changed = ours.read_text()
    assert f"kept {ours}, which was changed\n" in install_files(tmp_path).stdout
    assert ours.read_text() == changed


def test_a_copy_of_the_logrotate_file_names_no_log_and_logs_that_have_moved_stay_named(tmp_path):
    ours = tmp_path / LOGROTATE_PATH
    assert install_files(tmp_path).returncode == 0
    sample = ours.read_text()
    for end in (".bak", "~", ".dpkg-old", ".disabled"):         # which logrotate passes over
        ours.with_name(ours.name + end).write_text(sample)
    for changed in (sample.replace("rotate 8", "rotate 52"),
                    sample.replace(sample.split()[0], "/srv/logs/api.log", 1)):
        ours.write_text(changed)
        done = install_files(tmp_path)
        assert f"kept {ours}, which was changed\n" in done.stdout and "left" not in done.stdout
        assert ours.read_text() == changed


def test_what_is_wrong_with_the_flask_service_s_configuration_is_told_in_one_run(tmp_path):
    code, said = check_config(tmp_path, FLASK_CONFIG)
    assert code == 78
    assert re.findall(r"unknown key '(.*?)'", said) == [
        "lxc", "logging.level", "logging.rotate", "logging.max_log_size_mb", "logging.backup_count",
        "logging.log_format", "logging.access_log_file", "logging.error_log_file",
        "error_handling", "gunicorn"]
    assert said.count("\n") == 10


def test_after_the_three_steps_the_new_daemon_runs_beside_the_old_folder(installed):
    folder, run, port = installed
    old = folder / "usr/local/bin/lxc_autoscale_api/lxc_autoscale_api.py"
    old.parent.mkdir(parents=True)
    old.write_text("raise SystemExit('the Flask service')\n")
    config = folder / CONFIG_PATH
    ours = config.read_text()
    config.write_text(FLASK_CONFIG)
    assert run().returncode == 1
    config.rename(f"{config}.flask")
    config.write_text(ours)                         # what the second step installs, on a free port
    done = run()
    assert done.returncode == 0 and "it is healthy" in done.stdout
    assert printed_key(done) == KEY and old.exists()


# What the Flask service's documentation tells its users to put under /etc/logrotate.d.
FLASK_LOGROTATE = """\
/var/log/autoscaleapi*.log {
    daily
    rotate 7
    postrotate
        systemctl reload lxc_autoscale_api.service > /dev/null 2>&1 || true
    endscript
}
"""


@pytest.mark.parametrize("path, text, left", [
    ("logrotate.d/autoscale", FLASK_LOGROTATE, ["", "_access", "_error"]),
    ("logrotate.d/autoscale", '"/var/log/autoscaleapi.log" /var/log/x.log {\n}\n', [""]),
    ("logrotate.d/zz", "/var/log/x.log\n/var/log/autoscaleapi_*.log\n{\n  daily\n}\n",
     ["_access", "_error"]),
    ("logrotate.conf", "weekly\n/var/log/autoscaleapi_error.log{\n}\n", ["_error"]),
    ("logrotate.d/mine", "'/var/log/autoscaleapi.log' '/var/log/x.log' {\n}\n", [""]),
    ("logrotate.d/other", "# /var/log/autoscaleapi.log {\n/var/log/lxc_autoscale_api.log {\n"
                          "  postrotate\n    rm /var/log/autoscaleapi.log\n  endscript\n}\n", []),
])
def test_no_log_is_named_by_two_logrotate_files(tmp_path, path, text, left):
    tmp_path = tmp_path / "host.rpmbuild"           # above a copy this would be one's name
    other, ours = tmp_path / "etc" / path, tmp_path / LOGROTATE_PATH
    assert install_files(tmp_path).returncode == 0
    other.write_text(text)
    done = install_files(tmp_path)
    said = [
        f"left the rotation of /var/log/autoscaleapi{name}.log to {other}, which names it already"
        for name in left]
    assert (done.returncode == 0
            and [line for line in done.stdout.splitlines() if line.startswith("left")] == said)
    named = re.findall(r"/var/log/\S+", ours.read_text()) if ours.exists() else []
    assert named == [f"/var/log/autoscaleapi{name}.log"
                     for name in ("", "_access", "_error") if name not in left]
    assert other.read_text() == text


def test_an_uninstallation_keeps_what_is_the_administrators_and_a_purge_does_not(tmp_path):
    install_files(tmp_path)
    log = tmp_path / "var/log/autoscaleapi.log"
    log.parent.mkdir(parents=True)
    log.write_text("x")
    (tmp_path / (MODULE_PATH + ".old")).write_text("left by an installation that was cut short")
    sockets = tmp_path / "run/lxc_autoscale_api"
    sockets.mkdir(parents=True)
    assert install_files(tmp_path, "--uninstall").returncode == 0
    assert not list(tmp_path.rglob("*.old")) and not sockets.exists()
    assert [path for path in (MODULE_PATH, UNIT_PATH, LOGROTATE_PATH, CONFIG_PATH)
            if (tmp_path / path).exists()] == [CONFIG_PATH]
    assert log.exists()
    assert install_files(tmp_path, "--purge").returncode == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_purge_removes_the_logs_and_nothing_that_only_looks_like_one(tmp_path):
    names = [f"autoscaleapi{which}.log{end}" for which in ("", "_access", "_error") for end in (
        "", ".1", ".12", ".2.gz", ".3.xz", "-20241224", "-20241224.gz",
        "-2024122417", "-2024122417.zst")]
    others = [
        "autoscaleapi.log.keep", "autoscaleapi.log.1.keep", "autoscaleapi.log.gz",
        "autoscaleapi.log-notes", "autoscaleapi.log-2024", "autoscaleapi.logs",
        "autoscaleapi_other.log", "autoscaleapixlog", "my_autoscaleapi.log",
        "autoscaleapi.log.bak/1", "autoscaleapi.log.4/1", "autoscaleapi.log-20241225/1",
        "old/autoscaleapi.log", "autoscaleapi.log.1 copy", "autoscaleapi.log.1\n2"]
    for name in names + others:
        (tmp_path / "var/log" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "var/log" / name).write_text("x")
    (tmp_path / "var/log/autoscaleapi.log.9").symlink_to("autoscaleapi.log.keep")
    assert install(tmp_path, "--purge").returncode == 0
    assert sorted(str(path.relative_to(tmp_path / "var/log"))
                  for path in tmp_path.rglob("*")
                  if not path.is_dir() or path.is_symlink()) == sorted(others)


@pytest.mark.parametrize("option, says", [
    ("--uninstall", "removed lxc_autoscale_api\n"
                    "kept {}/etc/lxc_autoscale_ml/lxc_autoscale_api.yaml "
                    "and the logs (--purge removes these too)\n"),
    ("--purge", "removed lxc_autoscale_api\nremoved its configuration and logs\n")])
@pytest.mark.parametrize("systemctl", ["", "false", "/nowhere/systemctl"])
def test_an_uninstallation_over_nothing_works(tmp_path, option, says, systemctl):
    done = install(tmp_path, option, SYSTEMCTL=systemctl)
    assert (done.returncode, done.stdout, done.stderr) == (0, says.format(tmp_path), "")
    assert list(tmp_path.iterdir()) == []


def test_an_installation_without_what_it_needs_changes_nothing(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "dirname", "id", "cat", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    source, more = newer_version(tmp_path), tmp_path / "sbin"
    unit, script = source / "lxc_autoscale_api.service", source / "install.sh"
    unit.write_text(unit.read_text().replace("/usr/bin/python3 ", "/nowhere/python3 "))
    assert "PATH=$PATH:/usr/sbin:/sbin " in script.read_text()
    script.write_text(script.read_text().replace(":/usr/sbin:/sbin ", f":{more} "))
    for pct in (" pct-(this-must-be-a-Proxmox-VE-host)", ""):
        done = subprocess.run([script], capture_output=True, text=True, env={"PATH": str(tools)})
        assert (done.returncode, done.stderr) == (
            1, "install.sh: nothing was changed; missing: Python-3.9-or-later-as-/nowhere/python3"
               f"{'' if os.getuid() == 0 else ' root-rights'}{pct} systemctl\n")
        more.mkdir(exist_ok=True)
        (more / "pct").write_text("")
        (more / "pct").chmod(0o755)
    assert (install(tmp_path, "--what").stderr
            == "install.sh: unknown option '--what'; known: --tls, --uninstall, --purge\n")
    assert not (tmp_path / "usr").exists()


def test_the_shipped_logrotate_file_names_the_shipped_logs(tmp_path):
    install_files(tmp_path)
    defaults = [default for key, (default, _) in module.SETTINGS["logging"].items()
                if key != "log_level"]
    assert (tmp_path / LOGROTATE_PATH).read_text().splitlines()[0].split() == [*defaults, "{"]


EXEC_START = ("/usr/bin/python3 -Ic \"import sys; del sys.argv[0]; "
              "sys.path.append('/usr/local/bin'); from lxc_autoscale_api import main; "
              "sys.exit(main())\" "
              "/usr/local/bin/lxc_autoscale_api.py")
# Every directive of the unit, with what makes sure that it cannot stand in a command's way. What
# is not here must not be there: most of what systemd offers reaches pct, and through it storage
# tools and hook scripts.
DIRECTIVES = {
    "Description": "a name",
    "After": "pve-cluster.service network-online.target: when the daemon starts; "
             "not pve-guests.service, whose containers may take long",
    "Wants": "network-online.target: the same",
    "StartLimitIntervalSec": "0: when the daemon starts again",
    "Type": "notify: how the daemon tells that it is there",
    "ExecStart": EXEC_START + ": the daemon",
    "ExecReload": "/bin/kill -HUP $MAINPID: a signal to the daemon alone",
    "Restart": "on-failure: when the daemon starts again",
    "RestartSec": "5: the same; five starts in ten seconds, systemd's own limit, are never reached",
    "RestartPreventExitStatus": "78: the same",
    "WatchdogSec": "60: ends the daemon alone, by KillMode",
    "Environment": "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin: "
                   "where commands are; root's own PATH",
    "KillMode": "process: lets commands go on when the daemon stops",
    "TimeoutStopSec": "45: ends the daemon alone, by KillMode",
    "LimitCORE": "0:infinity: the soft limit is the kernel's default, which root's shell has, too",
    "LimitNOFILE": "32768:524288: more than systemd's default of 1024, and as far as its 524288",
    "TasksMax": "infinity: takes a limit away",
    "OOMPolicy": "continue: keeps a killed command from ending the daemon",
    "KeyringMode": "shared: opens root's keyring to commands",
    "WantedBy": "multi-user.target: when the daemon starts"}


def test_the_unit_holds_nothing_that_could_stand_in_a_command_s_way():
    lines = (HERE / "lxc_autoscale_api.service").read_text().splitlines()
    given = [line.partition("=")[::2] for line in lines if line and line[0] not in "[#"]
    assert [name for name, _ in given] == list(DIRECTIVES)
    for name, value in given[1:]:
        assert DIRECTIVES[name].startswith(f"{value}: "), name


def test_the_unit_is_accepted_by_systemd(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    (tmp_path / "lxc_autoscale_api.service").write_text(
        (HERE / "lxc_autoscale_api.service").read_text().replace(
            "ExecStart=/usr/bin/python3 ", "ExecStart=/bin/true "))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "lxc_autoscale_api.service")],
        capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_install_sh_is_accepted_by_shells_and_shellcheck():
    for command in (["sh", "-n"], ["bash", "-n"], ["shellcheck"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(HERE / "install.sh")],
                                  capture_output=True, text=True)
            assert (done.returncode, done.stdout) == (0, "")


# The README

VARIES = [
    (r'"[0-9a-f]{16}"', '"ID"'), (r"with key [0-9a-f]{8}", "with key FINGERPRINT"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"), (r"answered in [\d.]+ s", "answered in SECONDS"),
    (r'"cpu_usage": [\d.]+', '"cpu_usage": PERCENT'),
    (r'"uptime": \d{1,4}(?=[,}])', '"uptime": SECONDS'), (r'"max": \d+', '"max": HOST')]


def steadied(text):
    for pattern, word in VARIES:
        text = re.sub(pattern, word, text)
    return text.rstrip("\n")


def test_every_curl_of_the_readme_answers_as_printed(launch, host):
    host.path(106).unlink()
    host.add(106, "db-01", running=True, cores=4, memory=8192)
    host.add(107, "batch", cores=None)
    api, block = launch(constants=host.as_node()), re.search(
        r"```console\n(\$ curl.*?)```", README, re.DOTALL)[1]
    examples = re.findall(r"^\$ (curl .*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    paths = {re.search(r"127\.0\.0\.1:5000(/[a-z/.]+)", command)[1] for command, _ in examples}
    assert paths == {route.path for route in module.ROUTES}
    for command, answer in examples:
        done = subprocess.run(
            ["bash", "-c", command.replace("127.0.0.1:5000", f"127.0.0.1:{api.port}")],
            capture_output=True, text=True, env={**os.environ, "KEY": KEY})
        assert steadied(done.stdout) == steadied(answer), command


def test_the_readme_lists_the_endpoints_and_settings_that_there_are():
    rows = re.findall(r"^\| (GET|POST|DELETE) \| `(\S+)` \| (.*?)\| (.*) \|$", README, re.MULTILINE)
    assert [(method, path, re.findall(r"`(\w+)`", names), summary)
            for method, path, names, summary in rows] == [
        (route.method, route.path, [parameter.name for parameter in route.parameters],
         route.summary) for route in module.ROUTES]
    settings = re.findall(r"^\| `(\w+\.\w+)` \|", README, re.MULTILINE)
    assert settings == [f"{section}.{key}"
                        for section, keys in module.SETTINGS.items() for key in keys]


def test_the_readme_has_each_parameter_s_rule():
    table = re.search(r"^\| Parameter \| Must be \|\n.*\n((?:\|.*\n)*)", README, re.MULTILINE)[1]
    rules = {name: "must be " + rule
             for names, rule in re.findall(r"^\| (.*) \| (.*) \|$", table, re.MULTILINE)
             for name in re.findall(r"`(\w+)`", names)}
    assert rules == {parameter.name: parameter.rule
                     for route in module.ROUTES for parameter in route.parameters}


def test_no_line_of_the_readme_s_prose_is_too_long():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert [line for line in prose.splitlines()
            if len(line) > 100 and not line.startswith("|")] == []


def test_the_readme_s_shell_client_grows_a_disk_once(launch, host):
    api = launch(constants={"MAX_OPERATIONS": 1})   # so that a second change at once is refused
    host.faults(set={"delay": True})
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(api.post, "/scale/cores", {"vm_id": 106, "cores": 3})
        wait_until(host.calls)
        script = readme_block("sh", "api() {").replace(
            "sleep 5", f"touch {host.root}/go; sleep 0.2")
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True,
                              env={**os.environ, "KEY": KEY, "URL": f"http://127.0.0.1:{api.port}"})
        assert other.result().status == 200
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[0] == error(
        "Nothing was done: Too many changes wait; try again later", outcome="nothing_done")
    assert (answers[-1] == ok("Storage increased by 5 GB for VM 104") and done.stderr == ""
            and host.conf(104)["rootfs"].endswith("size=13G"))


def test_the_readme_s_shell_client_takes_no_silence_for_a_success(api, host):
    script = readme_block("sh", "api() {").replace("sleep 5", ":")
    dies = script.replace("now=$(size)", f"kill {api.process.pid}; while curl -so /dev/null $URL/; "
                          "do sleep 0.05; done; now=$(size)")
    host.faults(resize={"work_fails": "odd"})
    for commands, says in ((dies, "not grown, as far as is known\n"),
                           (script, "bash: line 5: before: is not known\n")):
        done = subprocess.run(["bash", "-c", commands], capture_output=True, text=True,
                              timeout=60,
                              env={**os.environ, "KEY": KEY, "URL": f"http://127.0.0.1:{api.port}"})
        assert done.stderr == says


def test_the_readme_s_python_client_waits_tries_again_and_gives_up(launch, host):
    api = launch(proxmox={"change_timeout_seconds": 1})
    names = {"URL": f"http://127.0.0.1:{api.port}", "KEY": KEY}
    exec(readme_block("python", "import http.client, json, time").replace(
        "time.sleep(5)", "open(GO, 'w').close()"), names)
    names["GO"] = f"{host.root}/go"
    host.faults(set={"delay": True})
    assert names["change"]("POST", "/scale/cores", {"vm_id": 104, "cores": 5}) is True
    assert host.calls() == ["pct set 104 --cores 5"] and host.conf(104)["cores"] == "5"
    host.faults(set={"work_fails": "something odd"})
    assert names["change"]("POST", "/scale/cores", {"vm_id": 104, "cores": 6}) is False
    assert host.calls() == ["pct set 104 --cores 5", "pct set 104 --cores 6"]
    # of what goes on, an answer may be missing for a while
    runs = {"status": "error", "outcome": "running", "operation": "x"}, None
    told = [runs, ({"status": "error", "error": "Rate limit exceeded"}, "1"),
            ConnectionResetError(), http.client.RemoteDisconnected(), ValueError("a proxy's page"),
            ({"data": [{"state": "running"}]}, None), ({"data": [{"state": "done"}]}, None)]

    def ask(*_):
        if isinstance(told[0], Exception):
            raise told.pop(0)
        return told.pop(0)
    names["ask"] = ask
    assert names["change"]("POST", "/scale/cores", {}) is True and told == []
    told += [runs, ({"status": "error", "error": "Missing or invalid API key"}, None)]
    assert names["change"]("POST", "/scale/cores", {}) is False and told == []
    told += [runs, ({"data": []}, None)]                # after a restart it is not known any more
    assert names["change"]("POST", "/scale/cores", {}) is False and told == []


def recipe(text, api, folder):
    """A recipe with the daemon's address in place of the README's, and its files in a folder."""
    for given, here in (("http://proxmox.example.com:5000", f"http://127.0.0.1:{api.port}"),
                        ("http://127.0.0.1:5000", f"http://127.0.0.1:{api.port}"),
                        ("/usr/local/sbin/", f"{folder}/"), ("/root/", f"{folder}/")):
        text = text.replace(given, here)
    return text


def run_recipe(text, api, folder):
    """Run a recipe's lines in the shells that there are on a Proxmox host
    -> what was printed, line by line."""
    lines = recipe(readme_block("sh", "(umask 077"), api, folder) + recipe(text, api, folder)
    done = subprocess.run(["sh", "-c", lines], capture_output=True, text=True,
                          env={**os.environ, "KEY": KEY})
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def add_snapshots(host, vm_id, **sections):
    """Write snapshots into a container's configuration,
    each taken a second after the one before."""
    text = "".join(f"\n[{name}]\n{comment}snaptime: {second}\n"
                   for second, (name, comment) in enumerate(sections.items(), 1700000000))
    host.path(vm_id).write_text(host.path(vm_id).read_text() + text)


def unit(kind):
    """The README's template unit of a kind, service or timer."""
    return readme_block("ini", {"service": "[Unit]\nDescription=Snapshot of",
                                "timer": "[Unit]\nDescription=Nightly"}[kind])


def test_the_readme_s_nightly_snapshot_keeps_the_last_seven_of_its_own(api, host, tmp_path):
    own = {f"auto_{day}": "" for day in range(8)}
    add_snapshots(host, 104, auto_broken="snapstate: prepare\n",
                  by_hand='#{"name": "auto_x", "state": null}\n', **own, last="")
    assert run_recipe(readme_block("sh", "cat >/usr/local/sbin/lxc_snapshot"), api, tmp_path) == []
    assert stat.S_IMODE((tmp_path / "api_key.header").stat().st_mode) == 0o600
    command = recipe(re.search("^ExecStart=(.*)$", unit("service"), re.MULTILINE)[1],
                     api, tmp_path).replace("%i", "104")
    done = subprocess.run(shlex.split(command), capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"]})
    assert (done.returncode, done.stderr) == (0, "")
    taken = next(name for name in host.snapshots(104) if re.fullmatch(r"auto_\d{8}_\d{6}", name))
    assert [json.loads(line)["message"] for line in done.stdout.splitlines()] == [
        f"Snapshot '{taken}' created for VM 104", "Snapshot 'auto_0' of VM 104 deleted",
        "Snapshot 'auto_1' of VM 104 deleted"]
    assert host.snapshots(104) == ["auto_broken", "by_hand", *list(own)[2:], "last", taken]


def test_the_readme_s_nightly_snapshot_keeps_the_new_one_though_the_clock_was_ahead(
        api, host, tmp_path):
    own = {f"auto_{day}": "" for day in range(7)}
    add_snapshots(host, 104, **own)
    host.path(104).write_text(
        re.sub("snaptime: 17", f"snaptime: {int(time.time()) // 10 ** 8 + 1}",
               host.path(104).read_text()))
    run_recipe(readme_block("sh", "cat >/usr/local/sbin/lxc_snapshot"), api, tmp_path)
    done = subprocess.run([tmp_path / "lxc_snapshot", "104"], capture_output=True, text=True)
    assert done.returncode == 0
    assert host.snapshots(104)[:-1] == list(own)[1:]
    assert re.fullmatch(r"auto_\d{8}_\d{6}", host.snapshots(104)[-1])


def test_the_readme_s_nightly_snapshot_deletes_nothing_if_the_new_one_fails(api, host, tmp_path):
    own = {f"auto_{day}": "" for day in range(9)}
    add_snapshots(host, 104, **own)
    host.faults(snapshot={"work_fails": "something odd"})
    run_recipe(readme_block("sh", "cat >/usr/local/sbin/lxc_snapshot"), api, tmp_path)
    done = subprocess.run([tmp_path / "lxc_snapshot", "104"], capture_output=True, text=True)
    assert done.returncode != 0 and "500" in done.stderr
    assert host.snapshots(104) == list(own)


def test_the_readme_s_units_are_accepted_by_systemd(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    for kind in ("service", "timer"):
        text = unit(kind).replace("/usr/local/sbin/lxc_snapshot", "/bin/true")
        (tmp_path / f"lxc_snapshot@.{kind}").write_text(text)
        (tmp_path / f"lxc_snapshot@104.{kind}").symlink_to(f"lxc_snapshot@.{kind}")
    for kind in ("service", "timer"):
        done = subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / f"lxc_snapshot@104.{kind}")],
            capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    when = re.search("^OnCalendar=(.*)$", unit("timer"), re.MULTILINE)[1]
    done = subprocess.run(["systemd-analyze", "calendar", when], capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"Normalized form: \*-\*-\* 02:30:00", done.stdout)


def test_the_readme_s_shell_scales_out_and_in(api, host, tmp_path):
    host.path(104).unlink()
    host.add(104, "web-01", net0="name=eth0,bridge=vmbr0,gw=192.0.2.1,hwaddr=BC:24:11:00:00:04,"
                                 "ip=192.0.2.51/24,type=veth")
    define = readme_block("sh", "url=")
    assert run_recipe(define, api, tmp_path) == [
        ok("Cloned VM 104 to new VM 105 (web-02)", {"vm_id": 105, "started": True})]
    assert host.running(105) and "ip=192.0.2.52/24" in host.conf(105)["net0"]
    functions = define[:define.rindex("scale_out 105")]
    assert run_recipe(functions + readme_block("sh", "scale_in"), api, tmp_path) == [
        ok("Shut down VM 105"), ok("Deleted VM 105")]
    assert not host.path(105).exists() and host.path(104).exists()


def readme_yaml(start, api):
    """A YAML recipe -> its value; `!secret` is how Home Assistant's files name
    what stands in another file."""
    yaml = pytest.importorskip("yaml")

    class Loader(yaml.SafeLoader):
        pass
    Loader.add_constructor("!secret", lambda loader, node: {"lxc_api_key": KEY}[node.value])
    return yaml.load(recipe(readme_block("yaml", start), api, "/nowhere"), Loader)


def rendered(value, **names):
    """A value of a recipe with the simple Jinja expressions in its texts filled in."""
    if isinstance(value, dict):
        return {key: rendered(each, **names) for key, each in value.items()}
    return (re.sub(r"\{\{ (.*?) \}\}", lambda found: str(names[found[1]]), value)
            if isinstance(value, str) else value)


def test_the_readme_s_home_assistant_commands_are_taken(api, host):
    commands = readme_yaml("rest_command:", api)["rest_command"]
    assert list(commands) == ["lxc_power", "lxc_cores"]
    for name, data in (("lxc_cores", {"vm_id": 104, "cores": 3}),
                       ("lxc_power", {"vm_id": 104, "action": "shutdown"})):
        command = rendered(commands[name], **data)
        path = command["url"].partition(f":{api.port}")[2]
        headers = {**command["headers"], "Content-Type": command["content_type"]}
        reply = api.request(command["method"].upper(), path, command["payload"], headers, key=None)
        assert (reply.status, reply.body["status"]) == (202, "accepted")
        wait_until(lambda: operations(api, f"?id={reply.body['operation']}")[0]["state"] == "done")
    assert host.conf(104)["cores"] == "3" and not host.running(104)


def test_the_readme_s_ansible_tasks_are_answered_with_the_codes_that_they_expect(api, host):
    play, = readme_yaml("- hosts: localhost", api)
    names = {"api": play["vars"]["api"], "key": KEY}
    defaults = play["module_defaults"]["ansible.builtin.uri"]
    codes = []
    for task in play["tasks"] * 2:
        uri = rendered({**defaults, **task["ansible.builtin.uri"]}, **names)
        assert uri["body_format"] == "json" and uri["timeout"] > 3600       # a long change's time
        reply = api.request(uri["method"], uri["url"].partition(f":{api.port}")[2],
                            uri["body"], uri["headers"], key=None)
        assert reply.status in uri.get("status_code", [200]), (task["name"], reply)
        codes.append(reply.status)
    assert codes == [404, 200, 200] + [200, 200, 200]
    assert host.snapshots(104) == ["before_upgrade"] and host.conf(104)["memory"] == "4096"


def test_the_demo_takes_no_other_program_for_its_own(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = subprocess.run([sys.executable, HERE / "test_api.py", "--demo", str(port)],
                              capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", (
        f"Something listens on port {port} already; try: python3 test_api.py --demo 5001\n"))


def test_the_demo_starts_prints_its_key_and_stops(tmp_path):
    demo = subprocess.Popen(
        [sys.executable, HERE / "test_api.py", "--demo", str(free_port())],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        lines = [demo.stdout.readline() for _ in range(20)]
        key = next(line for line in lines if line.startswith("KEY="))[4:].strip()
        command = next(line for line in lines if "resource/vm/config" in line)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                              env={**os.environ, "KEY": key})
        assert json.loads(done.stdout)["data"]["hostname"] == "web-01"
    finally:
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=15)
    assert demo.returncode == 0 and list(tmp_path.iterdir()) == []


def test_the_readme_s_prometheus_rules_are_accepted(tmp_path):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    rules, = (block for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
              if block.startswith("groups:"))
    (tmp_path / "rules.yml").write_text(rules)
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def readme_queries():
    """Each query of the README: those that answer questions, the panels' and the alerts'."""
    questions = [line for line in readme_block("promql", "#").splitlines()
                 if not line.startswith("#")]
    alerts = re.findall(r"^ +expr: (.*)$", readme_block("yaml", "groups:"), re.MULTILINE)
    return questions + [
        target["expr"] for panel in panels() for target in panel["targets"]] + alerts


def test_the_readme_s_queries_ask_for_metrics_that_there_are():
    names = {name for query in readme_queries()
             for name in re.findall(r"\blxc_autoscale_\w+", re.sub('"[^"]*"', "", query))}
    kept = {re.sub("_(bucket|sum|count)$", "", name) if name not in module.FAMILIES else name
            for name in names}
    assert kept and kept - set(module.FAMILIES) == set()


def test_the_readme_s_queries_are_accepted_by_promtool(tmp_path):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed")
    rules = [{"record": f"query_{number}", "expr": query}
             for number, query in enumerate(readme_queries())]
    (tmp_path / "rules.yml").write_text(
        json.dumps({"groups": [{"name": "readme", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(rules)} rules found" in done.stdout, (
        done.stdout + done.stderr)
