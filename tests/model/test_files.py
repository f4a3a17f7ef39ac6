"""Weight files: read lazily, as data, and refused with a clear message where they are damaged."""

import argparse
import collections
import os
import pickle
import random
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file

from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import SafetensorsMap, dtype_of, shape_of, write_safetensors
from evatool.weights.open import open_weights

TENSORS = {
    "a.weight": torch.randn(7, 5),
    "a.half": torch.randn(3).half(),
    "b.brain": torch.randn(4, 2).bfloat16(),
    "b.scalar": torch.tensor(2.5),
    "ids": torch.arange(6).reshape(2, 3),
    "flag": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
}


def assert_equal(read, expected=TENSORS):
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert shape_of(read, name) == tuple(tensor.shape)
        assert dtype_of(read, name) == tensor.dtype
        assert torch.equal(read[name], tensor), name


# ------------------------------------------------------------------------------------------------ safetensors


def test_safetensors_written_by_us_read_by_the_library_and_the_other_way(tmp_path):
    from safetensors.torch import load_file

    write_safetensors(tmp_path / "ours", TENSORS, {"format": "pt"})
    assert_equal(load_file(tmp_path / "ours"))
    assert_equal(open_weights(tmp_path / "ours"))
    assert SafetensorsMap(tmp_path / "ours").metadata == {"format": "pt"}
    save_file(TENSORS, tmp_path / "theirs")
    assert_equal(open_weights(tmp_path / "theirs"))


def test_views_are_written_in_full(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    write_safetensors(tmp_path / "f", {"t": table.T, "row": table[1], "all": table})
    assert_equal(SafetensorsMap(tmp_path / "f"), {"t": table.T, "row": table[1], "all": table})


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "prefix", "header", "last byte"])
def test_truncated_safetensors(tmp_path, keep):
    path = tmp_path / "f.safetensors"
    write_safetensors(path, TENSORS)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError) as caught:
        open_weights(path)
    assert str(path) in str(caught.value)


def test_a_header_that_contradicts_itself(tmp_path):
    path = tmp_path / "f"
    head = b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
    with pytest.raises(CheckpointError, match="contradict"):
        open_weights(path)


def test_something_else_is_named_as_such(tmp_path):
    (tmp_path / "page.html").write_text("<html>404 not found</html>")
    with pytest.raises(CheckpointError, match="no weight file"):
        open_weights(tmp_path / "page.html")
    with pytest.raises(CheckpointError, match="no such file"):
        open_weights(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------ torch archives


def test_torch_files_new_and_old(tmp_path):
    torch.save(TENSORS, tmp_path / "new.pt")
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_equal(open_weights(tmp_path / "new.pt"))
    assert_equal(open_weights(tmp_path / "old.pt"))


def test_views_of_one_storage(tmp_path):
    table = torch.arange(24.0).reshape(4, 6)
    views = {"t": table.T, "row": table[2], "column": table[:, 1], "inner": table[1:3, 2:5]}
    torch.save(views, tmp_path / "f.pt")
    assert_equal(open_weights(tmp_path / "f.pt"), views)


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "model_ema"])
def test_wrappers_are_opened(tmp_path, wrapper):
    torch.save({wrapper: TENSORS, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "f.pt")
    assert_equal(open_weights(tmp_path / "f.pt"))


def test_modules_parameters_and_ordered_dicts(tmp_path):
    state = collections.OrderedDict(w=torch.nn.Parameter(torch.ones(2)))
    torch.save({"state_dict": state}, tmp_path / "f.pt")
    assert_equal(open_weights(tmp_path / "f.pt"), {"w": torch.ones(2)})


def test_deepspeed_objects_are_inert(tmp_path, monkeypatch):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    torch.save({"module": TENSORS, "loss_scaler": DynamicLossScaler(1.0, 2, 2, 1, 1, False)}, tmp_path / "f.pt")
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.fp16.loss_scaler", None)  # importing it would now fail
    assert_equal(open_weights(tmp_path / "f.pt"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_code_in_a_pickle_is_refused_by_name_and_never_run(tmp_path, zipped):
    target = tmp_path / "made"
    torch.save(TENSORS | {"x": Payload(str(target))}, tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="mkdir"):
        open_weights(tmp_path / "f.pt")
    assert not target.exists()


def test_a_plain_pickle_with_code_is_never_run(tmp_path):
    target = tmp_path / "made"
    (tmp_path / "f.pkl").write_bytes(pickle.dumps(Payload(str(target))))
    with pytest.raises(CheckpointError):
        open_weights(tmp_path / "f.pkl")
    assert not target.exists()


def test_truncated_archive(tmp_path):
    path = tmp_path / "f.pt"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError):
        open_weights(path)


@pytest.mark.parametrize("is_new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", ["cut", "flipped"])
def test_any_damage_is_an_error_or_harmless(way, is_new, tmp_path):
    path = tmp_path / "f.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=is_new)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        if way == "cut":
            del data[draw.randrange(1, len(data)) :]
        else:
            for _ in range(5):
                data[draw.randrange(min(len(data), 3000))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            for tensor in open_weights(path).values():
                assert isinstance(tensor, torch.Tensor)
        except CheckpointError:
            refused += 1
    assert refused > 10


def test_flipped_bytes_are_noticed(tmp_path):
    path = tmp_path / "f.pt"
    marker = torch.full((1000,), 3.0)
    torch.save({"w": marker}, path)
    data = bytearray(path.read_bytes())
    where = bytes(data).index(marker.numpy().tobytes())
    data[where + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        open_weights(path)["w"]


def test_a_file_without_tensors(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="no tensors"):
        open_weights(tmp_path / "f.pt")


def test_a_torch_archive_does_not_depend_on_the_time_of_day(tmp_path, monkeypatch):
    import time

    from evatool.formats.torch_zip import write_torch_archive

    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    write_torch_archive(tmp_path / "now.pt", tensors)
    later = time.localtime(time.time() + 3600)
    monkeypatch.setattr(time, "localtime", lambda *_: later)
    write_torch_archive(tmp_path / "later.pt", tensors)
    assert (tmp_path / "now.pt").read_bytes() == (tmp_path / "later.pt").read_bytes()
    assert torch.equal(torch.load(tmp_path / "now.pt", weights_only=True)["a"], tensors["a"])
