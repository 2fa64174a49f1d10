from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError

from data.errors import WeightsError
from data.hub import fetch, find_cached, hub_answers

pytestmark = pytest.mark.usefixtures("unreachable_hub")
WAYS_ON = "give a local copy"


@pytest.fixture
def answering_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A server that answers HEAD with the status in the list it hands out."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield status
        server.shutdown()
        thread.join()


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch, answering_hub: list[int]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("asked the network"))
    assert not hub_answers()
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        fetch("t", "x/y", ("a",), ways_on=WAYS_ON)


def test_the_second_choice_of_file_counts_as_cached(unreachable_hub: Path) -> None:
    repo = unreachable_hub / "models--x--y"
    path = repo / "snapshots" / ("0" * 40) / "b.bin"
    path.parent.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    path.write_bytes(b"weights")
    assert find_cached("x/y", ("a.safetensors", "b.bin")) == path


@pytest.mark.parametrize(("status", "answers"), [(200, True), (404, True), (503, False)])
def test_a_hub_that_responds_answers(answering_hub: list[int], status: int, answers: bool) -> None:
    answering_hub[0] = status
    assert hub_answers() is answers


def test_a_closed_port_does_not_answer() -> None:
    assert not hub_answers()


def test_a_hub_that_accepts_and_stays_silent_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub_answers(timeout_s=0.2)


class TestDownload:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch, answering_hub: list[int]) -> dict[str, Any]:
        """What the hub's client gives for each file: a path to return or an error to raise."""
        files: dict[str, Any] = {}

        def download(repo_id: str, filename: str, cache_dir: str) -> str:
            found = files.get(filename, EntryNotFoundError(f"404: {repo_id} has no {filename}"))
            if isinstance(found, Exception):
                raise found
            return str(found)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return files

    def test_takes_the_preferred_file(self, hub: dict[str, Any]) -> None:
        hub.update({"a": "/cache/a", "b": "/cache/b"})
        assert fetch("t", "x/y", ("a", "b"), ways_on=WAYS_ON) == Path("/cache/a")

    def test_takes_the_next_file_where_the_repository_lacks_the_first(self, hub: dict[str, Any]) -> None:
        hub["b"] = "/cache/b"
        assert fetch("t", "x/y", ("a", "b"), ways_on=WAYS_ON) == Path("/cache/b")

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            ({}, "the repository has no a and no b"),
            ({"a": OSError("disk full")}, r"the download failed \(OSError: disk full\)"),
            ({"a": huggingface_hub.errors.LocalEntryNotFoundError("lost")}, r"the download failed \(lost\)"),
        ],
        ids=["no file", "disk", "connection"],
    )
    def test_failures_name_the_ways_on(self, hub: dict[str, Any], found: dict[str, Any], message: str) -> None:
        hub.update(found)
        with pytest.raises(WeightsError, match=message) as caught:
            fetch("t", "x/y", ("a", "b"), ways_on=WAYS_ON)
        assert caught.value.hint == WAYS_ON
