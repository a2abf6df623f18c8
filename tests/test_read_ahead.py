"""Reading ahead gives the tensors of the files in whatever order they are asked for, and a model its weights."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import utils
from finetune import model, read_ahead
from finetune.read_ahead import ReadAhead
from utils import CourseError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two shards: five tensors that are wanted, of several types and shapes, and one that is not."""
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(6, 7, 4, generator=draw)
    save_file({"model.layers.0.a": numbers[0].bfloat16(), "model.layers.0.b": numbers[1]}, tmp_path / "1.safetensors")
    rest = {"model.layers.10.c": numbers[2].half(), "model.layers.2.d": numbers[3], "lm_head": torch.tensor(3)}
    save_file(rest | {"model.layers.11.unused": numbers[4]}, tmp_path / "2.safetensors")
    return sorted(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("window", [1, 300, 2**30])
@pytest.mark.parametrize("threads", [1, 4])
def test_any_order_gives_the_files_tensors(files: list[Path], window: int, threads: int) -> None:
    wanted = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for seed in range(5):
        names = list(wanted)
        random.Random(seed).shuffle(names)
        with ReadAhead(files, "model.layers.11.", window, threads) as tensors:
            assert tensors.keys() == wanted.keys()
            for name in names:
                found = tensors[name][...]
                assert found.dtype == wanted[name].dtype
                assert torch.equal(found, wanted[name]), name


def test_the_next_are_read_before_they_are_asked_for(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read, done, plain, wanted = [], threading.Event(), read_ahead.Stored.read, 5

    def noting(stored: read_ahead.Stored) -> torch.Tensor:
        tensor = plain(stored)
        read.append(tensor.numel())
        if len(read) == wanted:
            done.set()
        return tensor

    monkeypatch.setattr(read_ahead.Stored, "read", noting)
    with ReadAhead(files, "model.layers.11.", threads=1):
        assert done.wait(10), "not all five were read ahead"
    assert len(read) == 5, "what nobody asks for was read"
    read.clear()
    done.clear()
    wanted = 2  # the first, and the one that its place in the window goes to
    with ReadAhead(files, "model.layers.11.", window=8, threads=1) as tensors:  # room for the first, of 8 bytes
        tensors["lm_head"][...]
        assert done.wait(10), "the next was not read"
    assert len(read) == 2, "more was read than the window holds"


def test_experts_come_by_projection_and_layers_by_number() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{e}.{p}.weight" for layer in (10, 9) for e in (10, 2) for p in "gd"]
    turns = [name.removeprefix("model.layers.").split(".mlp.experts.") for name in sorted(names, key=read_ahead._turn)]
    wanted = [(layer, f"{e}.{p}.weight") for layer in ("9", "10") for p in "dg" for e in (2, 10)]
    assert [tuple(turn) for turn in turns] == wanted


def test_a_short_file_is_named(files: list[Path]) -> None:
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-9])
    with pytest.raises(CourseError, match=r"2\.safetensors"):
        ReadAhead(files, "model.layers.11.")
    files[1].write_bytes(whole)
    with pytest.raises(CourseError, match=r"2\.safetensors"), ReadAhead(files, "-", window=1, threads=1) as tensors:
        files[1].write_bytes(whole[:-200])  # while the model is loaded
        for name in ("model.layers.2.d", "model.layers.10.c", "model.layers.11.unused"):
            tensors[name][...]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_model_has_the_same_weights(load_in_4bit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.load_model(utils.BUNDLED, load_in_4bit)
    used = []

    class Noted(ReadAhead):
        def __enter__(self):
            used.append(True)
            return super().__enter__()

    monkeypatch.setattr(model, "_only_gpus", lambda load_config: True)
    monkeypatch.setattr(model, "ReadAhead", Noted)
    after = model.load_model(utils.BUNDLED, load_in_4bit)
    assert used
    states = before.state_dict(), after.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_only_whole_tensors_for_gpus_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        def __init__(self, device_map: dict, device_mesh: object = None) -> None:
            self.device_map, self.device_mesh = device_map, device_mesh

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = torch.device("cuda", 0)
    for device_map in ({"": 0}, {"": gpu}, {"model.embed_tokens": 0, "lm_head": "cuda:1"}):
        assert model._only_gpus(Config(device_map)), device_map
    for device_map in (None, {}, {"": "cpu"}, {"a": 0, "b": "disk"}, {"a": gpu, "b": torch.device("cpu")}):
        assert not model._only_gpus(Config(device_map)), device_map
    assert not model._only_gpus(Config({"": 0}, device_mesh=object()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not model._only_gpus(Config({"": 0}))
