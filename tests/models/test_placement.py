"""Devices that are there, and precision in identities."""

from __future__ import annotations

import pytest
import torch

from limbeck.config.machine import Machine
from limbeck.models.load import load_model, model_identity
from limbeck.models.placement import Devices, Placement, Precision, find_device
from limbeck.types import UserError


def test_auto_is_the_cpu_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: asked.append(device) or zeros(size))
    find_device("auto")
    assert asked == [torch.device("cuda", 0)]


@pytest.mark.parametrize("name", ["cuda:97", "mps:9", "xpu:9", "teapot", "cpux"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name):
    with pytest.raises(UserError, match=r"machine\.device.*this machine has cpu"):
        find_device(name, "machine.device")


def test_teachers_are_with_the_student_unless_they_have_a_device_of_their_own():
    assert Devices(Machine(device="cpu")).teacher == Placement(torch.device("cpu"))
    with pytest.raises(UserError, match=r"machine\.teacher_device"):
        _ = Devices(Machine(device="cpu", teacher_device="teapot")).teacher


def test_an_attention_that_is_not_there_is_refused(tiny_folder):
    with pytest.raises(UserError, match=r"machine\.attention.*flash_attention_3"):
        load_model(str(tiny_folder), placement=Placement(attention="flash_attention_3"))
    eager = load_model(str(tiny_folder), placement=Placement(attention="eager")).net
    assert eager.config._attn_implementation == "eager"


def test_another_precision_is_another_model(tiny_folder):
    names = {}
    for dtype in (None, "bfloat16", "float16"):
        precision = Precision.named(dtype)
        model = load_model(str(tiny_folder), precision)
        assert model.identity == model_identity(str(tiny_folder), precision)
        assert model.net.dtype == precision.dtype
        names[model.identity] = dtype
    assert len(names) == 3
    assert {name.partition("+")[2] for name in names} == {"", "bfloat16", "float16"}
    assert Precision(torch.bfloat16, "int4").suffix == "+bfloat16+int4"
