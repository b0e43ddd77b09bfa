"""From what `MODEL.WEIGHTS` says to a file on this machine: local paths, URLs and names of the zoo.

Downloads go to a cache (`RETINANET_CACHE`, else `~/.cache/retinanet`) under the host and path of their URL. They go on
where they stopped, are checked against the digest that the publisher states, and get their name only when whole.
"""

import contextlib
import hashlib
import logging
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from retinanet.errors import UserError, nearest
from retinanet.weights.classes import COCO
from retinanet.weights.zoo import ZOO, Entry, resolve

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20  # bytes
_PROGRESS_SECONDS = 5.0
_TIMEOUT_SECONDS = 30.0
_RETRIES = 3


@dataclass(frozen=True)
class Located:
    """file: on this machine. classes: names of the class rows, where the zoo knows them."""

    file: Path
    classes: tuple[str, ...] = ()


def locate(name: str | Path) -> Located:
    """Return the file that `name` means, downloaded if it must be; raises `UserError` when there is none."""
    name = str(name)
    if "://" not in name:
        if not Path(name).expanduser().exists():
            hint = nearest(name, ZOO) or "; names of public weights are listed in docs/weights.md"
            raise UserError(f"MODEL.WEIGHTS: there is no file {name!r}{hint}")
        return Located(Path(name).expanduser())
    entry = resolve(name)
    return Located(fetch(entry), tuple(COCO.values()) if entry.is_coco else ())


def cache_folder() -> Path:
    """Return the folder of downloads; it need not exist yet."""
    chosen = os.environ.get("RETINANET_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "retinanet"


def fetch(entry: Entry) -> Path:
    """Return the file of `entry` in the cache, downloaded where it is not there yet.

    Raises `UserError`, which names the place for a file that was fetched by hand, when the network or the server
    fails, and when the digest is wrong.
    """
    url, _, fragment = entry.url.partition("#")
    target = _place(url)
    if target.exists():
        return target
    if entry.by_hand:
        raise UserError(
            f"{url}: has no address that a program could fetch; download it from {entry.by_hand} and put it at {target}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):  # of several processes, one downloads
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            _download(url, partial, target)
            _check_digest(url, fragment, partial, target)
            os.replace(partial, target)
    return target


def file_digest(path: Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _place(url: str) -> Path:
    parts = urlsplit(url)
    folders = [part for part in parts.path.split("/") if part not in ("", ".", "..")]
    if parts.query:
        folders.append(hashlib.sha256(parts.query.encode()).hexdigest()[:12])
    return cache_folder().joinpath(parts.netloc.replace(":", "_"), *folders)


@contextlib.contextmanager
def _lock(target: Path):
    try:
        import fcntl
    except ImportError:  # Windows: no second process waits, the last one to finish wins
        yield
        return
    with open(target.with_name(f".{target.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, partial: Path, target: Path) -> None:
    by_hand = f"Without network, fetch it elsewhere and put it at {target}, or set MODEL.WEIGHTS to a local file"
    for attempt in range(_RETRIES + 1):
        before = partial.stat().st_size if partial.exists() else 0
        try:
            return _receive(url, partial)
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # nothing lies behind what we have: it is whole, or not this file
                partial.unlink()
                continue
            raise UserError(f"{url}: the server answers {error.code} {error.reason}. {by_hand}") from error
        except (OSError, EOFError) as error:  # URLError, timeouts and broken connections are OSErrors
            moved = partial.exists() and partial.stat().st_size > before
            if attempt == _RETRIES or not moved:
                reason = getattr(error, "reason", error)
                raise UserError(f"{url}: cannot be fetched ({reason}). {by_hand}") from error
            _log.warning("%s: interrupted (%s), going on", url, error)
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _receive(url: str, partial: Path) -> None:
    """Append to `partial` what it lacks; starts over when the server's file is another one by now."""
    tag_file = partial.with_name(f"{partial.name}.etag")
    have = partial.stat().st_size if partial.exists() and tag_file.exists() else 0
    headers = {"User-Agent": "retinanet"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag_file.read_text()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS) as answer:
        resumed = answer.status == 206
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        tag_file.write_text(tag) if tag else tag_file.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        done = have if resumed else 0
        total = done + int(length) if length else 0
        with open(partial, "ab" if resumed else "wb") as file:
            _copy(answer, file, url, done, total)
    if total and partial.stat().st_size != total:
        raise EOFError(f"{partial.stat().st_size} of {total} bytes came")
    tag_file.unlink(missing_ok=True)


def _copy(answer, file, url: str, done: int, total: int) -> None:
    shown = time.monotonic() - _PROGRESS_SECONDS
    while chunk := answer.read(_CHUNK):
        file.write(chunk)
        done += len(chunk)
        if time.monotonic() - shown >= _PROGRESS_SECONDS:
            shown = time.monotonic()
            share = f" of {total / 2**20:.0f} MiB, {100 * done / total:.0f} %" if total else " MiB"
            _log.info("downloading %s: %.0f%s", url, done / 2**20, share)


def _check_digest(url: str, fragment: str, partial: Path, target: Path) -> None:
    algorithm, expected = published_digest(url, fragment)
    if expected and not file_digest(partial, algorithm).startswith(expected):
        partial.unlink()
        raise UserError(
            f"{url}: what came has another {algorithm} than the {expected}... that is published; it was thrown away. "
            f"Try again, or put a good copy at {target}"
        )


def published_digest(url: str, fragment: str = "") -> tuple[str, str]:
    """Return (algorithm, first digits) of the file behind `url`, ("", "") when nothing is published.

    A URL may end in `#sha256=...`. torchvision's file names end in the start of the SHA-256 (`torch.hub`), detectron2's
    in the start of the MD5 (its `MODEL_ZOO.md`).
    """
    stated = re.fullmatch(r"(sha256|md5)=([0-9a-fA-F]{8,})", fragment)
    if stated:
        return stated[1], stated[2].lower()
    for pattern, algorithm in (
        (r"https://download\.pytorch\.org/.*-([0-9a-f]{8,})\.pth", "sha256"),
        (r"https://dl\.fbaipublicfiles\.com/detectron2/.*/model_final_([0-9a-f]{6})\.pkl", "md5"),
    ):
        found = re.fullmatch(pattern, url)
        if found:
            return algorithm, found[1]
    return "", ""
