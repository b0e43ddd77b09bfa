"""Find objects in pictures, videos or a camera's view: drawn pictures and videos and a COCO results json come out."""

import argparse
import signal
import sys
from pathlib import Path

import _cli
from tqdm import tqdm

from retinanet.config.defaults import get_cfg
from retinanet.config.load import load_config, load_config_text
from retinanet.data.inputs import Frame, Source, find_sources, in_batches, listed, read_frames
from retinanet.data.outputs import Drawn
from retinanet.data.video import VideoError, probe, quiet
from retinanet.engine.detector import Detector, build_detector
from retinanet.engine.evaluate import to_coco
from retinanet.engine.machine import tune_process
from retinanet.engine.results_file import ResultsFile
from retinanet.engine.run import choose_device
from retinanet.engine.trained import read_state
from retinanet.errors import UserError, nearest
from retinanet.utils.background import in_background
from retinanet.utils.draw import draw_detections

EXAMPLES = """  python tools/predict.py --weights output/run/best.pth photo.jpg clip.mp4
  python tools/predict.py --weights output/run/best.pth photos/ --recursive --output drawn --score 0.4 --classes dog,cat
  python tools/predict.py --config configs/retinanet_R50_gn_fpn.yaml --weights model.pth 'photos/*.png' DEVICE cpu
  find photos -newer yesterday -name '*.jpg' | python tools/predict.py --weights output/run/best.pth -
  python tools/predict.py --weights output/run/best.pth --camera 0 --output watched

A folder stands for its image and video files in the order of their names, a pattern for what it matches, - for a list
on standard input, one path a line. Every picture is written to the output folder under its own name with its detections
drawn, every video as .mp4 (MPEG-4) without its sound; no window is opened. predictions.json there holds the same
detections as COCO results with "file_name", image ids counted from 1 and, of videos, "frame" counted from 0. What
cannot be read is reported, the rest is done, and the exit status is 2. Ctrl-C ends a video or camera early; what was
written until then is whole. A camera is written as fast as it is watched: frames that came meanwhile are left out and
the last picture stays."""

DEFAULT_SCORE = 0.5
MIN_SIDE = 240  # pixels: smaller pictures are enlarged, or their labels would cover them
AHEAD = 2  # batches that are decoded while the model runs


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    quiet()
    sources, opts = choose_sources(args)
    output = Path(args.output)
    protect(sources, output)
    rates, total = examine(sources, args.frames)
    detector, plus_one = load_detector(args, opts)
    labels = choose_classes(args.classes, detector.names)
    score = args.score if args.score is not None else detector.threshold
    score = DEFAULT_SCORE if score is None else score
    print(f"{describe(sources)}, detections with a score of {score:.3f} or more")

    results = ResultsFile(output / "predictions.json")
    drawn, bar = Drawn(sources, rates, output), tqdm(total=total, unit="frame")
    frames = in_background(read_frames(sources, args.frames), AHEAD * detector.batch_size)
    unreadable = 0
    with results, drawn, bar:
        try:
            for batch in in_batches(frames, detector.batch_size):
                if isinstance(batch[0].image, UserError):
                    unreadable += 1
                    tqdm.write(f"not read: {batch[0].image}", file=sys.stderr)
                    continue
                found = [keep(one, labels) for one in detector([frame.image for frame in batch], score)]
                results.write(to_rows(found, batch, sources, detector.classes, plus_one))
                for frame, one in zip(batch, found, strict=True):
                    shown = one["boxes"], one["labels"], one["scores"]
                    drawn.write(frame, draw_detections(frame.image, *shown, detector.names, MIN_SIDE))
                bar.update(len(batch))
        except KeyboardInterrupt:
            tqdm.write(f"interrupted; {output} holds {drawn}", file=sys.stderr)
            if args.camera is None:
                raise
        finally:
            frames.close()
    print(f"{results.count} detections in {drawn}: {output}")
    if unreadable:
        kind = "inputs" if any(source.is_video for source in sources) else "pictures"
        raise UserError(f"{unreadable} of {len(sources)} {kind} could not be read, see above")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line; `UserError` for a number that makes no sense."""
    made = _cli.parser(__doc__, EXAMPLES, config=False)
    made.add_argument("inputs", nargs="*", metavar="PATH | - | KEY VALUE", help="what to look at; keys to change")
    made.add_argument("--camera", type=int, metavar="N", help="watch the camera with this number, from 0")
    made.add_argument("--config", metavar="FILE", help="a YAML file; not needed with a checkpoint of this project")
    made.add_argument("--weights", metavar="FILE", help="default: MODEL.WEIGHTS of the configuration")
    made.add_argument("--output", metavar="FOLDER", default="output/predictions", help="default: output/predictions")
    made.add_argument("--score", type=float, help="lowest score; default: the one of the highest F1 if known, else 0.5")
    made.add_argument("--classes", metavar="A,B", help="only these classes")
    made.add_argument("--recursive", action="store_true", help="look into folders inside folders")
    made.add_argument("--frames", type=int, metavar="N", help="stop each video or camera after this many frames")
    args = _cli.parse(made, argv)
    if args.score is not None and not 0 <= args.score <= 1:
        raise UserError(f"--score: {args.score} is not between 0 and 1")
    if args.frames is not None and args.frames < 1:
        raise UserError(f"--frames: {args.frames} is not a number of frames; give 1 or more")
    if args.camera is not None and args.camera < 0:
        raise UserError(f"--camera: {args.camera} is not the number of a camera; the first is 0")
    return args


def choose_sources(args: argparse.Namespace) -> tuple[list[Source], list[str]]:
    """Return what to look at, and the `KEY VALUE` pairs."""
    words, opts = split_inputs(args.inputs)
    if args.camera is None:
        if not words:
            raise UserError("no picture is named; give files, folders or patterns, or --camera N")
        return find_sources(listed(words, sys.stdin), args.recursive), opts
    if words:
        raise UserError(f"--camera: files are named as well ({words[0]}); look at one or the other")
    return [Source(args.camera, Path(f"camera_{args.camera}.mp4"))], opts


def split_inputs(words: list[str]) -> tuple[list[str], list[str]]:
    """Return paths, and `KEY VALUE` pairs: a word that begins like a configuration key and is no file, and the next."""
    paths, opts, sections = [], [], set(get_cfg())
    remaining = iter(words)
    for word in remaining:
        if word.split(".")[0] in sections and not Path(word).exists():
            opts += [word, *(value for value in [next(remaining, None)] if value is not None)]
        else:
            paths.append(word)
    return paths, opts


def protect(sources: list[Source], output: Path) -> None:
    """Raise `UserError` when a drawn picture or video would replace one of the inputs themselves."""
    originals = {source.path.resolve() for source in sources if isinstance(source.path, Path)}
    for source in sources:
        if (output / source.name).resolve() in originals:
            raise UserError(f"--output: {output / source.name} is one of the inputs themselves; choose another folder")


def examine(sources: list[Source], limit: int | None) -> tuple[dict[int, float], int | None]:
    """Return the frames per second of each video, by its number, and how many frames there are in all, None where a
    video does not tell.

    A camera that is not there is an error; a file that cannot be opened counts as none and is reported in its turn.
    """
    rates, counts = {}, [1 for source in sources if not source.is_video]
    for number, source in enumerate(sources):
        if not source.is_video:
            continue
        try:
            info = probe(source.path)
        except VideoError:
            if not isinstance(source.path, Path):
                raise
            continue
        rates[number] = info.rate
        known = [count for count in (info.count, limit) if count is not None]
        counts.append(min(known) if known else None)
    return rates, None if None in counts else sum(counts)


def describe(sources: list[Source]) -> str:
    """Return what is looked at, such as "3 pictures and 2 videos"."""
    if not isinstance(sources[0].path, Path):
        return f"camera {sources[0].path} until Ctrl-C"
    videos = sum(source.is_video for source in sources)
    counts = {"picture": len(sources) - videos, "video": videos}
    return " and ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)


def load_detector(args: argparse.Namespace, opts: list[str]) -> tuple[Detector, bool]:
    """Return the detector and whether its boxes are Detectron's, with x2 inside the box."""
    state = None
    if args.config:
        cfg = load_config(args.config, opts)
    elif args.weights:
        state = read_state(args.weights)
        cfg = load_config_text(state["config"], f"the configuration in {args.weights}", opts)
    else:
        raise UserError("--weights FILE is missing, or --config FILE with MODEL.WEIGHTS")
    tune_process(choose_device(cfg.DEVICE))
    return build_detector(cfg, args.weights, cfg.DEVICE, state), cfg.MODEL.BOX.CONVENTION == "detectron"


def choose_classes(wanted: str | None, names: list[str]) -> set[int]:
    """Return the labels of the comma-separated names, of all classes when None."""
    if wanted is None:
        return set(range(len(names)))
    for name in wanted.split(","):
        if name not in names:
            raise UserError(f"--classes: {name!r} is not one of {', '.join(names)}{nearest(name, names)}")
    return {names.index(name) for name in wanted.split(",")}


def keep(found: dict, labels: set[int]) -> dict:
    """Return the detections whose label is one of `labels`."""
    kept = [index for index, label in enumerate(found["labels"].tolist()) if label in labels]
    return {key: found[key][kept] for key in ("boxes", "scores", "labels")}


def to_rows(found: list[dict], batch: list[Frame], sources: list[Source], classes: list[dict], plus_one: bool):
    """Return COCO results with the name of the file, or the number of the camera, and of the frame in front."""
    where = {}
    for frame in batch:
        name = {"file_name": str(sources[frame.source].path)}
        where[frame.image_id] = name if frame.number is None else name | {"frame": frame.number}
    rows = to_coco(found, list(where), [entry["id"] for entry in classes], plus_one)
    return [{**where[row["image_id"]], **row} for row in rows]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a video as Ctrl-C does: so that it plays
    _cli.run(main)
