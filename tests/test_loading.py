"""`load` and `build`: every form in which LaMa's weights are passed around, and files that are something else."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import inpaintrt
from inpaintrt import models
from inpaintrt.models import lama, loading, pickled
from inpaintrt.models.weights_file import WeightsFile
from inpaintrt.runtime.errors import WeightsError
from inpaintrt.testing import recipe


@pytest.fixture(scope="module")
def small():
    return recipe.fill(models.create("lama", n_blocks=1, base_width=4))


@pytest.fixture
def state(small):
    return {k: v.clone() for k, v in small.state_dict().items()}


def same(loaded, network):
    """Equal weights, and equal numbers out of them."""
    ours, theirs = loaded.state_dict(), network.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k].to(ours[k].dtype)) for k in ours)
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    x = recipe.image("same", 1, loaded.config["in_channels"], 16, 24)
    with torch.no_grad():
        assert torch.equal(loaded(x), network.float().eval()(x))
    return True


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


# ---- names ----------------------------------------------------------------------------------------------------------


def test_shipped_model_loads():
    network = inpaintrt.load("lama_mini")
    assert sum(p.numel() for p in network.parameters()) == 1_201_699
    assert not network.training


def test_names():
    with pytest.raises(ValueError, match="did you mean 'lama_mini'"):
        inpaintrt.load("lama_mni")
    with pytest.raises(ValueError, match="takes no path"):
        inpaintrt.load("lama_mini", "x.pt")
    with pytest.raises(ValueError, match="no options"):
        inpaintrt.load("lama_mini", ratio=1)
    with pytest.raises(ValueError, match="needs a path"):
        inpaintrt.load("lama")
    with pytest.raises(ValueError, match="unknown model"):
        models.create("gan")
    with pytest.raises(ValueError, match="unknown model"):
        loading.build("gan", {})


# ---- forms of a checkpoint ------------------------------------------------------------------------------------------

PREFIXES = ["", "generator.", "model.generator.", "module.", "_orig_mod.generator.", "model."]
WRAPPINGS = {
    "plain": lambda state: state,
    "lightning": lambda state: {
        "epoch": 3,
        "state_dict": {**state, "discriminator.model0.0.weight": torch.zeros(2), "loss_l1.weight": torch.zeros(3)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(5)}}}],
    },
    "gen_state_dict": lambda state: {"gen_state_dict": state, "discr_state_dict": {"w": torch.zeros(1)}},
    "nested": lambda state: {"ema": {"params": collections.OrderedDict(state)}},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrap", WRAPPINGS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_torch_checkpoints(tmp_path, small, state, prefix, wrap, old):
    path = tmp_path / "weights.ckpt"
    torch.save(WRAPPINGS[wrap](prefixed(state, prefix)), path, _use_new_zipfile_serialization=not old)
    assert same(inpaintrt.load("lama", path), small)


def test_keys_without_the_container_name(tmp_path, small, state):
    for prefix in ("", "net.", "generator."):
        renamed = {prefix + key.removeprefix("model."): value for key, value in state.items()}
        assert same(loading.build("lama", renamed), small)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_whatever_the_suffix(tmp_path, small, state, suffix):
    save_file(prefixed(state, "model."), tmp_path / f"weights{suffix}", metadata={"format": "pt"})
    assert same(inpaintrt.load("lama", tmp_path / f"weights{suffix}"), small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_element_types_become_float32(tmp_path, small, state, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(state, tmp_path / "weights.pt")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        loaded = inpaintrt.load("lama", tmp_path / name)
        assert all(torch.equal(v, state[k].to(v.dtype)) for k, v in loaded.state_dict().items())


def test_missing_counters_are_zero(state):
    """num_batches_tracked plays no part in inference, and converters leave it out."""
    short = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    loaded = loading.build("lama", short)
    assert loaded.state_dict()["model.1.bn_l.num_batches_tracked"].tolist() == 0


def test_parameters_views_and_shared_storages(tmp_path, small, state):
    """Tensors that are parameters, transposed views, or slices of one flat storage."""
    flat = torch.cat([v.flatten() for v in state.values() if v.is_floating_point()])
    start, odd = 0, {}
    for i, (key, value) in enumerate(state.items()):
        if not value.is_floating_point():
            odd[key] = value
            continue
        odd[key] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
        if i % 3 == 1 and value.dim() == 4:
            odd[key] = value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        if i % 3 == 2:
            odd[key] = nn.Parameter(value)
    for old in (False, True):
        torch.save(odd, tmp_path / "weights.pt", _use_new_zipfile_serialization=not old)
        assert same(inpaintrt.load("lama", tmp_path / "weights.pt"), small)


def test_weights_are_copies(state):
    loaded = loading.build("lama", state)
    before = loaded.model[1].ffc.convl2l.weight.detach().clone()
    state["model.1.ffc.convl2l.weight"].zero_()
    assert torch.equal(loaded.model[1].ffc.convl2l.weight, before)


@pytest.mark.parametrize(
    "options",
    [{"gated": True}, {"bias": True}, {"batch_norm": False}, {"ratio": 1}, {"ratio": 0, "n_downsampling": 1},
     {"enable_lfu": True, "ratio": 0.5, "base_width": 8}, {"in_channels": 5, "out_channels": 1}],
    ids=str,
)  # fmt: skip
def test_configuration_comes_from_the_shapes(tmp_path, options):
    network = recipe.fill(models.create("lama", **{"n_blocks": 2, "base_width": 4, **options}))
    torch.save({"state_dict": prefixed(network.state_dict(), "generator.")}, tmp_path / "weights.ckpt")
    loaded = inpaintrt.load("lama", tmp_path / "weights.ckpt")
    x = recipe.image("shapes", 1, loaded.config["in_channels"], 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))


def test_options_that_shapes_do_not_show_can_be_given(tmp_path):
    options = {"output_activation": "tanh", "padding_mode": "zeros", "down_padding_mode": "reflect"}
    network = recipe.fill(models.create("lama", n_blocks=1, base_width=4, **options))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    assert same(inpaintrt.load("lama", tmp_path / "weights.pt", **options), network)
    with pytest.raises(TypeError, match="colour"):
        inpaintrt.load("lama", tmp_path / "weights.pt", colour="red")
    with pytest.raises(ValueError, match="output_activation is 'step'"):
        inpaintrt.load("lama", tmp_path / "weights.pt", output_activation="step")
    with pytest.raises(WeightsError, match=r"the key 'model\.6\.conv1.* is missing"):
        inpaintrt.load("lama", tmp_path / "weights.pt", n_blocks=5)


def test_several_generators(state, small):
    other = {k: v + 1 for k, v in state.items()}
    both = {**prefixed(other, "generator_average."), **prefixed(state, "generator.")}
    assert same(loading.build("lama", both), small), "the one that is called generator"
    average = loading.build("lama", both, prefix="generator_average")
    assert torch.equal(average.model[1].bn_l.bias, other["model.1.bn_l.bias"])
    two = {**prefixed(state, "a."), **prefixed(other, "b.")}
    with pytest.raises(WeightsError, match=r"2 lama generators, 'a.model', 'b.model'; choose one with prefix"):
        loading.build("lama", two)
    with pytest.raises(WeightsError, match="0 lama generators under 'c'"):
        loading.build("lama", two, prefix="c")
    assert same(loading.build("lama", two, prefix="a."), small)


# ---- TorchScript archives and pickled modules -----------------------------------------------------------------------


class Traced(nn.Module):
    """The wrapper that public archives are traced from: image and mask in, blended image out."""

    def __init__(self, generator):
        super().__init__()
        self.model = nn.Module()
        self.model.generator = generator

    def forward(self, image, mask):
        x = torch.cat([image * (1 - mask), mask], dim=1)
        return mask * self.model.generator(x) + (1 - mask) * image


def archive(network, path, mask_dtype=torch.int64, **trace):
    example = torch.rand(1, 3, 32, 24), torch.ones(1, 1, 32, 24, dtype=mask_dtype)
    script = torch.jit.trace(Traced(network.eval()), example, **trace)
    script.save(str(path))
    return script


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
def test_torchscript_archive(tmp_path, small, mask_dtype):
    script = archive(small, tmp_path / "big-lama.pt", mask_dtype)
    names = list(script.state_dict())
    assert all(name.startswith("model.generator.model.") for name in names)
    loaded = inpaintrt.load("lama", tmp_path / "big-lama.pt")
    assert same(loaded, small)
    image, mask = torch.rand(1, 3, 40, 16), (torch.rand(1, 1, 40, 16) > 0.5).to(mask_dtype)
    with torch.no_grad():
        torch.testing.assert_close(loaded.inpaint(image, mask), script(image, mask))
    assert same(loading.build("lama", script.state_dict(), "script"), small), "as a loaded module's state dict, too"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"output_activation": "tanh"},
        {"output_activation": "none", "padding_mode": "zeros"},
        {"down_padding_mode": "zeros"},
        {"padding_mode": "replicate", "down_padding_mode": "circular"},
        {"ratio": 1, "down_padding_mode": "zeros"},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["traced", "scripted", "pickled"])
def test_what_modules_show_is_read(tmp_path, options, form):
    """Padding modes and the output activation are in the archive's code, and in a pickled module's attributes."""
    network = recipe.fill(models.create("lama", n_blocks=1, base_width=4, **options))
    if form == "traced":
        archive(network, tmp_path / "model.pt")
    elif form == "scripted":  # FFCs do not script; their layers do, and those are what is looked at
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d | nn.Sigmoid | nn.Tanh):
                    setattr(module, name, torch.jit.script(child))
        archive(network, tmp_path / "model.pt")
    else:
        torch.save(network, tmp_path / "model.pt")
    loaded = inpaintrt.load("lama", tmp_path / "model.pt")
    assert loaded.config["output_activation"] == options.get("output_activation", "sigmoid")
    x = recipe.image("shown", 1, 4, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), network(x), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_code_is_not_run(tmp_path, small, monkeypatch):
    """The archive is read as data: neither torch.jit nor torch.load is entered, and broken code does not matter."""
    archive(small, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "broken.pt", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, b"raise SystemExit" if name.endswith(".py") else whole.read(name))

    def never(*_, **__):
        raise AssertionError("called")

    for module, name in (
        (torch.jit, "load"),
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(module, name, never)
    assert same(inpaintrt.load("lama", tmp_path / "broken.pt"), small)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_frozen_archive_is_refused(tmp_path, small):
    torch.jit.freeze(torch.jit.trace(small, torch.rand(1, 4, 16, 16))).save(str(tmp_path / "frozen.pt"))
    with pytest.raises(WeightsError, match="a frozen TorchScript archive, whose weights are constants without names"):
        inpaintrt.load("lama", tmp_path / "frozen.pt")


def test_unknown_last_layer_is_refused_unless_told(tmp_path, small):
    network = models.create("lama", n_blocks=1, base_width=4)
    network.model[-1] = nn.Softsign()
    torch.save(network, tmp_path / "module.pt")
    with pytest.raises(WeightsError, match="output_activation is 'Softsign'; accepted: 'sigmoid'"):
        inpaintrt.load("lama", tmp_path / "module.pt")
    assert inpaintrt.load("lama", tmp_path / "module.pt", output_activation="none").config["n_blocks"] == 1


# ---- foreign code ---------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module whose classes can be pickled, but neither imported nor called any more."""
    module = types.ModuleType("foreign_application")
    source = """
class Config(dict):
    def __setstate__(self, state): raise AssertionError("ran")
    def __getstate__(self): return {"hidden": 1}
class Callback:
    def __init__(self): self.best = 0.5
    def __reduce__(self): return Callback, (), {"best": 1}
class Slotted:
    __slots__ = ("a",)
    def __init__(self): self.a = 1
class New:
    def __new__(cls, a, *, b=0): return super().__new__(cls)
    def __getnewargs_ex__(self): return (1,), {"b": 2}
class Eager:
    def __new__(cls, path): __import__("pathlib").Path(path).touch()
"""
    exec(source, module.__dict__)
    for name in ("Config", "Callback", "Slotted", "New", "Eager"):
        getattr(module, name).__module__ = module.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_lightning_checkpoint_with_foreign_objects(tmp_path, small, state, foreign, monkeypatch, old):
    checkpoint = {
        "pytorch-lightning_version": "1.2.9",
        "callbacks": {foreign.Callback: {"best_model_path": pathlib.PurePosixPath("a/b.ckpt"), "monitor": foreign.Callback()}},
        "hyper_parameters": foreign.Config(generator={"kind": "ffc_resnet"}),
        "odd": [foreign.Slotted(), foreign.New(1, b=2), {1, 2}, frozenset({3}), b"bytes", 2**70, 1.5, None, True, complex(1)],
        "lr_schedulers": [collections.defaultdict(list, a=[1]), collections.Counter("aab")],
        "state_dict": collections.OrderedDict(prefixed(state, "generator.")),
    }  # fmt: skip
    torch.save(checkpoint, tmp_path / "best.ckpt", _use_new_zipfile_serialization=not old)
    for name in ("Config", "Callback", "Slotted", "New"):
        monkeypatch.delattr(foreign, name)
    monkeypatch.setitem(sys.modules, foreign.__name__, None)  # importing it would raise
    with pytest.raises(Exception, match=r"[Ww]eights|Unsupported"):
        torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert same(inpaintrt.load("lama", tmp_path / "best.ckpt"), small)


def test_pickled_module_of_a_foreign_class(tmp_path, small, monkeypatch):
    module = types.ModuleType("foreign_networks")

    class Inpainter(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = small
            self.discriminator = nn.Conv2d(3, 1, 1)

    Inpainter.__module__, Inpainter.__qualname__ = module.__name__, "Inpainter"
    module.Inpainter = Inpainter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for old in (False, True):
        monkeypatch.setitem(sys.modules, module.__name__, module)
        torch.save({"net": Inpainter()}, tmp_path / "module.pt", _use_new_zipfile_serialization=not old)
        monkeypatch.setitem(sys.modules, module.__name__, None)
        assert same(inpaintrt.load("lama", tmp_path / "module.pt"), small)


def _touch(path):
    """Opcodes that each make a foreign call which creates `path`, were they run by Python's unpickler."""
    target = repr(str(path)).encode()
    code = b"__import__('pathlib').Path(" + target + b").touch()"
    argument = b"X" + struct.pack("<I", len(code)) + code
    yield "REDUCE", b"c__builtin__\neval\n(" + argument + b"tR"
    yield "REDUCE after STACK_GLOBAL", b"\x8c\x08builtins\x8c\x04eval\x93" + argument + b"\x85R"
    yield "INST", b"(" + argument + b"i__builtin__\neval\n"
    yield "OBJ", b"(c__builtin__\neval\n" + argument + b"o"
    path_argument = b"X" + struct.pack("<I", len(str(path))) + str(path).encode()
    yield "NEWOBJ", b"cforeign_application\nEager\n" + path_argument + b"\x85\x81"
    yield "NEWOBJ_EX", b"cforeign_application\nEager\n" + path_argument + b"\x85}\x92"
    # a class made on the spot, whose __setstate__ is eval
    yield "BUILD", b"c__builtin__\ntype\n(X\x01\x00\x00\x00A)}X\x0c\x00\x00\x00__setstate__c__builtin__\neval\nstR)\x81" + argument + b"b"  # fmt: skip # noqa: E501


@pytest.mark.parametrize("where", ["zip", "legacy"])
def test_no_opcode_runs_foreign_code(tmp_path, small, state, foreign, where):
    """A payload beside sound weights stays inert, and the weights load; Python's own unpickler would be taken in."""
    torch.save(state, tmp_path / "sound.pt", _use_new_zipfile_serialization=where == "zip")
    assert same(inpaintrt.load("lama", tmp_path / "sound.pt"), small)  # imports what every first load imports
    for name, payload in _touch(tmp_path / "proof"):
        (tmp_path / "proof").unlink(missing_ok=True)
        pickle.loads(b"\x80\x02" + payload + b".")
        assert (tmp_path / "proof").exists(), f"{name}: the payload works"
        (tmp_path / "proof").unlink()

        path = tmp_path / "payload.pt"
        if where == "zip":
            with zipfile.ZipFile(tmp_path / "sound.pt") as sound, zipfile.ZipFile(path, "w") as out:
                for entry in sound.namelist():
                    data = sound.read(entry)
                    out.writestr(entry, data[:2] + payload + b"0" + data[2:] if entry.endswith("data.pkl") else data)
        else:
            data = (tmp_path / "sound.pt").read_bytes()
            stream = io.BytesIO(data)
            for _ in range(3):
                pickled.read(stream)
            at = stream.tell() + 2  # after the fourth pickle's PROTO
            path.write_bytes(data[:at] + payload + b"0" + data[at:])
        before = set(sys.modules)
        assert same(inpaintrt.load("lama", path), small), name
        assert not (tmp_path / "proof").exists(), name
        assert set(sys.modules) - before <= {"pickletools", "encodings.cp437"}, (
            name
        )  # the latter is zipfile's, for names


def test_globals_stay_names():
    payload = b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00exittR."
    record = pickled.read(io.BytesIO(payload))
    assert (record.name, record.args, record.kind) == ("os.system", ("exit",), "system")
    nested = pickled.read(io.BytesIO(b"\x80\x02cos\nsystem\n)R)R."[:-1] + b"."))
    assert nested.name == "os.system", "calling a record gives a record"


@pytest.mark.parametrize(
    "value",
    [{"a": [1, -1, 2**40, -(2**70), 1.5, "ü", b"x" * 300, None, True, False]}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4),
     {1, 2}, frozenset({1}), bytearray(b"abc"), [[]] * 3, "x" * 70000, {"k": {"k": {}}}],
    ids=lambda v: repr(v)[:30],
)  # fmt: skip
@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_survive(value, protocol):
    """Every protocol's opcodes for plain values; sets and bytes are calls in the old ones and become records there."""
    got = pickled.read(io.BytesIO(pickle.dumps(value, protocol)))
    if not isinstance(got, pickled.Record) and "Record(" not in repr(got):
        assert got == value
    else:
        assert protocol < 5


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_pickles_raise_nothing_but_value_error(data):
    sound = pickle.dumps({"a": [1, (2, 3), {"b": torch.Size([1])}], "c": collections.OrderedDict(x=1.5)}, data.draw(st.integers(0, 5)))  # fmt: skip # noqa: E501
    position = data.draw(st.integers(0, len(sound) - 1))
    changed = sound[:position] + data.draw(st.binary(max_size=6)) + sound[position + data.draw(st.integers(0, 4)) :]
    with contextlib.suppress(ValueError):
        pickled.read(io.BytesIO(changed))


# ---- files that are something else ----------------------------------------------------------------------------------


def refusal(path, **options):
    with pytest.raises(WeightsError) as raised:
        inpaintrt.load("lama", path, **options)
    assert str(path) in str(raised.value)
    return str(raised.value)


HEADS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 204\n",
    "web page": b"\n<!DOCTYPE html><html><title>404</title>",
    "JSON text": b'{"error": "Entry not found"}',
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "ONNX model": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0",
    "TensorFlow Lite": b"\x1c\x00\x00\x00TFL3" + bytes(64),
    "NumPy": b"\x93NUMPY\x01\x00",
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "empty file": b"",
    "unknown format beginning with b'not a checkp'": b"not a checkpoint" * 9,
    "a pickle that torch did not write": pickle.dumps({"weight": [1.0]}),
}


def test_safetensors_that_begins_like_a_pickle(tmp_path, state):
    """The length of the header comes first: 640 or 1152 bytes are the two that open a pickle of protocol 2 or 4."""
    path = tmp_path / "w.safetensors"
    for length, head in ((0x280, b"\x80\x02"), (0x480, b"\x80\x04")):
        header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
        path.write_bytes(length.to_bytes(8, "little") + header + bytes(4))
        assert path.read_bytes().startswith(head)
        assert "none of its 1 keys" in refusal(path)


@pytest.mark.parametrize("found", HEADS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_a_file_is_instead(tmp_path, found, suffix):
    path = tmp_path / f"big-lama{suffix}"
    path.write_bytes(HEADS[found])
    if "unknown" in found and suffix == ".safetensors":
        found = "damaged safetensors"
    message = refusal(path)
    assert found in message
    assert "expected safetensors, a torch checkpoint or a TorchScript archive" in message


def test_paths(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent.pt")
    (tmp_path / "folder.pt").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.pt")


def test_tensorflow_s_networks_have_a_way_out(tmp_path, monkeypatch):
    """As StyleGAN2's TensorFlow code pickles them: several, each with its variables as arrays."""
    module = types.ModuleType("dnnlib.tflib.network")
    exec("class Network:\n def __init__(self): self.variables = [('4x4/Conv/weight', 1.0)]", module.__dict__)
    module.Network.__module__ = module.__name__
    monkeypatch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
    monkeypatch.setitem(sys.modules, "dnnlib.tflib", types.ModuleType("dnnlib.tflib"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "co-mod-gan.pkl"
    for content in (module.Network(), (module.Network(), None, module.Network()), {"Gs": module.Network()}):
        path.write_bytes(pickle.dumps(content))
        assert "zengxianyu/co-mod-gan-pytorch); expected safetensors" in refusal(path)


def test_zips_that_are_no_checkpoint(tmp_path):
    def zipped(*names):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
            for name in names:
                out.writestr(name, b"")
        return refusal(tmp_path / "x.zip")

    assert "contains big-lama/models/best.ckpt; unpack it" in zipped(
        "big-lama/config.yaml", "big-lama/models/best.ckpt"
    )
    assert "an exported program (torch.export)" in zipped("m/archive_format", "m/models/model.json")
    assert "a zip archive of a.npy, b.npy" in zipped("a.npy", "b.npy")
    assert "a zip archive of a.txt;" in zipped("a.txt")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path, state, form):
    path = tmp_path / "weights"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.9, 0.9999):
        path.write_bytes(whole[: max(9, int(share * len(whole)))])
        assert any(word in refusal(path) for word in ("cut short", "damaged")), share


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_altered_bytes_never_pass_as_an_exception_of_another_kind(tmp_path, state, form):
    path = tmp_path / "weights.pt"
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    whole = bytearray(path.read_bytes())
    for at in range(40, len(whole), len(whole) // 60):
        path.write_bytes(whole[:at] + bytes(b ^ 0xFF for b in whole[at : at + 8]) + whole[at + 8 :])
        try:
            inpaintrt.load("lama", path)
        except WeightsError:
            continue


def test_other_networks(tmp_path, state):
    def message(keys):
        save_file({key: torch.zeros(2, 2) for key in keys}, tmp_path / "other.safetensors")
        return refusal(tmp_path / "other.safetensors")

    assert "none of its 1 keys ends in '1.ffc.convl2l.weight' (found layer.weight" in message(["layer.weight"])
    assert "the discriminator of a GAN" in message(["discriminator.model0.0.weight", "discriminator.model0.0.bias"])
    assert "an FcF generator" in message(["synthesis.b32.ffc_skip.0.ffc_act.ffc_block.conv1.ffc.convl2l.weight"])
    assert "a mat generator" in message(["synthesis.first_stage.conv_first.conv.weight"])
    assert "a migan generator" in message(["synthesis.b4.conv1.conv1.weight"])
    assert "a latent diffusion model" in message(["model.diffusion_model.out.0.weight"])
    assert "a LaMa without Fourier convolutions" in message(["model.11.conv_block.1.weight"])
    assert "another layout" in message(["layer1.0.conv1.ffc.convl2l.weight"])
    torch.save(
        {"gen_state_dict": state, "str_state_dict": {"rel_pos_emb.weight": torch.zeros(2)}}, tmp_path / "mpe.ckpt"
    )
    assert "masked positional encoding (lama_mpe)" in refusal(tmp_path / "mpe.ckpt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "no tensors in it, but a list" in refusal(tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    assert "no tensors in it, but a dict" in refusal(tmp_path / "empty.pt")


def test_weights_that_do_not_fit(tmp_path, state):
    def message(**changes):
        changed = {k: changes.get(k.replace(".", "_"), v) for k, v in state.items()}
        changed |= {k.replace("__", "."): v for k, v in changes.items() if "__" in k}
        torch.save({k: v for k, v in changed.items() if v is not None}, tmp_path / "weights.pt")
        return refusal(tmp_path / "weights.pt")

    assert "the key 'model.5.conv1.bn_l.bias' is missing" in message(model_5_conv1_bn_l_bias=None)
    assert "the key 'model.17.weight' is missing" in message(model_17_weight=None)
    assert "model.1.bn_l.bias is (9,), expected (4,)" in message(model_1_bn_l_bias=torch.zeros(9))
    assert "NaN or infinity, first model.1.bn_l.bias" in message(model_1_bn_l_bias=torch.full((4,), torch.nan))
    assert "NaN or infinity" in message(model_17_bias=torch.tensor([0, torch.inf, 0]))
    assert "model.17.bias is torch.int8, expected torch.float32" in message(
        model_17_bias=torch.zeros(3, dtype=torch.int8)
    )
    assert "model.17.bias is torch.complex64" in message(model_17_bias=torch.zeros(3, dtype=torch.complex64))
    extra = message(model__5__conv1__se__weight=torch.zeros(2, 3))
    assert "1 tensors that ours does not have, first 'model.5.conv1.se.weight' (2, 3)" in extra
    lost = {k: v for k, v in state.items() if not k.startswith(("model.2", "model.3", "model.4"))}
    with pytest.raises(WeightsError, match=r"the key 'model.2.ffc.convl2l.weight' is missing"):
        loading.build("lama", lost, "mine")


def test_only_what_is_needed_is_read(tmp_path, state, monkeypatch):
    """Optimizer states and discriminators, most of a training checkpoint, stay on disk."""
    save = {
        "state_dict": {**prefixed(state, "generator."), "discriminator.big": torch.zeros(1000)},
        "o": torch.zeros(7),
    }
    torch.save(save, tmp_path / "best.ckpt")
    asked = []
    inner = WeightsFile.__getitem__
    monkeypatch.setattr(WeightsFile, "__getitem__", lambda self, name: asked.append(name) or inner(self, name))
    inpaintrt.load("lama", tmp_path / "best.ckpt")
    assert sorted(asked) == sorted("state_dict.generator." + key for key in state)


def test_weights_file_is_a_mapping(tmp_path, state):
    save_file({"a.b": torch.arange(3)}, tmp_path / "w.safetensors")
    with WeightsFile(tmp_path / "w.safetensors") as file:
        assert (len(file), list(file), file["a.b"].tolist(), "c" in file) == (1, ["a.b"], [0, 1, 2], False)
        with pytest.raises(KeyError):
            file["c"]


def test_safetensors_header_is_not_trusted(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert "damaged safetensors file" in refusal(tmp_path / "w.safetensors")
    assert lama.ANCHOR in refusal_of_empty(tmp_path)


def refusal_of_empty(tmp_path):
    save_file({}, tmp_path / "none.safetensors")
    return refusal(tmp_path / "none.safetensors")
