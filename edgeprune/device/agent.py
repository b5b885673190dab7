# ruff: noqa: UP031  (written for Python 3.8)
"""Runs ON the device: takes jobs from the host and answers them. Standard library only, Python 3.8 syntax.

The host reads this file and agent_ort.py as text and sends them down the pipe; nothing is installed. Both ways a
message is one line ``EPA1 {json}`` followed by raw blobs whose lengths the header lists under "sizes". File descriptor
1 is moved away first, so that a stray print of a library lands on stderr and cannot corrupt the protocol. A job that
fails is an answer with ``"ok": false``; only a crash ends the process, or the host that hangs up: a guard process sees
that, and clears up after this one however it ends.
"""

import glob
import json
import os
import select
import shutil
import signal
import sys
import tempfile

MAGIC = b"EPA1 "
PROTOCOL = 1  # version of jobs and answers; the host tells its own in "hello"
ROOM_MB = 64  # profiles and optimised models are written to disk, one at a time


def power_mode():
    """The settings that make the same processor fast or slow, as text; empty where the system tells none.

    Limits that the system itself lowers when it is hot are no setting and not in it.
    """
    cpu = "/sys/devices/system/cpu/"
    parts = []
    governors = {first_line(path) for path in glob.glob(cpu + "cpu[0-9]*/cpufreq/scaling_governor")}
    if governors:
        parts.append("governor " + "+".join(sorted(governors)))
    online, present = first_line(cpu + "online"), first_line(cpu + "present")
    if online != present:
        parts.append("cores " + online)
    for path, name in (
        ("/var/lib/nvpmodel/status", "nvpmodel"),
        ("/sys/firmware/acpi/platform_profile", "profile"),
        (cpu + "cpufreq/boost", "boost"),
        (cpu + "intel_pstate/no_turbo", "no_turbo"),
    ):
        value = first_line(path)
        if value:
            parts.append(name + " " + value)
    return ", ".join(parts)


def first_line(path):
    """Of a small file of the system; empty when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.readline(200).decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""


def read_exactly(stream, count):
    parts = []
    while count:
        part = stream.read(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def answer_to(job, blobs, jobs):
    """(header, blobs) of the answer: a failure is one too, and "fault" says when the job is not to blame for it."""
    mode = power_mode()
    try:
        if job["op"] == "hello" and job["protocol"] != PROTOCOL:
            raise RuntimeError("this agent speaks protocol %d, the host %s" % (PROTOCOL, job["protocol"]))
        answer, data = jobs[job["op"]](job, blobs)
        answer["ok"] = True
    except Exception as error:
        text = " ".join(str(error).split())
        answer, data = {"ok": False, "error": "%s: %s" % (type(error).__name__, text[:500])}, []
        full = no_room()
        if full:
            answer.update(fault="disk", error="%s (%s)" % (full, answer["error"]))
    after = power_mode()
    answer["power"] = mode if mode == after else "%s -> %s" % (mode, after)
    return answer, data


def serve(source, sink, jobs):
    while True:
        line = source.readline()
        if not line:
            return
        job = json.loads(line[len(MAGIC) :].decode("utf-8"))
        blobs = [read_exactly(source, size) for size in job["sizes"]]
        answer, data = answer_to(job, blobs, jobs)
        answer.update(id=job["id"], protocol=PROTOCOL, sizes=[len(part) for part in data])
        sink.write(MAGIC + json.dumps(answer).encode("utf-8") + b"\n")
        for part in data:
            sink.write(part)
        sink.flush()


def no_room():
    """Why nothing of the size of a profile can be written to the temporary folder; empty when it can."""
    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, ROOM_MB << 20)
            else:
                for _ in range(ROOM_MB):
                    file.write(bytes(1 << 20))
                file.flush()
    except OSError as error:
        return "no %d MB can be written to %s: %s" % (ROOM_MB, tempfile.tempdir, error.strerror or error)
    return ""


def temporary_folder():
    """(folder of this process's own, the same or, where none can be made, the full place that it should be in).

    It is in memory where the usual place is full. What dead agents left is removed.
    """
    places = [os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp", "/dev/shm"]
    places = [place for place in places if place and os.access(place, os.W_OK)] or [tempfile.gettempdir()]
    free = {place: shutil.disk_usage(place).free for place in places}
    chosen = next((place for place in places if free[place] >= ROOM_MB << 20), places[0])
    for old in glob.glob(os.path.join(chosen, "edgeprune-agent-*")):
        try:
            os.kill(int(old.rsplit("-", 2)[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(old, ignore_errors=True)
        except (ValueError, OSError, OverflowError):
            pass
    try:
        own = tempfile.mkdtemp(prefix="edgeprune-agent-%d-" % os.getpid(), dir=chosen)
        return own, own
    except OSError:
        return None, chosen  # every job that needs it says so


def guard(folder):
    """Fork a process that kills this one when the host hangs up, even in the middle of a run, and then removes
    ``folder``. Only a process of its own can do both: a run may hold the interpreter's lock, or take it down."""
    agent = os.getpid()
    ours, theirs = os.pipe()
    if os.fork():
        os.close(ours)  # ``theirs`` stays open until this process is gone
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.close(theirs)
    os.close(1)
    os.close(2)
    hung_up = select.poll()
    hung_up.register(0, getattr(select, "POLLRDHUP", 0))
    hung_up.register(ours, 0)
    hung_up.poll()
    gone = select.poll()
    gone.register(ours, 0)
    if not gone.poll(1000):
        os.kill(agent, signal.SIGKILL)
        gone.poll(5000)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main(jobs):
    sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]
    if hasattr(os, "fork") and hasattr(select, "poll"):
        own, tempfile.tempdir = temporary_folder()
        os.environ["TMPDIR"] = tempfile.tempdir  # for what the runtime writes by itself
        guard(own)
    protocol = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, protocol, jobs)
