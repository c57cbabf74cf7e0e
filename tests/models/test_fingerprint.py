"""A model is told by every byte of its files, and each file is read once."""

from __future__ import annotations

import os
import shutil
import time

import pytest

from limbeck.commands.export.student import find_student
from limbeck.models import fingerprint, sources
from limbeck.models.fingerprint import NAMING, contents, known_sha256, names_by_edges, seal_export
from limbeck.models.load import check_source, load_model, model_contents, model_identity
from limbeck.storage.files import file_sha256
from limbeck.types import UserError
from tests.conftest import make_net


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where hashes are kept, of files that need not rest first."""
    monkeypatch.setattr(fingerprint, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(fingerprint, "SETTLED", -60.0)
    return tmp_path / "home"


@pytest.fixture
def reads(monkeypatch):
    """The files that were read whole."""
    names = []
    monkeypatch.setattr(fingerprint, "file_sha256", lambda file: names.append(file.name) or file_sha256(file))
    return names


@pytest.mark.promise("R12")
def test_a_byte_in_the_middle_of_the_weights_is_another_model(tmp_path, tiny_folder):
    net = make_net(vocab_size=300)
    net.resize_token_embeddings(40000)  # a file of 5 MB
    net.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    with file.open("r+b") as weights:
        weights.seek(file.stat().st_size // 2)
        byte = weights.read(1)
        weights.seek(-1, os.SEEK_CUR)
        weights.write(bytes([byte[0] ^ 1]))
    a, b = (str(tmp_path / name) for name in "ab")
    assert fingerprint.fingerprint(tmp_path / "a") != fingerprint.fingerprint(tmp_path / "b")
    assert model_contents(a) != model_contents(b)
    assert len(model_identity(str(tiny_folder)).rpartition("@")[2]) == 32


def test_a_file_is_read_once_until_it_changes(tmp_path, place, reads):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = known_sha256(file)
    assert [known_sha256(file) for _ in range(3)] == [first] * 3 and reads == [file.name]
    times = file.stat()
    file.write_bytes(b"Weights")  # as long, and with the old time of its last change
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_sha256(file) == file_sha256(file) != first and len(reads) == 2
    other = tmp_path / "other"
    other.write_bytes(b"WEIGHTS")
    other.replace(file)
    assert known_sha256(file) == file_sha256(file) and len(reads) == 3


def test_a_file_that_has_just_changed_is_read_again(tmp_path, place, reads, monkeypatch):
    monkeypatch.setattr(fingerprint, "SETTLED", 2.0)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    known_sha256(file), known_sha256(file)
    assert len(reads) == 2
    later = time.time() + 3
    monkeypatch.setattr(fingerprint.time, "time", lambda: later)
    known_sha256(file), known_sha256(file)
    assert len(reads) == 3


def test_a_cache_that_can_not_be_used_costs_no_more_than_its_time(tmp_path, place, reads, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    place.mkdir()
    (place / fingerprint.CACHE).write_bytes(b"no database" * 100)
    assert known_sha256(file) == file_sha256(file)
    monkeypatch.setattr(fingerprint, "home", lambda: file / "home")
    assert known_sha256(file) == file_sha256(file) and len(reads) == 2


def test_the_manifest_of_an_export_does_not_make_it_another_model(tmp_path, tiny_folder):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    (copy / "manifest.json").write_text("{}")
    assert contents(copy) == contents(tiny_folder)
    (copy / "generation_config.json").write_text("{}")
    assert contents(copy) != contents(tiny_folder)


def both(folder):
    """A folder's identity, and the name of what is exported from it."""
    return contents(folder), find_student(folder).content


def test_a_changed_file_of_the_tokenizer_is_another_model(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    before = both(folder)
    (folder / "merges.txt").write_text("a b")
    assert both(folder) == before == both(tiny_folder), "tokenizer.json is read in its place"
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    seen = {both(folder)}
    for name in ("merges.txt", "vocab.txt", "additional_chat_templates/tool_use.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        for text in ("one", "two"):
            (folder / name).write_text(text)
            seen.add(both(folder))
    assert len(seen) == len({identity for identity, _ in seen}) == len({name for _, name in seen}) == 7


def test_names_of_older_versions_are_told_by_their_form(tiny_folder, monkeypatch):
    monkeypatch.setattr(NAMING, "by_edges", True)
    old = model_identity(str(tiny_folder))
    monkeypatch.setattr(NAMING, "by_edges", False)
    now = model_identity(str(tiny_folder))
    assert names_by_edges(old) and names_by_edges(f"{old}+sight-1") and not names_by_edges(now)
    assert not names_by_edges("served:toy-0123456789ab")


@pytest.fixture
def sealed(tmp_path, tiny_folder):
    """A folder as a run exports it, whose files were written a while ago."""
    folder = shutil.copytree(tiny_folder, tmp_path / "student")
    (folder / "README.md").write_text("card")
    seal_export(folder)
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.promise("S13")
def test_an_export_that_was_changed_is_refused_wherever_it_is_loaded(sealed, file):
    (sealed / "README.md").write_text("another card")
    for load in (load_model, check_source, find_student):
        load(str(sealed))
    content = bytearray((sealed / file).read_bytes())
    content[-9] ^= 1
    (sealed / file).write_bytes(content)
    for load in (load_model, check_source, find_student):
        with pytest.raises(UserError, match=f"{file} is not as it was exported.*remove its manifest.json"):
            load(str(sealed))
    (sealed / "manifest.json").unlink()
    find_student(str(sealed))


def test_a_file_that_was_put_into_an_export_or_taken_out_is_seen(sealed):
    (sealed / "processor_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"processor_config\.json is not as it was exported"):
        load_model(str(sealed))
    (sealed / "processor_config.json").unlink()
    (sealed / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not as it was exported"):
        load_model(str(sealed))


def test_an_export_with_further_templates_can_be_loaded(sealed):
    (sealed / "additional_chat_templates").mkdir()
    (sealed / "additional_chat_templates" / "tool_use.jinja").write_text("one")
    seal_export(sealed)
    find_student(sealed)


@pytest.mark.parametrize("text", ['{"manifest_version": 3, "name": "a page"}', '{"files": ["a.bin"]}', "[]"])
def test_a_manifest_of_another_program_is_none_of_ours(tmp_path, tiny_folder, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "manifest.json").write_text(text)
    assert load_model(str(folder)).identity == load_model(str(tiny_folder)).identity.replace(tiny_folder.name, "model")


@pytest.mark.promise("S13")
def test_a_hub_model_can_be_pinned_and_is_told_by_its_contents(tiny_folder, monkeypatch):
    asked = []

    def snapshot(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return str(tiny_folder)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    commit = "0123456789abcdef0123456789abcdef01234567"
    pinned, newest = model_identity(f"me/small@{commit}"), model_identity("me/small")
    assert pinned == newest == load_model(f"me/small@{commit}").identity and pinned.startswith("me/small@")
    assert asked[0] == ("me/small", commit) and ("me/small", None) in asked and not names_by_edges(pinned)
