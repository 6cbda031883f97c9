"""Replace this process with a program that is killed when its parent ends, under a user that
PostgreSQL accepts.

Run as a script, never imported: `python -I -S launch.py PARENT_PID MODE WRITABLE_FOLDER -- PROGRAM
[ARG...]`. It needs the standard library only and ends with `exec`, so that the pid that the parent
has is that of the program. MODE is one of

    plain            the user and namespaces of the parent
    isolate          a new user and IPC namespace with the same ids: shared memory segments vanish with the last process
    map:UID          the same, but with UID inside the namespace: root's files stay readable, and nothing inside sees uid 0
    user:UID:GID     become that user (requires root)

WRITABLE_FOLDER must be writable in that mode ("-": not checked); callers use it to probe whether a
mode works. Exit code 126: the mode or the folder does not work; 127: the program cannot be started;
125: the parent has ended.
"""

import ctypes
import os
import signal
import sys

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWIPC = 0x08000000
_PR_SET_PDEATHSIG = 1


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _unshare(libc: ctypes.CDLL, uid: int, gid: int) -> None:
    """Enter a new user and IPC namespace in which this process is uid:gid."""
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWIPC) != 0:
        raise OSError(ctypes.get_errno(), "user namespaces are not available: " + os.strerror(ctypes.get_errno()))
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {outer_uid} 1")
    _write("/proc/self/gid_map", f"{gid} {outer_gid} 1")


def _enter(mode: str, libc: ctypes.CDLL) -> None:
    kind, _, ids = mode.partition(":")
    if kind == "isolate":
        _unshare(libc, os.geteuid(), os.getegid())
    elif kind == "map":
        _unshare(libc, int(ids), int(ids))
    elif kind == "user":
        uid, _, gid = ids.partition(":")
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    elif kind != "plain":
        raise OSError(f"unknown mode {mode!r}")


def main() -> int:
    parent, mode, folder, dashes, program = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:]
    if dashes != "--" or not program:
        print(__doc__, file=sys.stderr)
        return 126
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _enter(mode, libc)
    except OSError as error:
        print(f"launch: mode {mode} does not work: {error}", file=sys.stderr)
        return 126
    if folder != "-" and not os.access(folder, os.W_OK | os.X_OK):
        print(f"launch: {folder} is not writable in mode {mode}", file=sys.stderr)
        return 126
    if sys.platform == "linux":
        # After the change of ids, which clears it. If the parent ended before this line, getppid() differs.
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        return 125
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(program[0], program)
    except OSError as error:
        print(f"launch: {program[0]}: {error.strerror}", file=sys.stderr)
    return 127


if __name__ == "__main__":
    sys.exit(main())
