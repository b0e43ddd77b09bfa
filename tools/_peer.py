"""The part of compare_norms.py that trains torchvision's RetinaNet, in a process of its own as every run has."""

from pathlib import Path

import _cli

from retinanet.engine.machine import tune_process
from retinanet.engine.peer_training import build_peer_run
from retinanet.engine.run import choose_device, set_seed

EXAMPLES = "  python tools/_peer.py --config configs/retinanet_R18_gn_small.yaml --variant torchvision_bn"


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--variant", default="torchvision_bn", help="torchvision or torchvision_bn (%(default)s)")
    args = _cli.parse(made, argv)
    cfg, _ = _cli.load(args)
    device = choose_device(cfg.DEVICE)
    tune_process(device)
    set_seed(cfg.SEED, cfg.DETERMINISTIC)
    build_peer_run(cfg, Path(cfg.OUTPUT_DIR), device, args.variant)


if __name__ == "__main__":
    _cli.run(main)
