"""A run on a checkout that cannot be written to, with a home and a folder for temporary files of its own, which show what it left there."""

import ctypes
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBC = ctypes.CDLL(None)
DROP_FROM_BOUNDING_SET, FILE_CAPABILITIES = 24, (1, 2, 3)  # prctl's PR_CAPBSET_DROP; DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
HOMES = ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME",
         "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR")


def obey_permissions() -> None:
    "In a process about to start a program: lets file permissions hold for it even if it is root's."
    for capability in FILE_CAPABILITIES: LIBC.prctl(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)  # refused to other users: they have none


def copy_checkout(folder: Path) -> Path:
    "What a run needs of the checkout, and no caches."
    folder.mkdir()
    for name in ("mnist_nb", "nbs", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "settings.ini", folder)
    return folder


def listing(folder: Path) -> dict[str, list]:
    "Every file and folder below `folder`: time of the last change, size, permissions."
    stats = {str(path.relative_to(folder)): path.stat() for path in (folder, *folder.rglob("*"))}
    return {name: [stat.st_mtime_ns, stat.st_size, stat.st_mode] for name, stat in sorted(stats.items())}


@contextmanager
def write_protected(folder: Path) -> Iterator[None]:
    "Takes the permission to write from all that lies in `folder`, for the time of the block."
    before = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in before.items(): path.chmod(mode & ~0o222)
    try: yield
    finally:
        for path, mode in before.items():
            if path.exists(): path.chmod(mode)


def run_protected(words: list[str], checkout: Path, home: Path, seconds: float = 600) -> subprocess.CompletedProcess:
    "Runs a command on the code of `checkout`, with `home`/home and `home`/temporary in place of the user's folders."
    for name in ("home", "temporary"): (home / name).mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in HOMES}
    env |= {"PYTHONPATH": str(checkout), "HOME": str(home / "home"), "TMPDIR": str(home / "temporary"),
            "PYTHONUSERBASE": site.getuserbase()}
    return subprocess.run(words, cwd=checkout, env=env, capture_output=True, text=True, timeout=seconds, preexec_fn=obey_permissions)


def report_on_read_only_checkout(words: list[str],  # of mnist-report; --reports must name a folder outside the checkout
                                 folder: Path,       # made; keeps the checkout, and what the run left in home and temporary
                                 prepare: Callable[[Path], None] = lambda checkout: None,  # what to do with the copy first
                                ) -> tuple[subprocess.CompletedProcess, dict]:  # and the listings before and after
    "Makes a report from a copy of the checkout without permission to write there."
    folder.mkdir()
    checkout = copy_checkout(folder / "checkout")
    prepare(checkout)
    with write_protected(checkout):
        before = listing(checkout)
        result = run_protected([str(Path(sys.executable).parent / "mnist-report"), *words], checkout, folder)
        return result, {"before": before, "after": listing(checkout)}
