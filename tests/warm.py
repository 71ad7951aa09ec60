"""A Python that starts at once, for tests whose commands start others by the dozen.

It is a script that may stand wherever a Python is named (KDAD_PYTHON, `sys.executable`). For
`-m MODULE` or `-c CODE` it asks a process that has everything imported to fork, and lends it its
arguments, environment, directory and standard streams; signals, exit codes and deaths reach the
other side. Whatever else it is asked, it becomes the Python that it stands for. A program's parent
is an attendant here: one that asks to die with its parent (PR_SET_PDEATHSIG) outlives its launcher.

Run as a script this file is the side that asks; as a module, the side that forks.
"""

import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ask(python: str, address: str, own: str, words: list[str]) -> None:
    """Args:
    own: the path of the script, which the program takes for its Python.
    """
    asked = [word for word in words if word != "-u"]
    if not {"-m", "-c"} & {*asked[:1]}:
        os.execv(python, [python, *words])
    request = {"words": asked, "directory": os.getcwd(), "python": own}
    body = json.dumps(request | {"environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(address)
        socket.send_fds(other, [struct.pack("!q", len(body))], [0, 1, 2])
        other.sendall(body)
        [pid] = struct.unpack("!q", receive(other, 8))

        def forward(number: int, _: object) -> None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in SIGNALS:
            signal.signal(number, forward)
        [status] = struct.unpack("!q", receive(other, 8))
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def receive(other: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = other.recv(size - len(data))
        if not part:
            raise SystemExit("the process that forks is gone")
        data += part
    return data


def serve(address: str) -> None:
    """Forks for whoever asks, until it or its parent is killed. Ends, in a fork, as the program
    does.
    """
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)  # whoever sees it can connect
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the attendants
        while parent.sentinel not in select.select([listener, parent.sentinel], [], [])[0]:
            other, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                attend(other)
            other.close()


def attend(other: socket.socket) -> None:
    """Starts a program and waits for its end; kills it when the one who asked is gone."""
    header, streams, *_ = socket.recv_fds(other, 8, 3)
    request = json.loads(receive(other, *struct.unpack("!q", header)))
    pid = os.fork()
    if pid == 0:
        other.close()
        become(request, streams)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    other.sendall(struct.pack("!q", pid))
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, other], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):
        other.sendall(struct.pack("!q", status))
    os._exit(0)


def become(request: dict, streams: list[int]) -> None:
    """Runs the module or the code as Python would, and ends as a process of `multiprocessing`:
    without what `atexit` knows, and with 1 after an interrupt that nothing catches.
    """
    import runpy
    import types

    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (until its end)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.executable = request["python"]
    kind, program, *arguments = request["words"]
    sys.argv = [kind, *arguments]
    sys.path.insert(0, request["directory"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(program, vars(main))
    sys.exit()


def stands_in(python: str) -> None:
    """Has a program start others with this Python; for `first` of tests/kdad.py."""
    sys.executable = python


if __name__ == "__main__":
    ask(*sys.argv[1:4], sys.argv[4:])
