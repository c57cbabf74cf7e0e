"""A tokenizer as the fields of a GGUF file: tokens, merges, control tokens, chat template, the end of a turn.

llama.cpp knows the regular expressions that cut a text before its merges by a name only (`tokenizer.ggml.pre`). The
name is found by what a tokenizer does: the one whose expressions cut a test text as the tokenizer cuts it. So a
tokenizer that was made anew is known as well as a published one. Not covered: normalisers of text (NFC and the like),
which llama.cpp doesn't have; unigram and word-piece tokenizers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from itertools import pairwise
from typing import Any

import regex
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase as Tokenizer

from limbeck.models.model import vocab_size_of
from limbeck.models.template import end_of_turn, frame_of, render
from limbeck.types import UserError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LATER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+APOSTROPHE"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*APOSTROPHE"
    r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's name, whether whole words are taken from the vocabulary before merges, and its expressions in their order
PRE_TOKENIZERS: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("gpt-2", False, (GPT2,)),
    ("smollm", False, (r"\p{N}", GPT2)),
    ("qwen2", False, (LATER.replace("DIGITS", ""),)),
    ("llama-bpe", True, (LATER.replace("DIGITS", "{1,3}"),)),
    ("dbrx", False, (LATER.replace("DIGITS", "{1,3}"),)),
    ("tekken", True, (CASED.replace("DIGITS", "").replace("APOSTROPHE", ""),)),
    ("gpt-4o", False, (CASED.replace("DIGITS", "{1,3}").replace("APOSTROPHE", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"),)),
)
TEST_TEXT = (
    "Hello World's 1234567 abc123def\n\n\n  two\t\tx  !!! ..\r\n été 日本語 naïve 🙂🙂 I'LL we're McDonald HTTPServer"
    " a/b//c"
    "   def f(x):\n        return x == 10  # ok?\n ٣٤٥ (Привет, мир) \u00a0end  "
)
KNOWN_ENDS = {  # tokens that end an answer in llama.cpp wherever a vocabulary has them
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>"),
}
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
USELESS = "convert it with llama.cpp's own convert_hf_to_gguf.py, or serve the folder with transformers or vLLM"


def add_vocabulary(writer: GGUFWriter, tokenizer: Tokenizer, rows: int, name: str, ends: Collection[int] = ()) -> None:
    """Write a tokenizer into a GGUF file whose embedding has `rows` rows.

    Args:
        writer: of the file.
        tokenizer: the model's.
        rows: of the embedding.
        name: stands for the model in messages.
        ends: tokens that end an answer beside the template's and the tokenizer's own.

    Raises:
        UserError: llama.cpp has no tokenizer that reads text in this way, or doesn't end answers with all these tokens.
    """
    settings = _settings(tokenizer, name)
    if vocab_size_of(tokenizer) > rows:
        raise UserError(
            f"{name}: its tokenizer has {vocab_size_of(tokenizer)} ids and its embedding {rows} rows: it is another"
            " model's tokenizer"
        )
    if settings["model"].get("byte_fallback"):
        _add_sentence_pieces(writer, settings, tokenizer, rows)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(tokenizer, name))
        writer.add_token_merges([" ".join(_pair(merge)) for merge in settings["model"]["merges"]])
    texts, kinds = _tokens(tokenizer, rows, bool(settings["model"].get("byte_fallback")))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    _add_ends(writer, tokenizer, ends, name)
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(begins_with_bos(tokenizer))
    writer.add_add_eos_token(False)
    template: Any = tokenizer.chat_template
    writer.add_chat_template(template["default"] if isinstance(template, dict) else template)


def _add_ends(writer: GGUFWriter, tokenizer: Tokenizer, ends: Collection[int], name: str) -> None:
    """Write the tokens that end an answer: llama.cpp has three places for them, and knows some more by their text. The
    first place is that of the tokenizer's own end, which llama.cpp puts where a template says `eos_token`."""
    turn, own = end_of_turn(tokenizer), tokenizer.eos_token_id
    size = vocab_size_of(tokenizer)
    named = {end: tokenizer.convert_ids_to_tokens(end) for end in {*ends, turn} if 0 <= end < size}
    known = {end for end, text in named.items() if text in KNOWN_ENDS}
    unknown = sorted(named.keys() - known - {own}, key=lambda end: (end != turn, end))
    if len(unknown) > 2:
        texts = ", ".join(repr(named[end]) for end in unknown[2:])
        raise UserError(
            f"{name}: its answers end with {len(named.keys() | {own})} tokens, and llama.cpp would go on after {texts}:"
            " leave in eos_token_id of generation_config.json only those that the model writes, three at most"
        )
    places = [*unknown, *sorted(named.keys() & known - {own, turn})]  # a known one for readers that know it not
    if turn not in places and len(unknown) < 2:
        places.insert(0, turn)  # the place of a turn's end
    writer.add_eos_token_id(own)
    writer.add_eot_token_id(places[0])
    if len(places) > 1:
        writer.add_eom_token_id(places[1])


def pre_tokenizer(tokenizer: Tokenizer, name: str) -> str:
    """llama.cpp's name for the expressions that a byte-level tokenizer cuts text with.

    Raises:
        UserError: it cuts text in a way that has no name there.
    """
    backend: Any = tokenizer.backend_tokenizer
    cut = [] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(TEST_TEXT)
    spans = [span for _, span in cut]
    whole_words = bool(json.loads(backend.to_str())["model"].get("ignore_merges"))
    same = {
        words: pre
        for pre, words, patterns in PRE_TOKENIZERS
        if spans == _cut(TEST_TEXT, patterns) and not cut[0][0].startswith("Ġ")
    }
    if same:
        return same.get(whole_words, next(iter(same.values())))
    raise UserError(
        f"{name}: its tokenizer cuts text in a way that llama.cpp has no name for that Limbeck knows (pre-tokenizer"
        f" {str(backend.pre_tokenizer)[:120]}): {USELESS}"
    )


def _cut(text: str, patterns: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where the pieces of a text begin and end: each expression cuts every piece at its matches."""
    edges = {0, len(text)}
    for pattern in patterns:
        for start, end in pairwise(sorted(edges)):
            for match in regex.finditer(pattern, text[start:end]):
                edges |= {start + match.start(), start + match.end()}
    return list(pairwise(sorted(edges)))


def _settings(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{name}: its tokenizer has no tokenizer.json, so it can't be exported as GGUF: {USELESS}")
    settings: dict[str, Any] = json.loads(backend.to_str())
    if settings["model"]["type"] != "BPE":
        raise UserError(
            f"{name}: a tokenizer of type {settings['model']['type']} can't be exported as GGUF, only BPE: {USELESS}"
        )
    return settings


def _tokens(tokenizer: Tokenizer, rows: int, pieces: bool) -> tuple[list[str], list[TokenType]]:
    """The text and the kind of every row of the embedding; rows without a token are called so."""
    controls = set(frame_of(tokenizer).controls.values())
    added = tokenizer.added_tokens_decoder
    texts = [f"[unused {number}]" for number in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for text, number in tokenizer.get_vocab().items():
        texts[number], kinds[number] = text, TokenType.NORMAL
        if number in added:
            is_control = added[number].special or number in controls
            kinds[number] = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
            if pieces and not is_control:
                texts[number] = text.replace("▁", " ")
        elif pieces and BYTE.fullmatch(text):
            kinds[number] = TokenType.BYTE
    if pieces and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return texts, kinds


def _add_sentence_pieces(writer: GGUFWriter, settings: dict[str, Any], tokenizer: Tokenizer, rows: int) -> None:
    """llama.cpp joins the two pieces whose union has the highest score: minus the number of the merge that makes it."""
    numbers = tokenizer.get_vocab()
    scores = [-1e6] * rows
    for rank, merge in enumerate(settings["model"]["merges"]):
        made = numbers.get("".join(_pair(merge)))
        if made is not None and scores[made] == -1e6:
            scores[made] = -float(rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_add_space_prefix(list(tokenizer("a", add_special_tokens=False)["input_ids"]) == [numbers.get("▁a")])
    writer.add_remove_extra_whitespaces(False)


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether llama.cpp is to put the first token before a text: as the tokenizer does, but never where the template
    doesn't."""
    bos = tokenizer.bos_token_id
    if bos is None or list(tokenizer("a")["input_ids"])[:1] != [bos]:
        return False
    return render(tokenizer, ({"role": "user", "content": "a"},)).startswith(str(tokenizer.bos_token))
