"""While tests run, every Python process has this: what belongs to the user cannot be written, and a usual port not be taken."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
PROTECTED = [os.path.join(ROOT, name) for name in ("reports", "models", "samples", os.path.join("data", "drawn"))]
PROTECTED.append(os.path.join(os.path.expanduser("~"), ".cache", "mnist_nb"))
FREE = os.path.join(ROOT, "reports", "scratch")  # the notebooks keep it for themselves, and their tests write to it
PORTS = {8000, 8080, 8786, 8787, 8888}  # of file servers, the service, Dask and JupyterLab
CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2}  # paths they name
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def is_protected(path: object) -> bool:
    "Whether a path belongs to the user."
    if not isinstance(path, (str, bytes, os.PathLike)): return False  # such as the number of an open file
    whole = os.path.abspath(os.fsdecode(path))
    def below(folder: str) -> bool: return whole == folder or whole.startswith(folder + os.sep)
    return any(map(below, PROTECTED)) and not below(FREE)


def watch(event: str, words: tuple) -> None:
    "Hears of each file that is opened and of each change to a folder, before it happens."
    if event == "open": paths = words[:1] if isinstance(words[2], int) and words[2] & WRITING else ()
    elif event in CHANGES: paths = words[:CHANGES[event]]
    elif event == "socket.bind":
        port = words[1][1] if isinstance(words[1], tuple) else 0
        if port in PORTS: raise RuntimeError(f"a test takes port {port}, which the user may need: let the system choose one.")
        return
    else: return
    for path in filter(is_protected, paths):
        if event == "os.mkdir" and os.path.isdir(path): continue  # it is there, nothing changes
        raise RuntimeError(f"a test changes {os.fsdecode(path)}, which belongs to the user: tests write to folders of their own.")


sys.addaudithook(watch)
