"""The download of published weights, from a server of our own on 127.0.0.1."""

import fcntl
import hashlib
import http.server
import importlib
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

CONTENT = bytes(range(256)) * 4000  # 1 MB and more than one chunk
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as /file, with ranges; breaks off after `cut` bytes, `cuts` times."""

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        server.tokens.append(self.headers.get("Authorization"))
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        if self.path == "/gone":
            self.send_error(404)
            return
        if self.path == "/page":
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")
            return
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if self.headers.get("Range") and server.knows_ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.cuts > 0:
            server.cuts -= 1
            body = body[:server.cut]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.ranges, server.tokens, server.cuts, server.cut, server.knows_ranges = [], [], 0, 300_000, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def download(server, monkeypatch, tmp_path):
    """Runs download_weights.py, whose table has one file of the server's."""
    module = importlib.import_module("download_weights")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)

    def run(*names, path="/file", size=SIZE, sha256=SHA256):
        url = f"http://127.0.0.1:{server.server_port}{path}" if path else None
        monkeypatch.setattr(module, "FILES", (module.Weights("a model.bin", "a test's", url, size, sha256, "none", about="small"),))
        monkeypatch.setattr(sys, "argv", ["download_weights.py", *names, "--output", str(tmp_path / "weights")])
        module.main()
        return (tmp_path / "weights" / "a model.bin").read_bytes()
    return run


def test_a_file_is_fetched_checked_and_kept(download, server, tmp_path, capsys):
    assert download() == CONTENT and "downloaded, checked (licence: none)" in capsys.readouterr().out
    assert download() == CONTENT and "there already, checked" in capsys.readouterr().out
    assert server.ranges == [None] and [path.name for path in (tmp_path / "weights").iterdir()] == ["a model.bin"]


def test_broken_connections_are_taken_up_where_they_broke(download, server):
    server.cuts = 2
    assert download() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_a_stopped_download_goes_on(download, server, tmp_path, capsys):
    server.cuts = 99
    server.cut = 100
    with pytest.raises(SystemExit, match=r"could not be downloaded .*; 0 MB are kept, run this again to go on\. Without internet, get it elsewhere"):
        download()
    server.cuts = 0
    assert download() == CONTENT and server.ranges[-1] == "bytes=500-"
    (tmp_path / "weights" / "a model.bin").rename(tmp_path / "weights" / "a model.bin.part")  # stopped before it was checked, its size known or not
    assert download(size=None) == CONTENT
    server.knows_ranges = False
    (tmp_path / "weights" / "a model.bin").unlink()
    (tmp_path / "weights" / "a model.bin.part").write_bytes(CONTENT[:77])
    assert download() == CONTENT


def test_another_file_is_not_taken_for_it(download, tmp_path):
    folder = tmp_path / "weights"
    with pytest.raises(SystemExit, match=r"is not the published file \(SHA-256 000"):
        download(sha256="0" * 64)
    with pytest.raises(SystemExit, match="it has 1,024,000 bytes, expected 5"):
        download(size=5)
    with pytest.raises(SystemExit, match="the server sent a page"):
        download(path="/page", size=None)
    assert not list(folder.iterdir())
    (folder / "a model.bin").write_bytes(b"the user's own")
    with pytest.raises(SystemExit, match="is there, but is not the published file"):
        download()
    assert (folder / "a model.bin").read_bytes() == b"the user's own"


def test_no_server_no_file_no_space_end_in_one_line(download, server, monkeypatch, tmp_path):
    cases = [({"path": "/gone"}, "the server answers 404 Not Found"), ({"path": None}, "has no public address: put it at")]
    for options, said in cases:
        with pytest.raises(SystemExit, match=said) as error:
            download("a model", **options)
        assert "\n" not in str(error.value) and str(error.value).startswith("error: ")
    with pytest.raises(SystemExit, match=r"no weights 'b'; there are a model\.bin"):
        download("b")
    with open(tmp_path / "weights" / "a model.bin.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another download of it is running"):
            download()
    module = importlib.import_module("download_weights")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(SystemExit, match=r"0\.0 GB are still to come, but only 0\.0 GB are free"):
        download()
    server.shutdown()
    server.server_close()
    with pytest.raises(SystemExit, match=r"could not be downloaded \(.*Connection refused\)\. Without internet, get it elsewhere") as error:
        download()
    assert "\n" not in str(error.value)


def test_a_token_is_for_the_hub_alone(download, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert download(path="/elsewhere") == CONTENT and server.tokens == [None, None]
    (Path(sys.argv[-1]) / "a model.bin").unlink()
    monkeypatch.setattr("download_weights.HUB", f"http://127.0.0.1:{server.server_port}")
    assert download(path="/elsewhere") == CONTENT and server.tokens[2:] == ["Bearer hf_secret", None]


def test_a_file_that_is_not_given_does_not_keep_the_others(download, server, monkeypatch, capsys, tmp_path):
    assert download() == CONTENT  # fills the table
    module = importlib.import_module("download_weights")
    (there,) = module.FILES
    monkeypatch.setattr(module, "FILES", (replace(there, name="gated.bin", url=there.url.replace("/file", "/gone")), replace(there, name="b.bin")))
    monkeypatch.setattr(sys, "argv", ["download_weights.py", "--output", str(tmp_path / "weights")])
    with pytest.raises(SystemExit, match=r"error: gated\.bin could not be had, as told above"):
        module.main()
    assert (tmp_path / "weights" / "b.bin").read_bytes() == CONTENT and "the server answers 404" in capsys.readouterr().err


def test_the_table(monkeypatch, capsys, tmp_path):
    """Every file has an address with a published checksum, or says that it has neither."""
    module = importlib.import_module("download_weights")
    monkeypatch.setattr(sys, "argv", ["download_weights.py", "--list", "--output", str(tmp_path)])
    module.main()
    out = capsys.readouterr().out
    for weights in module.FILES:
        assert weights.name in out and weights.licence in out and (weights.url or "no public address") in out
        assert (weights.sha256 is None) == (weights.url is None) and (not weights.url or (weights.url.startswith("https://") and len(weights.sha256) == 64))
    assert "SHA-256 not published" in out and "4.27 GB" in out
