"""What ends an answer is written into an exported file, and seen where it is not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from gguf import GGUFReader

from limbeck.commands.export import check, run
from limbeck.commands.export.check import MAX_TOKENS, _chat_differs, ask_student
from limbeck.commands.export.run import export, exported_once
from limbeck.commands.export.student import OWN_PROMPTS, find_student
from limbeck.models.folder import convert_gguf
from limbeck.models.load import load_model
from limbeck.models.to_gguf import vocabulary
from limbeck.models.to_gguf.types import TYPES
from limbeck.models.to_gguf.write import write_gguf
from limbeck.progress import Silent
from limbeck.types import Generated, UserError


def ending_with(folder, target, *ends):
    """A copy of a model whose settings of generation end answers with these tokens, too."""
    shutil.copytree(folder, target)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, *ends]}))
    return target


def written(file):
    fields = GGUFReader(file).fields
    places = (fields.get(f"tokenizer.ggml.{place}_token_id") for place in ("eos", "eot", "eom"))
    return [None if place is None else place.contents() for place in places]


@pytest.fixture
def in_the_middle(tiny):
    """A token that the tiny student writes in the middle of its answer, and not before."""
    ids = ask_student(tiny, OWN_PROMPTS[:1])[0].answer_ids
    return next(token for number, token in enumerate(ids) if number > 2 and token not in ids[:number])


def test_llama_cpp_stops_at_every_end_of_the_student(tiny_folder, tmp_path, in_the_middle, monkeypatch):
    model = ending_with(tiny_folder, tmp_path / "m", in_the_middle)
    answers = []
    answer = check._answer
    monkeypatch.setattr(check, "_answer", lambda *some: answers.append(answer(*some)) or answers[-1])
    record = export(model, "gguf", None, tmp_path / "out", Silent())
    assert written(tmp_path / "out" / record["file"]) == [0, 0, in_the_middle]
    (asked,) = ask_student(load_model(str(model)), OWN_PROMPTS[:1])
    assert answers[0] == asked.answer_ids and answers[0][-1] == in_the_middle


def test_a_file_that_goes_on_after_an_end_is_refused(tiny_folder, tmp_path, in_the_middle, monkeypatch):
    model = ending_with(tiny_folder, tmp_path / "m", in_the_middle)
    right = vocabulary._add_ends
    monkeypatch.setattr(
        vocabulary, "_add_ends", lambda writer, tokenizer, ends, name: right(writer, tokenizer, (), name)
    )
    with pytest.raises(UserError, match=r"llama.cpp goes on after '.*so nothing was written; leave in eos_token_id"):
        export(model, "gguf", None, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_three_ends_have_a_place_and_more_are_refused(tiny_folder, tmp_path):
    write_gguf(ending_with(tiny_folder, tmp_path / "3", 9, 7), tmp_path / "3.gguf", TYPES["f32"], "three")
    assert written(tmp_path / "3.gguf") == [0, 7, 9]
    with pytest.raises(
        UserError, match=r"five: its answers end with 5 tokens, and llama.cpp would go on after '.*', '"
    ):
        write_gguf(ending_with(tiny_folder, tmp_path / "5", 9, 7, 8, 6), tmp_path / "5.gguf", TYPES["f32"], "five")


def test_the_ends_of_a_file_come_back(tiny_folder, tmp_path):
    write_gguf(ending_with(tiny_folder, tmp_path / "3", 9, 7), tmp_path / "3.gguf", TYPES["f32"], "three")
    convert_gguf(tmp_path / "3.gguf", tmp_path / "again")
    assert load_model(str(tmp_path / "again")).eos_ids == {0, 7, 9} == load_model(str(tmp_path / "3")).eos_ids


def test_a_known_end_takes_no_place_that_an_unknown_one_needs(tiny_folder, tmp_path, monkeypatch):
    model = ending_with(tiny_folder, tmp_path / "m", 9, 7, 8)
    known = load_model(str(model)).tokenizer.convert_ids_to_tokens(7)
    monkeypatch.setattr(vocabulary, "KNOWN_ENDS", frozenset({known}))
    write_gguf(model, tmp_path / "m.gguf", TYPES["f32"], "m")
    assert written(tmp_path / "m.gguf") == [0, 8, 9]
    monkeypatch.setattr(vocabulary, "KNOWN_ENDS", frozenset(load_model(str(model)).tokenizer.get_vocab()))
    write_gguf(model, tmp_path / "n.gguf", TYPES["f32"], "n")
    assert written(tmp_path / "n.gguf") == [0, 0, 7], "the turn's end keeps its place"


@pytest.mark.parametrize(
    ("settings", "ends"), [(None, [0, 0, None]), ("[]", None), ('{"cache_implementation": "x"}', None)]
)
def test_settings_of_generation_that_are_absent_or_malformed(tiny_folder, tmp_path, settings, ends):
    """Without them the defaults of the configuration's class are no ends: Llama's is token 2."""
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if settings is not None:
        (folder / "generation_config.json").write_text(settings)
    if ends is None:
        with pytest.raises(UserError, match=r"generation_config.json can't be read"):
            write_gguf(folder, tmp_path / "m.gguf", TYPES["f32"], "m")
    else:
        write_gguf(folder, tmp_path / "m.gguf", TYPES["f32"], "m")
        assert written(tmp_path / "m.gguf") == ends


def test_the_tokenizers_own_end_keeps_its_name_where_the_template_has_another(tiny_folder, tmp_path):
    """llama.cpp puts it where a template says `eos_token`."""
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|system|>"}))
    write_gguf(folder, tmp_path / "m.gguf", TYPES["f32"], "own")
    model = load_model(str(folder))
    assert written(tmp_path / "m.gguf") == [model.tokenizer.eos_token_id, model.end_of_turn, None] == [3, 0, None]


def test_a_chat_endpoint_that_answers_otherwise_is_seen(tiny, monkeypatch):
    (one,) = ask_student(tiny, OWN_PROMPTS[:1])
    monkeypatch.setattr(check, "_answer", lambda api, model, prompt: one.answer_ids)
    written, text = len(one.answer_ids), tiny.decode(one.answer_ids)
    assert written == MAX_TOKENS and len(text) > 8

    def differs(text, finish, one=one, gap=1.0, usage=None):
        answer = Generated(None, text, finish, usage=usage)
        api = SimpleNamespace(identity="x", answers=lambda requests: [(requests[0], answer)])
        return _chat_differs(api, tiny, one, [([1, 2], [-0.1, -0.1 - gap], -0.1)] * written)

    assert differs(text, "length") == differs(f" {text}\n", "length") == ""
    assert "answers 'Something else'" in differs("Something else", "length")
    assert differs("Something else", "length", gap=0.01) == "", "of two tokens as likely, either may be written"
    with monkeypatch.context() as patch:
        patch.setattr(check, "_answer", lambda api, model, prompt: model.raw_ids("Something else"))
        assert differs("Something else", "length") == "", "the file itself answers so, the second time"
    assert "reads 3 tokens" in differs(text, "length", usage=(3, MAX_TOKENS))
    ended = replace(one, answer_ids=[*one.answer_ids[:9], tiny.end_of_turn])
    said = tiny.decode(ended.answer_ids)
    assert differs(said, "ok", ended) == "" and "finishes as 'length'" in differs(said, "length", ended)
    monkeypatch.setattr(check, "_answer", lambda api, model, prompt: ended.answer_ids)
    assert "answers" in differs(text, "length", ended), "it goes on where the file itself ends"


def test_a_file_that_an_older_version_kept_is_not_served(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "can_check", lambda: False)
    shutil.copytree(tiny_folder, tmp_path / "run" / "student")
    (tmp_path / "run" / "recipe.yaml").write_text("name: tiny\n")
    old = tmp_path / "run" / "exports" / f"served-{find_student(tmp_path / 'run').content}"
    old.mkdir(parents=True)
    (old / "run-f16.gguf").write_bytes(b"written otherwise")
    _, file = exported_once(tmp_path / "run", Silent())
    assert file.read_bytes()[:4] == b"GGUF" and not old.exists()
