"""The doctor: say what is wrong with a data set, repair a copy, and propose anchors that fit its boxes."""

import argparse
import gc
import os
import shlex
import sys
from pathlib import Path

import _cli

from retinanet.config.check import check_config
from retinanet.config.load import load_config_text, resolve_path
from retinanet.data.doctor import (
    SEVERITIES,
    Finding,
    Report,
    Source,
    build_sources,
    compare,
    errors,
    examine,
    repair,
    write_repaired,
)
from retinanet.engine.coco_json import write_json
from retinanet.engine.coverage import (
    NARROW,
    THRESHOLDS,
    AnchorReport,
    AnchorSetting,
    Coverage,
    build_anchor_report,
)
from retinanet.errors import UserError

EXAMPLES = """  python tools/check_dataset.py --config configs/finetune_custom.yaml
  python tools/check_dataset.py --config configs/finetune_custom.yaml --images --json report.json
  python tools/check_dataset.py --annotations my/train.json --images-dir my/images --fix my/train_fixed.json
  python tools/check_dataset.py --config configs/finetune_custom.yaml --propose configs/my_anchors.yaml

without --config: one data set, with the default INPUT and MODEL.ANCHORS; KEY VALUE pairs change them
exit status: 0 when nothing or only warnings were found, 2 for errors (or, with --fix, for errors that remain)"""
_ALL_CLASSES, _FIRST, _LAST = 20, 10, 5  # rows of the table of classes: all up to 20, else the ends
_MANY_NARROW = 0.05  # share of boxes narrower than a stride from which larger images are advised


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--annotations", metavar="FILE", help="check this COCO json instead of DATASETS.TRAIN and TEST")
    made.add_argument("--images-dir", metavar="FOLDER", help="with --annotations: where its images are")
    made.add_argument("--images", action="store_true", help="read every image file as training does")
    made.add_argument("--fix", metavar="OUT", help="write a repaired copy: a .json file, or a folder for several sets")
    made.add_argument("--json", metavar="OUT", help="write all findings, with all ids, as json")
    made.add_argument("--propose", metavar="OUT", help="write the proposed anchor setting as a YAML file")
    args = _cli.parse(made, argv)
    cfg, train, test = load(args)
    check_outputs(args, train + test)
    learned = [look_at(cfg, args, source) for source in train]
    reports = learned + [look_at(cfg, args, source) for source in test]
    shared = compare(learned, reports[len(learned) :])
    print_findings("between the data sets", shared)
    anchors = build_anchor_report(cfg, learned)
    if anchors:
        print_anchors(anchors)
    if args.json:
        write_json(Path(args.json), as_json(reports, shared, anchors))
        print(f"findings written to {args.json}")
    if args.propose:
        write_proposal(args, anchors)
    remaining = [*shared, *(finding for report in reports for finding in report.findings)]
    if args.fix:
        remaining = [*shared, *(finding for report in reports for finding in write_fixed(args, report))]
    finish(errors(remaining), bool(args.fix))


def as_json(reports: list[Report], shared: list[Finding], anchors: AnchorReport | None) -> dict:
    """Return what `--json` writes."""
    return {
        "datasets": [report.as_dict() for report in reports],
        "between": [finding.as_dict() for finding in shared],
        "anchors": anchors.as_dict() if anchors else None,
    }


def load(args: argparse.Namespace):
    """Return the configuration and the sources of training and of test sets."""
    if args.annotations:
        cfg = _cli.load(args, training=False)[0] if args.config else load_config_text("", "command line", args.opts)
        check_config(cfg, training=False)
        folder = Path(args.images_dir).expanduser() if args.images_dir else None
        if args.images and folder is None:
            raise UserError("--images: needs --images-dir FOLDER beside --annotations")
        path = Path(args.annotations).expanduser()
        sources = [Source(path.stem, path, folder)], []
    else:
        if args.images_dir:
            raise UserError(
                "--images-dir: goes with --annotations FILE; a configuration names its folders in the catalog"
            )
        if not args.config:
            raise UserError("give --config FILE, or --annotations FILE and --images-dir FOLDER")
        cfg, _ = _cli.load(args, training=False)
        sources = build_sources(cfg)
    if not any(sources):
        raise UserError("DATASETS.TRAIN and DATASETS.TEST are empty, there is nothing to check")
    return cfg, *sources


def check_outputs(args: argparse.Namespace, sources: list[Source]) -> None:
    """Refuse outputs that would write over an input or over each other, before any work."""
    if args.fix and args.fix.endswith(".json") and len(sources) > 1:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"--fix: one file cannot hold the {len(sources)} sets {names}; give a folder, or one set alone")
    for flag, out in (("--fix", args.fix), ("--json", args.json), ("--propose", args.propose)):
        taken = [source.annotations for source in sources] + ([resolve_path(args.config)] if args.config else [])
        if out and any(os.path.realpath(out) == os.path.realpath(path) for path in taken):
            raise UserError(f"{flag}: {out} is one of the files to be checked; inputs are never overwritten")


def look_at(cfg, args: argparse.Namespace, source: Source) -> Report:
    """Examine one data set and print what was found."""
    from tqdm import tqdm

    def progress(items, total):
        return tqdm(items, total=total, unit="image", desc=source.name)

    report = examine(source, args.images, max(cfg.DATALOADER.NUM_WORKERS, 1), progress)
    overview = report.overview
    print(f"{source.name}: {source.annotations}")
    print(f"  {overview['images']} images in {source.images_dir or 'a folder that was not given'}")
    sizes = ", ".join(f"{overview[size]} {size}" for size in ("small", "medium", "large"))
    print(
        f"  {overview['boxes']} boxes ({sizes}), {overview['crowds']} crowds, {overview['empty_images']} empty images"
    )
    print_classes(overview["classes"])
    print_findings("findings", report.findings)
    return report


def print_classes(classes: dict[str, dict[str, int]]) -> None:
    """Print the histogram, most frequent class first."""
    rows = list(classes.items())
    if len(rows) > _ALL_CLASSES:
        hidden = len(rows) - _FIRST - _LAST
        rows = [*rows[:_FIRST], (f"... {hidden} more", None), *rows[-_LAST:]]
    print(f"  {'class':30} {'boxes':>8} {'images':>8}")
    for name, counts in rows:
        numbers = f" {counts['boxes']:8} {counts['images']:8}" if counts else ""
        print(f"  {name if name.isprintable() else ascii(name):30.60}{numbers}")


def print_findings(title: str, findings: list[Finding]) -> None:
    """Print findings by falling severity, each with what --fix does about it."""
    if findings:
        print(f"  {title}:")
    for finding in sorted(findings, key=lambda one: SEVERITIES.index(one.severity)):
        print(f"    {finding}")
        if finding.fix:
            print(f"      --fix: {finding.fix}")


def print_anchors(anchors: AnchorReport) -> None:
    """Print the anchor coverage of the training boxes, and the proposal as it can be pasted."""
    print_coverage("anchors of the configuration", anchors.current, anchors.measured)
    print_findings("findings", anchors.findings)
    if anchors.proposal == anchors.current:
        print("  no other anchor setting covers 2 % more of the boxes")
    else:
        print_coverage("proposed anchors", anchors.proposal, anchors.better)
        print(f"    {' '.join(f'{key} {shlex.quote(value)}' for key, value in anchors.proposal.as_opts())}")
        ours, theirs = anchors.proposal.num_anchors, anchors.current.num_anchors
        if ours != theirs:
            print(
                f"    {ours} anchors per cell, not {theirs}: prediction layers trained with the old setting do not fit"
            )
    if anchors.narrow > _MANY_NARROW:
        share = f"{100 * anchors.narrow:.0f} % of the boxes"
        print(f"  {share} are narrower than {NARROW:g} pixels after the resize: raise INPUT.MIN_SIZE_* and MAX_SIZE_*")


def print_coverage(title: str, setting: AnchorSetting, measured: dict[str, Coverage]) -> None:
    """Print one table of coverage."""
    values = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in setting.as_opts())
    print(f"  {title}: {values}")
    heads = "".join(f" IoU >= {threshold}" for threshold in THRESHOLDS)
    print(f"    {'size':8} {'boxes':>8}{heads} {'mean IoU':>9}")
    for name, one in measured.items():
        shares = "".join(f"{100 * one.above[t]:10.1f}%" for t in THRESHOLDS)
        print(f"    {name:8} {one.boxes:8}{shares} {one.mean:9.3f}")


def write_proposal(args: argparse.Namespace, anchors: AnchorReport | None) -> None:
    """Write a configuration that changes the anchors of the given one."""
    if anchors is None:
        raise UserError("--propose: the training sets have no box to propose anchors for")
    path = Path(args.propose)
    lines = [f"# proposed by: python tools/check_dataset.py {ascii(shlex.join(sys.argv[1:]))[1:-1]}"]
    if args.config:
        base = os.path.realpath(resolve_path(args.config))
        lines.append(f"_BASE_: {os.path.relpath(base, os.path.realpath(path.parent))}")
    lines += ["MODEL:", "  ANCHORS:"]
    lines += [f"    {key.rpartition('.')[2]}: {value}" for key, value in anchors.proposal.as_opts()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--propose: {path} cannot be written ({error.strerror})") from error
    print(f"anchor setting written to {path}")


def write_fixed(args: argparse.Namespace, report: Report) -> list[Finding]:
    """Write a repaired copy, print each change, and return what is found in the copy."""
    out = Path(args.fix)
    path = out if args.fix.endswith(".json") else out / f"{report.source.name}.json"
    changes = repair(report)
    write_repaired(report, path)
    print(f"{report.source.name}: repaired copy written to {path}")
    for change in changes:
        print(f"    {change}")
    if not changes:
        print("    nothing to repair, the copy equals the original")
    again = examine(Source(report.source.name, path, report.source.images_dir, report.source.max_degenerate))
    print_findings("findings that remain", [one for one in again.findings if one.severity != SEVERITIES[-1]])
    return again.findings


def finish(wrong: list[Finding], fixed: bool) -> None:
    """End with status 0, or with 2 when there are errors."""
    if not wrong:
        print("no errors")
        return
    kinds = ", ".join(dict.fromkeys(finding.kind for finding in wrong))
    repairable = sum(bool(finding.fix) for finding in wrong)
    advice = f"; --fix OUT.json repairs {repairable} of them in a copy" if repairable and not fixed else ""
    number = f"{len(wrong)} error" + "s" * (len(wrong) > 1)
    raise UserError(f"{number}: {kinds}{advice}. docs/datasets.md explains each kind")


if __name__ == "__main__":
    gc.disable()  # a large json is millions of records without cycles, and to visit them again and again takes seconds
    _cli.run(main)
