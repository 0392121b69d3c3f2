"""Watches that malformed input does nothing: no process, connection or written file, no endless time or memory."""

import contextlib
import os
import re
import resource
import signal
import sys

TIME_LIMIT_S = 10
MEMORY_LIMIT_BYTES = 768 << 20
ADDRESS_LIMIT_BYTES = 8 << 30  # keeps the machine alive where a test fails
FIX = re.compile(
    r"\b(restore|give|fetch|mend|correct|check|choose|save|write|free|paint|leave|fill|add|remove|put|use|try|"
    r"the nearest is|expected)\b"
)
FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.link", "os.symlink", "os.truncate", "shutil.rmtree", "os.putenv", "ctypes.dlopen",
)  # fmt: skip


class TimeLimit(BaseException):
    """No Exception, so that nobody takes it for a damaged file."""


class Watch:
    """What the interpreter reports while it is on; an audit hook cannot be taken away again."""

    on, seen, installed = False, [], False

    @classmethod
    def hook(cls, event, args):
        if not cls.on:
            return
        writes = event == "open" and args[2] and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in FORBIDDEN or writes:
            cls.seen.append((event, str(args)[:200]))


@contextlib.contextmanager
def nothing_happens():
    """Fails if a process, a connection, a written file, too much time or memory was needed."""
    if not Watch.installed:
        sys.addaudithook(Watch.hook)
        Watch.installed = True

    def too_late(*_):
        raise TimeLimit(f"more than {TIME_LIMIT_S} s")

    Watch.seen = []
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    old_handler, bytecode = signal.signal(signal.SIGALRM, too_late), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # what was the most so far is forgotten
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESS_LIMIT_BYTES, limits[1]))
    signal.alarm(TIME_LIMIT_S)
    Watch.on = True
    try:
        yield
    finally:
        Watch.on = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        sys.dont_write_bytecode = bytecode
    assert not Watch.seen
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_LIMIT_BYTES


def check_line(message, *names):
    assert message.isprintable() and len(message) < 1 << 17, message[:1000]
    assert any(name in message for name in names), message
    assert FIX.search(message), message


def check_rejected(rejected):
    for row in rejected:
        assert re.match(r"[a-z][a-z_ ]+: .", row["reason"]) and row["reason"].isprintable(), row
        assert len(row["reason"]) < 1000 and row["record_id"]


def listing(folder):
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob("*"))
