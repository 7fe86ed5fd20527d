"""Files, folders and datasets of the hub: what counts as rows, in which order, and what is said if there are none."""

import hashlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from http_stand_in import StandIn, serving

from future_l1_plugin.data.sources import data_files, is_dataset, read_rows, short_names
from future_l1_plugin.errors import DataError


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def names(files, folder):
    return [file.relative_to(folder).as_posix() for file in files]


FOLDER = {
    "b.jsonl": {"id": 1},
    "a.json": [{"id": 2}],
    "deep/er/c.JSON": {"data": [{"id": 3}]},
    "deep/d.parquet": b"",
    "bom.json": b"\xef\xbb\xbf\n [1]",
    "broken.json": b'{"data": [',  # reading it says so; leaving it out would not
    "dataset_infos.json": {"default": {"splits": {}}},
    "word.json": "hello",
    "README.md": b"",
    "clip.mp4": b"",
    ".hidden.json": [1],
    ".cache/a.json": [1],
}
ROWS = ["a.json", "b.jsonl", "bom.json", "broken.json", "deep/d.parquet", "deep/er/c.JSON"]

# Files and folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.json", "rows.JSONL", "rows.parquet", ".hidden.jsonl"])
def test_a_file_is_itself(tmp_path, name):
    (tmp_path / name).write_text("{}")
    assert data_files(tmp_path / name) == data_files(str(tmp_path / name)) == [tmp_path / name]


def test_a_folder_is_its_files_of_rows(tmp_path):
    fill(tmp_path / "data", FOLDER)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert names(data_files(tmp_path / "data"), tmp_path / "data") == ROWS
    assert names(data_files(tmp_path / "link"), tmp_path / "link") == ROWS


def test_nothing_to_read(tmp_path):
    fill(tmp_path, {"rows.csv": b"", "empty/README.md": b""})
    with pytest.raises(DataError, match=r"rows.csv: cannot tell its format, expected .*\.parquet\. Rename it\.$"):
        data_files(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="empty: no file of records in this folder"):
        data_files(tmp_path / "empty")
    for missing in (tmp_path / "none", "none.json", "none", "./org/name", "../org/name", "a/b/c", "org/rows.json"):
        with pytest.raises(DataError, match="no such file of records"):
            data_files(missing)


def test_rows_know_where_they_stand(tmp_path):
    files = [tmp_path / name for name in ("a/rows.jsonl", "b/rows.jsonl", "b/more.parquet")]
    fill(tmp_path, {"a/rows.jsonl": b'{"n": 1}\n\n{"n": 2}', "b/rows.jsonl": b'{"n": 3\n'})
    pq.write_table(pa.table({"n": [4, 5]}), files[2])
    rows = list(read_rows(files))
    assert [row.value for row in rows if isinstance(row.value, dict)] == [{"n": n} for n in (1, 2, 4, 5)]
    assert rows[2].value.doc == '{"n": 3\n'
    places = ["a/rows.jsonl:1", "a/rows.jsonl:3", "b/rows.jsonl:1", "b/more.parquet:1", "b/more.parquet:2"]
    assert [row.source for row in rows] == [f"{tmp_path}/{place}" for place in places]
    unnamed = ["a/rows.jsonl:1", "a/rows.jsonl:3", "b/rows.jsonl:1", "more.parquet:1", "more.parquet:2"]
    assert [row.unnamed for row in rows] == unnamed


def test_short_names():
    assert short_names([Path("/x/a.json"), Path("/x/b.json")]) == ["a.json", "b.json"]
    assert short_names([Path("/1/x/a"), Path("/2/x/a"), Path("/1/y/a")]) == ["1/x/a", "2/x/a", "y/a"]
    assert short_names([Path("x/a"), Path("a")]) == ["x/a", "a"]


# The hub ------------------------------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
DATASET = {
    "data/train-00000-of-00002.jsonl": b'{"id": 1}',
    "data/train-00001-of-00002.jsonl": b'{"id": 2}',
    "data/test.jsonl": b'{"id": 3}',
    "pretrain/rows.jsonl": b'{"id": 4}',  # "train" is no word of this, nor of the next
    "training.jsonl": b'{"id": 5}',
    "dataset_infos.json": b'{"train": 1}',
    "videos/train.zip": b"zip",
    "videos/train/1.mp4": b"mp4",
    "README.md": b"# train",
}


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download takes; notes what was asked for."""

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body):
        self.server.asked.append(f"{self.command} {self.path}")
        place = self.path.split("?")[0].removeprefix("/api").removeprefix("/datasets/")
        if place.startswith("org/gated"):
            return self.say(403, b"{}", with_body, {"X-Error-Code": "GatedRepo"})
        if not place.startswith("org/name/"):
            return self.say(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        kind, revision, *file = place.removeprefix("org/name/").split("/", 2)
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.say(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            return self.say(200, json.dumps({"id": "org/name", "sha": commit}).encode(), with_body)
        if kind == "tree":
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in DATASET.items()
            ]
            return self.say(200, json.dumps(rows).encode(), with_body)
        data = DATASET[file[0]]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        return self.say(200, data, with_body, {"ETag": etag, "X-Repo-Commit": commit})

    def say(self, code, body, with_body, headers=()):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with serving(StandIn(FakeHub)) as server:
        server.asked = []
        yield server


ASK = """
import sys
from future_l1_plugin.data.sources import data_files
from future_l1_plugin.errors import DataError
for data in sys.argv[1:]:
    try:
        print(*data_files(data))
    except DataError as error:
        print(error)
"""


def ask(home, server, *data, offline=False):
    """In a process of its own, since huggingface_hub reads its settings once, when it is imported."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PATH": "",
    }
    command = [sys.executable, "-c", ASK, *data]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def inside(line, commit="main"):
    """Paths of a line within the snapshot of a commit."""
    return [path.split(f"/snapshots/{COMMITS[commit]}/")[1] for path in line.split()]


def test_a_dataset_is_its_files_of_rows(tmp_path, hub):
    train = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    rows = ["data/test.jsonl", *train, "pretrain/rows.jsonl", "training.jsonl"]
    split, all_of_it, old, both = ask(tmp_path, hub, "org/name:train", "org/name", "org/name@v1", "org/name:test@v1")
    assert inside(split) == train
    assert inside(all_of_it) == rows
    assert inside(old, "v1") == rows
    assert inside(both, "v1") == ["data/test.jsonl"]
    assert Path(split.split()[0]).read_bytes() == b'{"id": 1}'
    asked = " ".join(hub.asked)
    assert "mp4" not in asked and "zip" not in asked and "README" not in asked


def test_what_was_downloaded_is_there_offline(tmp_path, hub):
    (online,) = ask(tmp_path, hub, "org/name:train")
    count = len(hub.asked)
    again, incomplete = ask(tmp_path, hub, "org/name:train", "org/name", offline=True)
    assert again == online and len(hub.asked) == count
    assert incomplete.startswith("org/name: no such file or folder here, and as a dataset it cannot be downloaded")


def test_what_is_wrong_with_a_dataset(tmp_path, hub):
    said = ask(tmp_path, hub, "org/none", "org/name@v9", "org/name:validation", "org/gated", "org/na--me")
    assert "org/none: no such file or folder here, and no such dataset on the hub" in said[0]
    assert said[1] == "org/name: the dataset has no revision 'v9'. Check its page of the hub."
    assert "no file that ends in .json, .jsonl, .parquet with the word 'validation'" in said[2]
    assert "terms that you have not accepted" in said[3] and "hf auth login" in said[3]
    assert "org/na--me: no such file or folder here, and no such dataset" in said[4]
    (offline,) = ask(tmp_path / "other", hub, "org/name", offline=True)
    assert "cannot be downloaded from the hub" in offline and "Check the path, or the connection" in offline
    hub.shutdown()
    hub.server_close()
    (dead,) = ask(tmp_path / "other", hub, "org/name")
    assert "cannot be downloaded from the hub" in dead


def test_a_folder_comes_before_a_dataset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, {"org/name/rows.jsonl": b""}))
    assert data_files("org/name") == [Path("org/name/rows.jsonl")]
    assert not is_dataset("org/name")
    assert is_dataset("org/other") and is_dataset("org/other:train@v1") and not is_dataset("org/other.json")


def test_a_download_that_breaks_off(monkeypatch):
    from httpx import ReadTimeout

    def fail(*_, **__):
        raise ReadTimeout("timed out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=r"cannot be downloaded from the hub \(timed out\)"):
        data_files("org/name")
