"""Downloads from a server on this machine: resumed, checked, atomic; and what is said without network."""

import hashlib
import http.server
import logging
import threading
from pathlib import Path

import pytest

from retinanet.errors import UserError
from retinanet.weights import download
from retinanet.weights.download import cache_folder, fetch, file_digest, locate, published_digest
from retinanet.weights.zoo import Entry

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT under every path; `state` says how, and lists the requests."""

    def do_GET(self):
        state = self.server.state
        state["requests"].append(dict(self.headers) | {"path": self.path})
        if self.path.startswith("/absent"):
            self.send_error(404)
            return
        start, content = 0, state["content"]
        wants = self.headers.get("Range")
        if wants and state["ranges"] and self.headers.get("If-Range") == state["etag"]:
            start = int(wants.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content) and start:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if state["etag"]:
            self.send_header("ETag", state["etag"])
        self.end_headers()
        stop = state["stops"].pop(0) if state["stops"] else len(content)
        self.wfile.write(content[start : max(start, stop)])
        if stop < len(content):
            self.connection.close()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, state): a server, an empty cache, and no waiting between attempts."""
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.state = {"content": CONTENT, "etag": '"one"', "ranges": True, "stops": [], "requests": []}
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", running.state
        running.shutdown()
        thread.join()


def partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def test_a_file_is_fetched_once(server):
    address, state = server
    first = locate(f"{address}/models/weights.pth").file
    assert first.read_bytes() == CONTENT
    assert first.relative_to(cache_folder()).parts[1:] == ("models", "weights.pth")
    assert locate(f"{address}/models/weights.pth").file == first
    assert len(state["requests"]) == 1
    assert sorted(path.name for path in first.parent.iterdir()) == [".weights.pth.lock", "weights.pth"]


def test_a_broken_connection_goes_on_where_it_stopped(server, caplog):
    address, state = server
    state["stops"] = [300_000, 700_000]
    with caplog.at_level(logging.WARNING):
        assert locate(f"{address}/w.pth").file.read_bytes() == CONTENT
    starts = [request.get("Range") for request in state["requests"]]
    assert starts == [None, "bytes=300000-", "bytes=700000-"]
    assert caplog.text.count("interrupted") == 2


def test_a_later_run_goes_on_where_an_earlier_one_was_killed(server):
    address, state = server
    target = locate(f"{address}/w.pth").file
    target.unlink()
    partial_of(target).write_bytes(CONTENT[:1000])
    target.with_name("w.pth.partial.etag").write_text('"one"')
    assert locate(f"{address}/w.pth").file.read_bytes() == CONTENT
    assert state["requests"][-1]["Range"] == "bytes=1000-"


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changed_meanwhile_starts_over(ranges, server):
    address, state = server
    target = cache_folder() / address.removeprefix("http://").replace(":", "_") / "w.pth"
    target.parent.mkdir(parents=True)
    partial_of(target).write_bytes(b"old" * 100)
    target.with_name("w.pth.partial.etag").write_text('"zero"' if ranges else '"one"')
    state["ranges"] = ranges
    assert locate(f"{address}/w.pth").file.read_bytes() == CONTENT


def test_a_part_of_unknown_origin_starts_over(server):
    address, state = server
    target = cache_folder() / address.removeprefix("http://").replace(":", "_") / "w.pth"
    target.parent.mkdir(parents=True)
    partial_of(target).write_bytes(b"who knows" * 100)
    assert locate(f"{address}/w.pth").file.read_bytes() == CONTENT
    assert "Range" not in state["requests"][0]


def test_a_part_that_is_already_whole_is_fetched_again(server):
    address, state = server
    target = cache_folder() / address.removeprefix("http://").replace(":", "_") / "w.pth"
    target.parent.mkdir(parents=True)
    partial_of(target).write_bytes(CONTENT + b"more")
    target.with_name("w.pth.partial.etag").write_text('"one"')
    assert locate(f"{address}/w.pth").file.read_bytes() == CONTENT


def test_a_connection_that_brings_nothing_ends_in_an_error_that_names_the_place(server):
    address, state = server
    state["stops"] = [0] * 9
    with pytest.raises(UserError, match=r"cannot be fetched.*put it at .*cache.*w\.pth, or set MODEL\.WEIGHTS"):
        locate(f"{address}/w.pth")
    assert len(state["requests"]) == 1
    assert not list(cache_folder().rglob("w.pth"))


def test_a_digest_in_the_url_is_checked(server):
    address, _ = server
    right = hashlib.sha256(CONTENT).hexdigest()
    assert locate(f"{address}/right.pth#sha256={right}").file.read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"another sha256 than the 00000000.*thrown away"):
        locate(f"{address}/wrong.pth#sha256={'0' * 64}")
    assert not list(cache_folder().rglob("wrong.pth*"))


def test_published_digests_are_read_from_names():
    tv = "https://download.pytorch.org/models/retinanet_resnet50_fpn_coco-eeacb38b.pth"
    d2 = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl"
    assert published_digest(tv) == ("sha256", "eeacb38b")
    assert published_digest(d2) == ("md5", "bfca0b")
    assert published_digest("https://example.org/resnet-12345678.pth") == ("", "")


def test_the_digest_of_a_file_by_hand(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc", "md5") == "900150983cd24fb0d6963f7d28e17f72"  # RFC 1321


def test_an_answer_of_the_server_is_told(server):
    with pytest.raises(UserError, match=r"the server answers 404"):
        locate(f"{server[0]}/absent.pth")


def test_without_network_the_place_by_hand_is_named_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)
    place = tmp_path / "dl.fbaipublicfiles.com/detectron/ImageNetPretrained/MSRA/R-50.pkl"
    with pytest.raises(UserError, match=rf"Network is unreachable.*Without network, fetch it elsewhere.*{place}"):
        locate("detectron://ImageNetPretrained/MSRA/R-50.pkl")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"by hand")
    assert locate("detectron://R-50").file == place


def test_files_without_an_address_say_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"download it from https://www\.dropbox\.com.*put it at .*R50-wc\.pth"):
        locate("mabn://R50-wc.pth")


def test_progress_is_logged(server, caplog, monkeypatch):
    monkeypatch.setattr(download, "_PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO):
        locate(f"{server[0]}/w.pth")
    assert "1 of 1 MiB, 100 %" in caplog.text


def test_processes_that_want_the_same_file_fetch_it_once(server):
    address, state = server
    entry = Entry(f"{address}/shared.pth")
    threads = [threading.Thread(target=fetch, args=(entry,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(state["requests"]) == 1


def test_a_url_cannot_leave_the_cache(server):
    address, _ = server
    found = locate(f"{address}/../../a/../b.pth?x=1").file
    assert cache_folder() in found.parents
    assert found.read_bytes() == CONTENT


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv("RETINANET_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "retinanet"


def test_local_files_are_taken_as_they_are(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    assert locate(tmp_path / "w.pth").file == tmp_path / "w.pth"
