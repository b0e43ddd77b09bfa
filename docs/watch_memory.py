"""Train, and watch the memory, threads and open files of the training process and of its workers meanwhile.

    python docs/watch_memory.py --config configs/quickstart.yaml OUTPUT_DIR output/watched SOLVER.MAX_ITER 3000

Everything behind the name is the command line of tools/train_net.py. Memory is PSS: pages that several processes share
count in parts, so the sum over the processes is what the run takes. Every look is a row of memory.csv in OUTPUT_DIR;
after the end a table of means is printed and memory.png is drawn. Linux only.
"""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EVERY = 2.0  # seconds between two looks
ROWS = 8  # of the table: means over equal stretches of the run
COLUMNS = ("iteration", "main", "heap", "libraries", "shared", "workers", "threads", "files")


def main() -> None:
    arguments = sys.argv[1:]
    if "OUTPUT_DIR" not in arguments:
        sys.exit(__doc__)
    output = Path(arguments[arguments.index("OUTPUT_DIR") + 1])
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    looks = []
    while process.poll() is None:
        time.sleep(EVERY)
        look = look_at(process.pid)
        if look and iteration(output / "metrics.jsonl"):
            looks.append({"iteration": iteration(output / "metrics.jsonl"), **look})
            write(looks, output / "memory.csv")
    if len(looks) >= 2 * ROWS:
        print_table(looks)
        draw(looks, output / "memory.png")
    else:
        print(f"only {len(looks)} looks, every {EVERY} s: a longer run is needed")
    sys.exit(process.returncode)


def write(looks: list[dict], path: Path) -> None:
    """Add the newest look to a table; the first one begins it anew."""
    with path.open("w" if len(looks) == 1 else "a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        if len(looks) == 1:
            table.writeheader()
        table.writerow({key: round(value, 2) for key, value in looks[-1].items()})


def print_table(looks: list[dict]) -> None:
    """Print means over equal stretches, then the growth over the second half of the run."""
    print(" ".join(f"{name:>10}" for name in COLUMNS), "(main = heap + libraries + shared; MiB)")
    for part in np.array_split(looks, ROWS):
        mean = {key: float(np.mean([look[key] for look in part])) for key in COLUMNS}
        mean |= {key: max(look[key] for look in part) for key in ("iteration", "threads", "files")}
        print(" ".join(f"{mean[key]:10.1f}" for key in COLUMNS))
    half = [look for look in looks if look["iteration"] > looks[-1]["iteration"] / 2]
    for key in ("main", "workers", "threads", "files"):
        slope = np.polyfit([look["iteration"] for look in half], [look[key] for look in half], 1)[0]
        print(f"{key}: {1000 * slope:+.2f} in 1,000 iterations, over the second half")


def draw(looks: list[dict], path: Path) -> None:
    """Draw memory over iterations: main, its kinds of pages, and the workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for key in ("main", "heap", "libraries", "shared", "workers"):
        axes.plot([look["iteration"] for look in looks], [look[key] for look in looks], label=key)
    axes.set(xlabel="iteration", ylabel="PSS, MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(path, dpi=100)


def look_at(pid: int) -> dict | None:
    """Return MiB of the process and of its children, its threads and open files; None when it has just ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = pss(pid)
        return {
            "main": own["Pss"],
            "heap": own["Pss_Anon"],
            "libraries": own["Pss_File"],
            "shared": own["Pss_Shmem"],
            "workers": sum(pss(int(child))["Pss"] for child in children),
            "threads": len(list(Path(f"/proc/{pid}/task").iterdir())),
            "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        }
    except (OSError, KeyError):
        return None


def pss(pid: int) -> dict[str, float]:
    """Return the proportional set size in MiB, whole and by kind of page."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[0].startswith("Pss")}


def iteration(metrics: Path) -> int:
    """Return the last iteration of the log, 0 when there is none yet."""
    if not metrics.exists():
        return 0
    rows = [json.loads(line) for line in metrics.read_text().splitlines()[-1:]]
    return rows[0].get("iteration", 0) if rows else 0


if __name__ == "__main__":
    main()
