"""A grid on a Slurm cluster: an array of jobs, each a Dask worker.

    pip install dask-jobqueue
    python examples/slurm.py examples/grid.yaml --workers 8 --cores 8 --walltime 04:00:00

The Python environment must be at the same path on the nodes, as with a shared home; data and reports need not be shared. Choose the
walltime for the whole grid, since the array is submitted once: if it runs out, press Ctrl-C and start again with --resume. The command
has to stay alive: use tmux, or a job of its own where login nodes end long processes.
"""

import argparse
import signal
import sys

from dask_jobqueue import SLURMCluster

from mnist_nb.batch import run_grid
from mnist_nb.cli import plain_errors
from mnist_nb.grids import read_spec


signal.signal(signal.SIGINT, signal.default_int_handler)  # dask_jobqueue sets its own, which ends programs without a word


def slurm_cluster(workers: int, cores: int, memory: str, walltime: str, queue: str | None = None) -> SLURMCluster:
    "A scheduler here, and an array of workers with `cores` each, that do a run at a time."
    return SLURMCluster(cores=cores, processes=1, memory=memory, walltime=walltime, queue=queue, python=sys.executable,
                        job_extra_directives=[f"--array=1-{workers}"], worker_extra_args=[
                            "--nthreads", "1", "--name", "worker-${SLURM_ARRAY_JOB_ID}-${SLURM_ARRAY_TASK_ID}",
                            "--local-directory", "${TMPDIR:-/tmp}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="YAML file, as for mnist-grid")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--cores", type=int, default=8, help="of each worker")
    parser.add_argument("--memory", default="8GB", help="of each worker")
    parser.add_argument("--walltime", default="04:00:00")
    parser.add_argument("--queue", help="Slurm's partition")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--script", action="store_true", help="print what would be submitted, and stop")
    options = parser.parse_args()
    with plain_errors(parser):
        spec = read_spec(options.grid)
        with slurm_cluster(options.workers, options.cores, options.memory, options.walltime, options.queue) as cluster:
            if options.script:
                print(cluster.job_script())
                return 0
            cluster.scale(jobs=1)  # one array
            record = run_grid(spec, scheduler=cluster.scheduler_address, resume=options.resume)
    return 0 if record["status"] == "done" else 1


if __name__ == "__main__": sys.exit(main())
