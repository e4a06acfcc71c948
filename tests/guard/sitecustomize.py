"""While tests run, every Python process has this: what belongs to the user cannot be written, and a usual port not be taken."""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
PROTECTED = [os.path.join(ROOT, name) for name in ("reports", "models", "samples", os.path.join("data", "drawn"))]
PROTECTED.append(os.path.join(os.path.expanduser("~"), ".cache", "mnist_nb"))
FREE = os.path.join(ROOT, "reports", "scratch")  # the notebooks keep it for themselves, and their tests write to it
PORTS = {8000, 8080, 8786, 8787, 8888}  # of file servers, the service, Dask and JupyterLab
# Where an event has a path that it changes, and the descriptor of the folder that a relative one is taken from.
CHANGES = {"os.mkdir": [(0, 2)], "os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.truncate": [(0, None)], "os.symlink": [(1, 2)],
           "os.link": [(1, 3)], "os.rename": [(0, 2), (1, 3)]}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def whole_path(path: object, folder: int = -1) -> str:  # -1: the working folder
    "The absolute path; empty where it cannot be known."
    if not isinstance(path, (str, bytes, os.PathLike)): return ""  # such as the number of an open file
    try: start = os.readlink(f"/proc/self/fd/{folder}") if folder != -1 else os.getcwd()
    except OSError: start = "/"
    return os.path.normpath(os.path.join(start, os.fsdecode(path)))


def is_protected(path: str) -> bool:
    "Whether an absolute path belongs to the user."
    def below(folder: str) -> bool: return path == folder or path.startswith(folder + os.sep)
    return any(map(below, PROTECTED)) and not below(FREE)


def watch(event: str, words: tuple) -> None:
    "Hears of each file that is opened and of each change to a folder, before it happens."
    if event == "open": paths = [whole_path(words[0])] if isinstance(words[2], int) and words[2] & WRITING else ()
    elif event in CHANGES: paths = [whole_path(words[path], -1 if folder is None else words[folder]) for path, folder in CHANGES[event]]
    elif event == "socket.bind":
        port = words[1][1] if isinstance(words[1], tuple) else 0
        if port in PORTS: raise RuntimeError(f"a test takes port {port}, which the user may need: let the system choose one.")
        return
    else: return
    for path in filter(is_protected, paths):
        if event == "os.mkdir" and os.path.isdir(path): continue  # it is there, nothing changes
        raise RuntimeError(f"a test changes {path}, which belongs to the user: tests write to folders of their own.")


sys.addaudithook(watch)
