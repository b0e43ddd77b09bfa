"""The measurements that the project is judged by, as command lines of `tools/benchmark.py`.

"cpu": against torchvision's RetinaNet as its users have it, eager, in float32, with the ratio that shall be reached.
"gpu": bf16 on one NVIDIA H200, with the images per second that shall be reached; R50-FPN, 80 classes.
"""

from dataclasses import dataclass

_CONFIG = ("--config", "configs/retinanet_R50_frozenbn_fpn.yaml")
_OPTS = ("MODEL.ALLOW_MISSING_WEIGHTS", "True")
_GPU = (*_OPTS, "SOLVER.AMP", "bf16", "SOLVER.CHANNELS_LAST", "True")
_FAST = (*_GPU, "SOLVER.COMPILE", "True")
_FILES = ("--end-to-end", "--synthetic")  # how many, where the configuration's training set is not on the disk
_DETECT = (*_GPU, "TEST.CUDA_GRAPHS", "2")
_PEERS = ("--norms", "config,torchvision")


@dataclass(frozen=True)
class Case:
    """title: of the table. arguments: of the tool. ratio: how many times faster than torchvision our last row shall be.

    images_per_s: what it shall reach. of_steps: share of the rate of the steps alone, end to end. None: no target.
    """

    title: str
    arguments: tuple[str, ...]
    ratio: float | None = None
    images_per_s: float | None = None
    of_steps: float | None = None


def _cpu(title: str, ratio: float, *arguments: str) -> Case:
    return Case(title, (*_CONFIG, *_PEERS, *arguments, *_OPTS), ratio)


def _gpu(title: str, rate: float, *arguments: str, opts: tuple[str, ...] = _FAST) -> Case:
    return Case(title, (*_CONFIG, *_PEERS, *arguments, *opts), None, rate)


SUITES = {
    "cpu": (
        _cpu("detect 800 x 800, 1 image", 1.5, "--detect", "--size", "800", "800", "--batch", "1", "--steps", "3"),
        _cpu("train 800 x 800, 1 image", 1.3, "--size", "800", "800", "--batch", "1", "--steps", "2"),
        _cpu("detect 320 x 320, 2 images", 1.4, "--detect", "--batch", "2"),
        _cpu("train 320 x 320, 2 images", 1.2, "--batch", "2", "--steps", "3"),
        Case(
            "train on image files, 320/533, 2 images", (*_CONFIG, *_FILES, "32", "--batch", "2", "--steps", "3",
            "--warm-up", "1", *_OPTS, "INPUT.MIN_SIZE_TRAIN", "[320]", "INPUT.MAX_SIZE_TRAIN", "533"), of_steps=0.95,
        ),
    ),
    "gpu": (
        _gpu("train 800 x 1344, 16 images", 250, "--size", "800", "1344", "--batch", "16"),
        _gpu("train 800 x 800, 16 images", 420, "--size", "800", "800", "--batch", "16"),
        _gpu(
            "train 800 x 1344, 2 images", 200, "--size", "800", "1344", "--batch", "2",
            opts=(*_FAST, "SOLVER.CUDA_GRAPHS", "2"),
        ),
        Case(
            "train 800 x 1344, 16 images, norms", ("--config", "configs/retinanet_R50_bn_fpn.yaml", "--norms",
            "BN,MABN,BCN,GN", "--size", "800", "1344", "--batch", "16", "MODEL.WEIGHTS", "''", *_FAST), None, 205,
        ),
        Case(
            "train on image files, 800/1333, 16 images", (*_CONFIG, *_FILES, "640", "--batch", "16", "--warm-up", "100",
            *_FAST, "DATALOADER.SHAPE_BUCKETS", "True", "DATALOADER.NUM_WORKERS", "8"), None, 280, 0.95,
        ),
        _gpu("detect 800 x 1344, 1 image", 455, "--detect", "--size", "800", "1344", "--batch", "1", opts=_DETECT),
        _gpu("detect 800 x 1344, 32 images", 650, "--detect", "--size", "800", "1344", "--batch", "32", opts=_DETECT),
    ),
}  # fmt: skip


def verdict(case: Case, rows: list[dict]) -> str:
    """Return what the last of our rows reached of the targets of `case`."""
    ours = [row for row in rows if not row["variant"].startswith("torchvision")][-1]
    peers = [row for row in rows if row["variant"].startswith("torchvision")]
    lines = []
    for peer in peers:
        ratio = peer["ratio"] / ours["ratio"]  # both against the first variant of the same rounds
        wanted = f" (wanted: {case.ratio:.2f})" if case.ratio and peer is peers[0] else ""
        lines.append(f"{case.title}: {ours['variant']} is {ratio:.2f} times as fast as {peer['variant']}{wanted}")
    if case.images_per_s:
        rate = f"{ours['variant']} {ours['images_per_s']:.0f} images/s"
        lines.append(f"{case.title}: {rate} (wanted on one H200: {case.images_per_s:.0f})")
    if case.of_steps:
        rate = f"{100 * ours['of_steps']:.1f} % of the rate of the steps alone"
        lines.append(f"{case.title}: {ours['variant']} reaches {rate} (wanted: {100 * case.of_steps:.0f} %)")
    return "\n".join(lines)
