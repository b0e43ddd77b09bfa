"""Score a model, or a file of COCO results, with the COCO metrics and the threshold of the highest F1."""

import argparse
from pathlib import Path

import _cli

from retinanet.config.load import load_config_text
from retinanet.engine.coco_json import ground_truth, results, write_json
from retinanet.engine.coco_metrics import coco_metrics, format_metrics, format_per_class
from retinanet.engine.operating_point import curves
from retinanet.engine.report import report_page, write_report
from retinanet.errors import UserError, pick
from retinanet.utils.page import Page

EXAMPLES = """  python tools/test_net.py --config configs/quickstart.yaml MODEL.WEIGHTS output/quickstart/best.pth
  python tools/test_net.py --config configs/retinanet_R50_gn_fpn.yaml MODEL.WEIGHTS model.pth --per-class --report
  python tools/test_net.py --config configs/retinanet_R50_gn_fpn.yaml --predictions results.json
  python tools/test_net.py --annotations instances_val2017.json --predictions results.json TEST.EVALUATOR pycocotools
  python tools/test_net.py --annotations val.json --images val/ --predictions results.json --report
  torchrun --nproc-per-node 8 tools/test_net.py --config configs/retinanet_R50_gn_fpn.yaml MODEL.WEIGHTS model.pth

writes predictions.json and metrics.json to OUTPUT_DIR/inference/DATASET, for each of DATASETS.TEST"""


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--predictions", metavar="FILE", help="score these COCO results; no model is needed")
    made.add_argument("--annotations", metavar="FILE", help="with --predictions: a COCO json instead of DATASETS.TEST")
    made.add_argument("--per-class", action="store_true", help="print a table with a line for every class")
    made.add_argument("--plots", action="store_true", help="draw precision_recall.png beside metrics.json")
    made.add_argument("--report", action="store_true", help="write report.html and report.md beside metrics.json")
    made.add_argument("--images", metavar="FOLDER", help="with --annotations and --report: where its images are")
    made.add_argument("--output", metavar="FOLDER", help="write there instead of OUTPUT_DIR/inference/DATASET")
    args = _cli.parse(made, argv)
    if args.annotations and not args.predictions:
        raise UserError("--annotations: needs --predictions; a model is scored on DATASETS.TEST of the configuration")
    if args.images and not args.annotations:
        raise UserError(
            "--images: needs --annotations; data sets of the configuration have their folder in the catalog"
        )
    if args.images and not Path(args.images).is_dir():
        raise UserError(f"--images: {args.images} is not a folder")
    if args.predictions:
        score_file(args)
    else:
        score_model(args)


def score_file(args: argparse.Namespace) -> None:
    """Score `--predictions` against `--annotations` or the one data set of the configuration."""
    alone = args.annotations and not args.config
    cfg = load_config_text("", "", args.opts) if alone else _cli.load(args, training=False)[0]
    name, annotations, images = Path(args.annotations or "").stem, args.annotations, args.images
    if annotations is None:
        from retinanet.data.catalog import load_catalog

        if len(cfg.DATASETS.TEST) != 1:
            raise UserError(f"DATASETS.TEST: is {cfg.DATASETS.TEST}; name the one data set that the predictions are of")
        name = cfg.DATASETS.TEST[0]
        entry = pick(load_catalog(cfg.DATASETS.CATALOG), name, "DATASETS.TEST")
        annotations, images = entry["annotations"], entry["images"]
    metrics = coco_metrics(annotations, args.predictions, cfg.TEST.EVALUATOR)
    folder = Path(args.output or Path(cfg.OUTPUT_DIR) / "inference" / name)
    write_json(folder / "metrics.json", metrics)
    report(args, name, folder, metrics, annotations, args.predictions)
    if args.report:
        images = Path(images) if images and Path(images).is_dir() else None
        facts = {"predictions": args.predictions}
        page = report_page(name, annotations, args.predictions, metrics, images, cfg.TEST.EVALUATOR, facts)
        write_page(page, folder)


def score_model(args: argparse.Namespace) -> None:
    """Run the model of the configuration on each of `DATASETS.TEST`, on one process or, by torchrun, on many."""
    from tqdm import tqdm

    from retinanet.data.catalog import build_dataset
    from retinanet.data.loader import build_test_loader
    from retinanet.engine.evaluate import build_amp, evaluate
    from retinanet.engine.machine import build_placed, tune_process
    from retinanet.engine.run import choose_device
    from retinanet.engine.trained import build_trained, check_classes
    from retinanet.modeling.build import build_postprocess
    from retinanet.utils import distributed

    cfg, _ = _cli.load(args, training=False)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST: is empty; name a data set of DATASETS.CATALOG")
    if args.output and len(cfg.DATASETS.TEST) > 1:
        raise UserError(f"--output: is one folder, DATASETS.TEST names {len(cfg.DATASETS.TEST)} sets; leave it out")
    device = choose_device(cfg.DEVICE)
    distributed.start(device.type)
    tune_process(device)
    datasets = [build_dataset(cfg, name) for name in cfg.DATASETS.TEST]
    trained = build_trained(cfg)
    for dataset in datasets:
        check_classes(trained, dataset)
    model, postprocess = build_placed(cfg, trained.model, device), build_postprocess(cfg)
    for dataset in datasets:
        loader = build_test_loader(cfg, dataset, distributed.rank(), distributed.world_size())
        folder = Path(args.output or Path(cfg.OUTPUT_DIR) / "inference" / dataset.name)
        metrics, found = evaluate(
            model,
            loader,
            postprocess,
            device,
            dataset,
            folder,
            cfg.TEST.EVALUATOR,
            build_amp(cfg, device),
            progress=lambda batches: tqdm(batches, unit="batch", disable=not distributed.is_main()),
        )
        if distributed.is_main():
            report(args, dataset.name, folder, metrics, dataset.annotations_file, found)
            if args.report:
                facts = {"weights": cfg.MODEL.WEIGHTS}
                truth, images = dataset.annotations_file, dataset.images_dir
                page = report_page(dataset.name, truth, found, metrics, images, cfg.TEST.EVALUATOR, facts)
                write_page(page, folder)
    distributed.stop()


def report(args: argparse.Namespace, name: str, folder: Path, metrics: dict, annotations, found) -> None:
    """Print the tables; draw the curves when asked to."""
    if args.per_class:
        print(format_per_class(metrics))
        print()
    print(f"{name}, in percent; - where there is nothing to measure")
    print(format_metrics(metrics))
    if args.plots:
        plot_curves(annotations, found, metrics, folder / "precision_recall.png")
    print(f"written to {folder}")


def write_page(page: Page, folder: Path) -> None:
    """Write the report to `folder` and say where it is."""
    web, markdown = write_report(page, folder)
    print(f"report: {web} and {markdown}")


def plot_curves(annotations, found, metrics: dict, path: Path) -> None:
    """Draw precision over recall, for all classes together and the most frequent ones, and the rates over the score."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    truth = ground_truth(annotations)
    together, *classes = curves(truth, results(found, truth))
    rows = metrics["per_class"].items()
    named = [(row["num_boxes"], name, curve) for (name, row), curve in zip(rows, classes, strict=True)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for _, name, curve in sorted(named, key=lambda entry: -entry[0])[:8]:
        left.plot(curve["recall"], curve["precision"], lw=1, alpha=0.8, label=name)
    left.plot(together["recall"], together["precision"], "k", lw=2.5, label="all classes together")
    for rate in ("precision", "recall", "f1"):
        right.plot(together["threshold"], together[rate], label={"f1": "F1"}.get(rate, rate))
    if metrics["threshold"] is not None:
        left.plot(metrics["recall"], metrics["precision"], "ko", ms=9, label=f"highest F1: {metrics['f1']:.1f} %")
        right.axvline(metrics["threshold"], color="k", ls=":", label=f"score {metrics['threshold']:.3f}")
    left.set(xlabel="recall, %", ylabel="precision, %", title="at IoU 0.5", xlim=(0, 101), ylim=(0, 101))
    right.set(xlabel="score from which detections are kept", ylabel="%", xlim=(0, 1), ylim=(0, 101))
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error
    plt.close(figure)


if __name__ == "__main__":
    _cli.run(main)
