"""The tests of lxc_autoscale_api, and a simulated Proxmox host to run it on.

    pytest test_api.py                  # needs pytest, and nothing of Proxmox
    python3 test_api.py --demo          # the daemon on 127.0.0.1:5000 with a simulated host; needs only Python
"""
import contextlib
import json
import os
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
import fcntl, json, os, re, signal, sys, time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(sys.argv[0])))
NODE = "proxmox"
CONF = ROOT + "/pve/nodes/" + NODE + "/lxc/%s.conf"
ARGV = [os.path.basename(sys.argv[0])] + sys.argv[1:]


def note(**row):
    with open(ROOT + "/calls.jsonl", "a") as file:
        file.write(json.dumps(dict(row, argv=ARGV, pid=os.getpid(), at=time.time())) + "\n")


class Refused(Exception):
    def __init__(self, text, code=255):
        self.text, self.code = text, code


def refuse_parameter(name, text, usage):
    raise Refused("400 Parameter verification failed.\n%s: %s\n\npct %s [OPTIONS]" % (name, text, usage), 2)


# Configuration files: key: value lines, '#' lines, [pve:pending], a section for each snapshot

def load(vm_id, code=2):
    try:
        text = open(CONF % vm_id).read()
    except OSError:
        raise Refused("Configuration file 'nodes/%s/lxc/%s.conf' does not exist" % (NODE, vm_id), code)
    conf = section = {}
    sections = {}
    for line in text.split("\n"):
        header = re.match(r"\[(.+)\]$", line)
        if header:
            section = sections.setdefault(header.group(1), {})
        elif line.startswith("#"):
            section["#"] = section.get("#", "") + line + "\n"
        elif ": " in line:
            key, _, value = line.partition(": ")
            section[key] = value
    return conf, sections


def save(vm_id, conf, sections):
    def lines(values):
        return values.get("#", "") + "".join("%s: %s\n" % (k, values[k]) for k in sorted(values) if k != "#")
    text = lines(conf) + "".join("\n[%s]\n%s" % (name, lines(values)) for name, values in sections.items())
    with open(CONF % vm_id + ".tmp.%d" % os.getpid(), "w") as file:
        file.write(text)
    os.rename(file.name, CONF % vm_id)
    update_vmlist()


def update_vmlist():
    path = ROOT + "/pve/.vmlist"
    known = json.load(open(path))
    ids = {k: v for k, v in known["ids"].items() if v["type"] != "lxc"}
    for name in os.listdir(os.path.dirname(CONF)):
        if name.endswith(".conf"):
            ids[name[:-5]] = {"node": NODE, "type": "lxc", "version": 1}
    with open(path + ".tmp.%d" % os.getpid(), "w") as file:
        json.dump({"version": known["version"] + 1, "ids": ids}, file)
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
                                  % re.search(r"(\d+)\.lock", self.path).group(1))
                time.sleep(0.005)

    def __exit__(self, *_):
        self.file.close()


def check_lock(conf):
    if "lock" in conf:
        raise Refused("CT is locked (%s)" % conf["lock"])


class lock_mark:
    """`lock: reason` in the configuration for the time of a long task."""

    def __init__(self, vm_id, reason):
        self.vm_id, self.reason = vm_id, reason

    def __enter__(self):
        with config_lock(self.vm_id):
            conf, sections = load(self.vm_id, 255)
            check_lock(conf)
            conf["lock"] = self.reason
            save(self.vm_id, conf, sections)

    def __exit__(self, *_):
        with config_lock(self.vm_id):
            conf, sections = load(self.vm_id, 255)
            conf.pop("lock", None)
            save(self.vm_id, conf, sections)


def running(vm_id):
    return os.path.isdir(ROOT + "/cgroup/lxc/%s" % vm_id)


def start(vm_id):
    if running(vm_id):
        raise Refused("CT %s already running" % vm_id)
    folder = ROOT + "/cgroup/lxc/%s" % vm_id
    os.makedirs(folder + ".new/ns/init.scope")
    values = {"cpu.stat": "usage_usec 5000000\nuser_usec 4000000\nsystem_usec 1000000\n", "cpu.max": "max 100000\n",
              "memory.current": "734003200\n", "memory.stat": "anon 524288000\nfile 209715200\n",
              "memory.swap.current": "0\n", "memory.max": "2147483648\n", "pids.current": "42\n",
              "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
              "io.stat": "253:1 rbytes=1048576 wbytes=2097152 rios=10 wios=20 dbytes=0 dios=0\n",
              "ns/init.scope/cgroup.procs": ""}
    for name, text in values.items():
        with open(folder + ".new/" + name, "w") as file:
            file.write(text)
    os.rename(folder + ".new", folder)


def stop(vm_id):
    if not running(vm_id):
        raise Refused("CT %s not running" % vm_id)
    os.rename(ROOT + "/cgroup/lxc/%s" % vm_id, ROOT + "/trash/%s.%d" % (vm_id, time.time_ns()))


def gigabytes(rootfs):
    size = re.search(r"size=(\d+)([MGT])", rootfs)
    return int(size.group(1)) * {"M": 1 / 1024, "G": 1, "T": 1024}[size.group(2)]


def task(work, code_of_failure=255):
    """Run work() in a worker with its own session, copy its output, pass signals on, as a PVE task does."""
    def run(write_end):
        os.setsid()
        os.dup2(write_end, 1)
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
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
    return code_of_failure if os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) else 0


def say(*lines):
    print(*lines, sep="\n", flush=True)


def dawdle():
    """The command's work takes this long; in the middle of it a fault may strike."""
    fault = FAULTS.get(ARGV[1], {})
    time.sleep(fault.get("delay", 0))
    if "work_fails" in fault:
        raise Refused(fault["work_fails"])


def options_of(words):
    """[104, --cores, 4] -> ([104], {cores: 4}); an argument that starts with - is an option wherever it stands."""
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
    ids = sorted(int(name[:-5]) for name in os.listdir(os.path.dirname(CONF)) if name.endswith(".conf"))
    if ids:
        print("%-10s %-10s %-12s %-20s" % ("VMID", "Status", "Lock", "Name"))
    for vm_id in ids:
        conf, _ = load(vm_id)
        print("%-10s %-10s %-12s %-20s" % (vm_id, "running" if running(vm_id) else "stopped", conf.get("lock", ""), conf.get("hostname", "")))


def pct_status(vm_id, verbose=None):
    conf, _ = load(vm_id)
    up = running(vm_id)
    if verbose is None:
        return print("status: " + ("running" if up else "stopped"))
    values = {"cpus": conf.get("cores", os.cpu_count()), "disk": 0, "diskread": 0, "diskwrite": 0,
              "maxdisk": int(gigabytes(conf["rootfs"]) * 2**30), "maxmem": int(conf.get("memory", 512)) * 2**20,
              "maxswap": int(conf.get("swap", 512)) * 2**20, "mem": 0, "name": conf.get("hostname", "CT" + vm_id), "netin": 0,
              "netout": 0, "status": "running" if up else "stopped", "swap": 0, "type": "lxc", "uptime": 0, "vmid": vm_id}
    if "lock" in conf:
        values["lock"] = conf["lock"]
    if up:
        values.update(disk=1288490189, diskread=1048576, diskwrite=2097152, mem=524288000, netin=12345, netout=67890, pid=4321,
                      uptime=int(time.time() - os.stat(ROOT + "/cgroup/lxc/" + vm_id).st_ctime) + 3600)
        with open(ROOT + "/cgroup/lxc/%s/cpu.stat" % vm_id, "r+") as file:      # time passes, and it computes
            used = int(file.readline().split()[1]) + 20000
            file.seek(0)
            file.write("usage_usec %d\nuser_usec 4000000\nsystem_usec 1000000\n" % used)
    for key in sorted(values):
        print("%s: %s" % (key, values[key]))


def pct_config(vm_id):
    conf, sections = load(vm_id)
    pending = sections.get("pve:pending", {})
    for key in re.split(r"[,; ]+", pending.get("delete", "")):
        conf.pop(key, None)
    conf.update({key: value for key, value in pending.items() if key != "delete"})
    if "#" in conf:
        conf["description"] = conf.pop("#").replace("#", "").replace("\n", "%0A")
    for key in sorted(conf):
        print("%s: %s" % (key, conf[key]))


DNS_NAME = r"(?=.{1,255}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$"


def check_hostname(options, usage):
    if "hostname" in options and not re.match(DNS_NAME, options["hostname"]):
        refuse_parameter("hostname", "invalid format - value does not look like a valid DNS name\n", usage)


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
    amount = re.match(r"(\+?)(\d+)([MGT]?)$", size)
    wanted = int(amount.group(2)) * {"M": 1 / 1024, "G": 1, "T": 1024}[amount.group(3)]
    if not amount.group(1) and wanted < gigabytes(conf[disk]):
        raise Refused("unable to shrink disk size")

    def work():
        with config_lock(vm_id):
            conf, sections = load(vm_id)
            dawdle()
            total = int(gigabytes(conf[disk]) * bool(amount.group(1)) + wanted)
            if total >= 16 * 2**20 * 1024:
                say("  Size is too big (>=16EiB).")
                raise Refused("error resizing volume '/dev/pve/vm-%s-disk-0':   Error during parsing of command line." % vm_id)
            say("  Size of logical volume pve/vm-%s-disk-0 changed to %d.00 GiB." % (vm_id, total),
                "  WARNING: You have not turned on protection against thin pools running out of space.",
                "  Logical volume pve/vm-%s-disk-0 successfully resized." % vm_id)
            conf[disk] = re.sub(r"size=\w+", "size=%dG" % total, conf[disk])
            save(vm_id, conf, sections)
            if total > 16384:
                say("resize2fs: New size results in too many block group descriptors.", "",
                    "Failed to update the container's filesystem: command 'resize2fs /dev/pve/vm-%s-disk-0' failed: exit code 1" % vm_id)
    return task(work, code_of_failure=0)            # its command definition has no exit handler


def check_snapshot_name(name, usage):
    if not re.match(r"[A-Za-z][A-Za-z0-9_-]+$", name):
        refuse_parameter("snapname", "invalid format - invalid configuration ID '%s'\n" % name, usage)
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
            dawdle()
            say('  Logical volume "snap_vm-%s-disk-0_%s" created.' % (vm_id, name))
            with config_lock(vm_id):
                conf, sections = load(vm_id)
                taken = {k: v for k, v in conf.items() if k not in ("lock", "#")}
                taken["snaptime"] = str(int(time.time()))
                if description:
                    taken["#"] = "".join("#%s\n" % line.replace(":", "%3A") for line in description.split("\n"))
                sections[name] = taken
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
                re.sub("%3A", ":", values.get("#", "#no-description\n").split("\n")[0][1:])
            when = "" if name == "current" else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(taken))
            print("%s %-*s %-23s %s" % (head, 30 - len(head), name, when, text))
            if name != "current":
                show(name, indent + 1)
    show(None, 0)


def pct_delsnapshot(vm_id, name):
    def work():
        conf, sections = load(vm_id, 255)
        if name not in sections:
            raise Refused("snapshot '%s' does not exist" % name)
        with lock_mark(vm_id, "snapshot-delete"):
            dawdle()
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
        with lock_mark(vm_id, "rollback"):
            if running(vm_id):
                stop(vm_id)
            dawdle()
            say('  Logical volume "vm-%s-disk-0" successfully removed.' % vm_id)
            with config_lock(vm_id):
                conf, sections = load(vm_id)
                back = {k: v for k, v in sections[name].items() if k not in ("snaptime", "parent", "#")}
                save(vm_id, dict(back, parent=name, lock="rollback"), sections)
        if start == "1":
            globals()["start"](vm_id)
    return task(work)


def pct_clone(vm_id, new_id, hostname=None, snapname=None, full=None):
    check_hostname({"hostname": hostname} if hostname else {}, "clone <vmid> <newid>")

    def work():
        conf, sections = load(vm_id, 255)
        check_lock(conf)
        taken = json.load(open(ROOT + "/pve/.vmlist"))["ids"].get(new_id)
        if taken:
            raise Refused("unable to create CT %s - %s %s already exists on node '%s'" % (
                new_id, "VM" if taken["type"] == "qemu" else "CT", new_id, taken["node"]))
        if snapname and snapname not in sections:
            raise Refused("snapshot '%s' does not exist" % snapname)
        if running(vm_id) and not snapname:
            raise Refused("Full clone of a running container is only possible from a snapshot")
        with lock_mark(vm_id, "disk"):
            new = {k: v for k, v in conf.items() if k not in ("rootfs", "parent", "lock")}
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
            save(new_id, dict(new, rootfs=conf["rootfs"].replace(vm_id, new_id)), {})
    return task(work)


def pct_destroy(vm_id, force="0", purge="0"):
    conf, _ = load(vm_id)
    check_lock(conf)
    if conf.get("protection") == "1":
        raise Refused("can't remove CT %s - protection mode enabled" % vm_id)
    if running(vm_id) and force != "1":
        raise Refused("unable to destroy CT %s - container is running" % vm_id)

    def work():
        with lock_mark(vm_id, "destroyed"):
            if running(vm_id):
                stop(vm_id)
            dawdle()
            say('  Logical volume "vm-%s-disk-0" successfully removed.' % vm_id)
            conf, sections = load(vm_id)
        os.remove(CONF % vm_id)
        update_vmlist()
    return task(work)


def pct_start(vm_id):
    load(vm_id)
    return task(lambda: (dawdle(), start(vm_id)))


def pct_stop(vm_id):
    load(vm_id)
    return task(lambda: stop(vm_id))


def pct_unlock(vm_id):
    conf, sections = load(vm_id)
    conf.pop("lock", None)
    save(vm_id, conf, sections)


def pvesh_get(path, **_):
    node = re.match(r"/nodes/([^/]+)/", path)
    if node and node.group(1) != NODE:
        raise Refused("hostname lookup '%s' failed - failed to get address info for: %s: Name or service not known"
                      % (node.group(1), node.group(1)), 2)
    if path == "/cluster/status":
        print(open(ROOT + "/cluster.json").read())
    elif path.endswith("/status"):
        print(json.dumps({
            "cpu": 0, "cpuinfo": {"cpus": 8, "cores": 4, "sockets": 1}, "loadavg": ["0.21", "0.35", "0.40"],
            "memory": {"total": 33554432000, "used": 8388608000, "free": 25165824000, "available": 25165824000},
            "swap": {"total": 8589934592, "used": 0, "free": 8589934592}, "wait": 0, "idle": 0,
            "rootfs": {"total": 107374182400, "used": 21474836480, "free": 85899345920, "avail": 85899345920},
            "uptime": 864000, "pveversion": "pve-manager/8.3.0/c1689ccb1065a83b", "kversion": "Linux 6.8.12-4-pve"}))


def strike(fault):
    """Misbehave as asked, before any work is done."""
    if "pause" in fault:
        time.sleep(fault["pause"])
    if "spew" in fault:
        block = b"x" * 65536
        for _ in range(fault["spew"] // len(block)):
            os.write(1, block)
    if "grandchild" in fault and not os.fork():
        time.sleep(fault["grandchild"])
        os._exit(0)
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
    FAULTS = json.load(open(ROOT + "/faults.json"))
except OSError:
    FAULTS = {}
note(event="start", group=os.getpgrp(), session=os.getsid(0))
CODE = main()
sys.stdout.flush()
note(event="end", code=CODE)
os._exit(CODE)
'''


class Host:
    """A folder that a simulated Proxmox host lives in."""

    def __init__(self, root):
        self.root = Path(root)
        for folder in ("bin", "locks", "trash", "cgroup/lxc", "pve/nodes/proxmox/lxc"):
            (self.root / folder).mkdir(parents=True)
        self.pve, self.cgroup = self.root / "pve", self.root / "cgroup"
        (self.pve / "lxc").symlink_to("nodes/proxmox/lxc")
        (self.pve / ".members").write_text('{\n"nodename": "proxmox",\n"version": 0\n}\n')
        (self.pve / ".vmlist").write_text('{"version": 1, "ids": {}}')
        self.write("cluster.json", [{"id": "node/proxmox", "ip": "192.0.2.10", "level": "", "local": 1, "name": "proxmox",
                                     "nodeid": 0, "online": 1, "type": "node"}])
        for name in ("pct", "pvesh"):
            script = self.root / "bin" / name
            script.write_text(f"#!{os.path.realpath(sys.executable)} -IS\n{FAKE}")
            script.chmod(0o755)

    def write(self, name, value):
        scratch = self.root / (name + ".new")
        scratch.write_text(json.dumps(value))
        scratch.rename(self.root / name)

    def faults(self, **faults):
        """Ask for faults by command, such as clone={"delay": 1}; the ones asked for before are gone."""
        self.write("faults.json", faults)

    def path(self, vm_id):
        return self.pve / "lxc" / f"{vm_id}.conf"

    def add(self, vm_id, hostname=None, running=False, **values):
        values = {"arch": "amd64", "cores": 2, "hostname": hostname or f"ct{vm_id}", "memory": 2048, "ostype": "debian",
                  "rootfs": f"local-lvm:vm-{vm_id}-disk-0,size=8G", "swap": 512, "unprivileged": 1, **values}
        self.path(vm_id).write_text("".join(f"{key}: {values[key]}\n" for key in sorted(values) if values[key] is not None))
        known = json.loads((self.pve / ".vmlist").read_text())
        known["ids"][str(vm_id)] = {"node": "proxmox", "type": "lxc", "version": 1}
        self.write("pve/.vmlist", known)
        if running:
            subprocess.run([self.root / "bin" / "pct", "start", str(vm_id)], check=True)
        (self.root / "calls.jsonl").unlink(missing_ok=True)

    def conf(self, vm_id):
        return dict(line.split(": ", 1) for line in self.path(vm_id).read_text().split("\n\n")[0].splitlines() if ": " in line)

    def snapshots(self, vm_id):
        return [line[1:-1] for line in self.path(vm_id).read_text().splitlines() if line.startswith("[")]

    def running(self, vm_id):
        return (self.cgroup / "lxc" / str(vm_id)).is_dir()

    def rows(self, event="start"):
        path = self.root / "calls.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["event"] == event]

    def calls(self, event="start"):
        """The command lines that were run, in order."""
        return [" ".join(row["argv"]) for row in self.rows(event)]


CONFIG = """
server:
  host: "127.0.0.1"
  port: {port}
authentication:
  api_key: "{key}"
logging:
  log_file: "{root}/main.log"
  access_log: "{root}/access.log"
  error_log: "{root}/error.log"
proxmox:
  pve_dir: "{root}/pve"
  cgroup_dir: "{root}/cgroup"
"""


def start_daemon(host, config, **popen):
    """Start the daemon with the simulated commands on its PATH."""
    path = host.root / "api.yaml"
    path.write_text(config)
    env = {**os.environ, "PATH": f"{host.root}/bin:{os.environ['PATH']}"}
    return subprocess.Popen([sys.executable, str(MODULE), "--config", str(path)], env=env, **popen)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


DEMO_CURL = """
curl -s {url}/health/check
curl -s -H "X-API-Key: $KEY" {url}/routes
curl -s -H "X-API-Key: $KEY" "{url}/resource/vm/status?vm_id=104"
curl -s -H "X-API-Key: $KEY" "{url}/resource/vm/config?vm_id=104"
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" -d '{{"vm_id": 104, "cores": 4}}' {url}/scale/cores
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" -d '{{"vm_id": 104, "memory": 4096}}' {url}/scale/ram
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" -d '{{"vm_id": 104, "disk_size": 5}}' {url}/scale/storage/increase
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" -d '{{"vm_id": 104, "snapshot_name": "backup_20241224"}}' {url}/snapshot/create
curl -s -H "X-API-Key: $KEY" "{url}/snapshot/list?vm_id=104"
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" -d '{{"vm_id": 104, "snapshot_name": "backup_20241224"}}' {url}/snapshot/rollback
curl -s -H "X-API-Key: $KEY" -H "Content-Type: application/json" -d '{{"vm_id": 104, "new_vm_id": 105, "new_vm_name": "test_clone"}}' {url}/clone/create
curl -s -X DELETE -H "X-API-Key: $KEY" -H "Content-Type: application/json" -d '{{"vm_id": 105}}' {url}/clone/delete
curl -s -H "X-API-Key: $KEY" "{url}/resource/node/status?node_name=proxmox"
curl -s -H "X-API-Key: $KEY" {url}/resource/cluster/status
curl -s {url}/metrics
"""


def demo(port=5000):
    """Run the daemon on a simulated host until it is interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    key = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lxc_autoscale_api_demo_") as root:
        host = Host(root)
        host.add(104, "web-01", running=True)
        host.add(106, "db-01", running=True, cores=4, memory=8192)
        host.add(107, "batch", cores=None)
        daemon = start_daemon(host, CONFIG.format(port=port, key=key, root=root))
        try:
            wait_until(lambda: daemon.poll() is not None or answers(port), 10)
            if daemon.poll() is not None:
                return daemon.returncode
            print(f"A simulated host with the containers 104, 106 (running) and 107 (stopped); its files: {root}\n"
                  f"Stop with Ctrl-C. To try it, in another terminal:\n\nKEY={key}"
                  + DEMO_CURL.format(url=f"http://127.0.0.1:{port}"), flush=True)
            daemon.wait()
        except KeyboardInterrupt:
            print("stopping")
        finally:
            daemon.terminate()
            daemon.wait()
    return 0


def answers(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def wait_until(condition, seconds=10):
    """Wait for a condition -> its first true value; the test fails if it never comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"not within {seconds} s: {condition}")


if __name__ == "__main__":
    sys.exit(demo() if sys.argv[1:] == ["--demo"] else __doc__)
