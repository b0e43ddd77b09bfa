"""Train, and watch the memory, threads and open files of the training process and of its workers meanwhile.

    python docs/watch_memory.py --config configs/quickstart.yaml OUTPUT_DIR output/watched SOLVER.MAX_ITER 3000

Everything behind the name is the command line of tools/train_net.py. Memory is PSS: pages that several processes share
count in parts, so the sum over the processes is what the run takes. Linux only.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 2.0  # seconds between two looks
ROWS = 8  # of the table: means over equal stretches of the run


def main() -> None:
    arguments = sys.argv[1:]
    if "OUTPUT_DIR" not in arguments:
        sys.exit(__doc__)
    metrics = Path(arguments[arguments.index("OUTPUT_DIR") + 1]) / "metrics.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    looks = []
    while process.poll() is None:
        time.sleep(EVERY)
        look = look_at(process.pid)
        if look and iteration(metrics):
            looks.append({"iteration": iteration(metrics), **look})
    print(f"{'iteration':>9} {'main, MiB':>10} {'workers, MiB':>13} {'threads':>8} {'files':>6}")
    for start in range(0, len(looks), max(1, len(looks) // ROWS)):
        part = looks[start : start + max(1, len(looks) // ROWS)]
        mean = {key: sum(look[key] for look in part) / len(part) for key in part[0]}
        print(
            f"{part[-1]['iteration']:9} {mean['main']:10.1f} {mean['workers']:13.1f} "
            f"{max(look['threads'] for look in part):8} {max(look['files'] for look in part):6}"
        )
    sys.exit(process.returncode)


def look_at(pid: int) -> dict | None:
    """Return MiB of the process and of its children, its threads and open files; None when it has just ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {
            "main": pss(pid),
            "workers": sum(pss(int(child)) for child in children),
            "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
            "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        }
    except (OSError, StopIteration):
        return None


def pss(pid: int) -> float:
    """Return the proportional set size in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def iteration(metrics: Path) -> int:
    """Return the last iteration of the log, 0 when there is none yet."""
    if not metrics.exists():
        return 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()[-1:]]
    return rows[0].get("iteration", 0) if rows else 0


if __name__ == "__main__":
    main()
