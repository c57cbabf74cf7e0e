"""A recipe may send no variable of this machine to an address of its choice."""

from __future__ import annotations

import pytest

from limbeck.config.keys import PROVIDERS, check_origin
from limbeck.config.server import Served
from limbeck.types import UserError


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("LIMBECK_API_KEY", "http://127.0.0.1:1/v1"),
        ("LIMBECK_LAB_2", "https://anywhere.example/v1"),
        ("OPENAI_API_KEY", "https://api.openai.com/v1"),
        ("OPENAI_API_KEY", "https://EU.api.OpenAI.com/v1"),
        ("GEMINI_API_KEY", "https://generativelanguage.googleapis.com/v1beta"),
        ("HF_TOKEN", "https://router.huggingface.co/v1"),
    ],
)
def test_a_key_of_ours_or_a_providers_own_may_be_sent(key, url):
    assert Served(url=url, name="toy", key=key).key == key


@pytest.mark.parametrize(
    ("key", "url", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "https://api.openai.com/v1", "begins with LIMBECK_"),
        ("PATH", "http://127.0.0.1:1/v1", "begins with LIMBECK_"),
        ("OPENAI_KEY", "https://api.openai.com/v1", "did you mean 'OPENAI_API_KEY'"),
        ("LIMBECK_API_KEY_ORIGIN", "https://api.openai.com/v1", "is not a variable"),
        ("OPENAI_API_KEY", "http://api.openai.com/v1", "alone, not to"),
        ("OPENAI_API_KEY", "https://openai.com.evil.example/v1", r"not to 'openai\.com\.evil\.example'"),
        ("OPENAI_API_KEY", "https://notopenai.com/v1", "alone, not to"),
        ("OPENAI_API_KEY", "https://evil.example/api.openai.com/v1", "alone, not to"),
        ("HF_TOKEN", "https://x.endpoints.huggingface.cloud/v1", "alone, not to"),
        ("OPENAI_API_KEY", "nowhere", "alone, not to 'nowhere'"),
    ],
)
@pytest.mark.promise("S8", "S10")
def test_any_other_is_refused_with_what_to_name(key, url, words):
    with pytest.raises(ValueError, match=words):
        Served(url=url, name="toy", key=key)


def test_a_key_can_be_bound_to_an_address(monkeypatch):
    check_origin("LIMBECK_API_KEY", "https://a.example/v1")
    monkeypatch.setenv("LIMBECK_API_KEY_ORIGIN", "https://a.example")
    for same in ("https://a.example/v1", "https://A.example:443/v1"):
        check_origin("LIMBECK_API_KEY", same)
    for other in ("http://a.example/v1", "https://a.example:8443/v1", "https://b.example/v1"):
        with pytest.raises(UserError, match=r"is for https://a\.example .*LIMBECK_API_KEY_ORIGIN"):
            check_origin("LIMBECK_API_KEY", other)


def test_every_provider_has_a_place():
    assert all(domains and not any("/" in domain for domain in domains) for domains in PROVIDERS.values())
