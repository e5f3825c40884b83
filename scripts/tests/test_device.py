"""What a GPU's user meets, on machines that have none: faked cards and drivers, memory that ends, and what fp32 means."""

import importlib
import io
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from p1_cfg_ddpm import device as devices
from p1_cfg_ddpm.files import UserError
from p1_cfg_ddpm.training import MuonAdamW, orthogonalised, prepare, seed_dropout

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "hw2_data/mini/digits"
PACKAGES = ("p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion")


def call(monkeypatch, module, *arguments):
    """The line of the error with which a command ends in this process, or None."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, arguments), "--device", "cpu"])
    AcceleratorState._reset_state(True)
    module = importlib.import_module(module)
    try:
        module.run(module.main)
    except SystemExit as stop:
        return str(stop.code)
    return None


def settings(**given):
    return SimpleNamespace(**{"device": "cpu", "dtype": "fp32", "report_to": "none", "batch_size": 1, "stop_when_flat": 0, **given})


# --- what fp32 means ---

def tf32():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def tf32_on():
    devices.use_tf32(True)
    yield
    devices.use_tf32(False)


class Seen(Exception):
    """What a faked function was called under."""


def seen(*_, **__):
    raise Seen(tf32())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_command_computes_fp32_exactly_and_a_training_need_not(tf32_on, tmp_path, package):
    common, training = (importlib.import_module(f"{package}.{name}") for name in ("device", "training"))
    AcceleratorState._reset_state(True)  # of another test file's training, perhaps with another number format
    common.pick_device("cpu")
    assert tf32() == (False, False)
    training.prepare(settings(), tmp_path)
    assert tf32() == (True, True)


@pytest.mark.parametrize("module, hook, arguments, expected", [
    ("p2_ddim.inference", "draw", (ROOT / "hw2_data/mini/face/noise", "OUT", "UNet.pt"), False),
    ("p2_ddim.inference", "draw", (ROOT / "hw2_data/mini/face/noise", "OUT", "UNet.pt", "--tf32"), True),
    ("p2_ddim.figures", "load_unet", ("--output", "OUT"), False), ("p2_ddim.benchmark", "measure", ("--way", "this project, fp32"), False),
    ("p2_ddim.quality", "load_unet", ("--faces", ".", "--output", "OUT/x.json"), False),
    ("p2_ddim.sweep", "load_unet", ("--measure", "distance", "--output", "OUT/x.json"), False)])
def test_p2_is_exact_unless_told(tf32_on, monkeypatch, tmp_path, module, hook, arguments, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module(module), hook, seen)
    with pytest.raises(Seen) as caught:
        call(monkeypatch, module, *arguments)
    assert caught.value.args == ((expected, expected),)


# --- memory that ends ---

@pytest.fixture
def faces(tmp_path):
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("module, arguments, flags", [
    ("p1_cfg_ddpm.train", ("--size", "tiny", "--batch-size", 4), ("--batch-size", "--size")),
    ("p1_cfg_ddpm.classifier", ("--domain", "mnistm", "--batch-size", 4), ("--batch-size",)),
    ("p1_cfg_ddpm.distill", ("--size", "tiny", "--batch-size", 4, "--paths", 20, "--teacher-steps", 2, "--steps", 4), ("--batch-size", "--size")),
    ("p2_ddim.train", ("--image-size", 16, "--widths", 32, 32, "--attention", 1, "--batch-size", 4), ("--batch-size", "--image-size", "--dtype bf16"))])
def test_a_training_without_memory_names_the_flags_to_lower(monkeypatch, tmp_path, faces, module, arguments, flags):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 10.75 GiB")

    monkeypatch.setattr(torch.Tensor, "backward", no_memory)
    output = tmp_path / ("out.safetensors" if "classifier" in module else "out")
    error = call(monkeypatch, module, *arguments, "--data", faces if "p2" in module else DIGITS, "--output", output, "--dtype", "fp32")
    assert error.startswith("error: ") and "memory" in error and "\n" not in error and all(flag in error for flag in flags), error


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(devices, "FITTED", {})


def test_a_size_that_memory_was_found_to_hold_is_remembered(monkeypatch, fresh):
    tried, held = [], []

    class Large:
        """Of a batch that did not fit."""

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 3:
            large = Large()
            held.append(large)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sum(batch)

    for _ in range(2):
        assert [(list(batch), result) for batch, result in devices.in_batches(list(range(7)), 7, work)] == [([0, 1], 1), ([2, 3], 5), ([4, 5], 9), ([6], 6)]
    assert tried == [7, 4, 2, 2, 2, 1, 2, 2, 2, 1]


def test_nothing_of_what_failed_is_held_when_memory_is_freed(monkeypatch, fresh):
    """An exception holds the frames that it came through, and they their tensors: freed before it is gone, a GPU's memory stays taken."""
    refs, alive = [], []

    def work(batch):
        tensor = torch.zeros(10)
        refs.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(devices, "free_memory", lambda: alive.append([ref for ref in refs if ref() is not None]))
    assert len(list(devices.in_batches([1, 2, 3], 3, work))) == 3
    assert alive == [[], []]


@pytest.mark.parametrize("package", ["p2_ddim", "p3_clip_textual_inversion"])
def test_a_measurement_that_ends_without_a_word_is_told(package, tmp_path, monkeypatch):
    """As the system ends a process that takes all memory."""
    module = importlib.import_module(f"{package}.benchmark")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9, stderr="", stdout=""))
    assert "its process ended with code -9" in call(monkeypatch, f"{package}.benchmark", "--output", tmp_path / "b.json")


# --- which card ---

@pytest.fixture
def card(monkeypatch):
    """Makes torch see two cards of a capability. set: {name: what torch.cuda has by it}"""
    def fake(capability=(7, 5), name="NVIDIA GeForce RTX 2080 Ti", archs=("sm_75", "sm_80"), **others):
        for key, value in {"is_available": lambda: True, "device_count": lambda: 2, "get_device_capability": lambda *_: capability,
                           "get_device_name": lambda *_: name, "get_arch_list": lambda: list(archs), "set_device": lambda _: None, **others}.items():
            monkeypatch.setattr(torch.cuda, key, value)
    return fake


def no_kernels(_):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously reported")


def test_a_card_that_the_wheels_do_not_support_gets_the_line_that_installs_the_right_ones(monkeypatch, card, capsys):
    card((6, 1), "NVIDIA GeForce GTX 1080 Ti")
    monkeypatch.setattr(devices, "compute_something", lambda device: no_kernels(device) if device.type == "cuda" else None)
    assert devices.pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert "note: computing on the CPU" in said and "GTX 1080 Ti (sm_61)" in said and devices.OLDER_WHEELS in said and len(said.splitlines()) == 1
    with pytest.raises(UserError, match="GTX 1080 Ti") as caught:
        devices.pick_device("cuda")
    assert devices.OLDER_WHEELS in str(caught.value)
    card((12, 0), "NVIDIA GeForce RTX 5090")
    with pytest.raises(UserError) as caught:
        devices.pick_device("cuda")
    assert devices.NEWER_WHEELS in str(caught.value)


def test_a_driver_that_is_too_old_is_said(monkeypatch, card, capsys):
    def too_old():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update (Triggered at x)", stacklevel=2)
        return False

    card(is_available=too_old, device_count=lambda: 0)
    monkeypatch.setattr(devices, "Path", lambda _: SimpleNamespace(exists=lambda: True))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(devices, "compute_something", lambda device: None)
    assert devices.pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().err
    assert "too old (found version 11040)" in said and devices.OLDER_WHEELS in said and "Triggered" not in said
    with pytest.raises(UserError, match="too old"):
        devices.pick_device("cuda")


def test_the_second_card_is_obeyed(monkeypatch, card):
    taken, used = [], []
    card(set_device=taken.append)
    monkeypatch.setattr(devices, "compute_something", used.append)
    assert devices.pick_device("cuda:1") == torch.device("cuda:1") and taken == [torch.device("cuda:1")]
    used.clear()
    for rank, own in (("1", "cuda:1"), ("", "cuda:0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert devices.pick_device("auto") == torch.device(own) and set(used) == {torch.device(own)}  # no other: each would hold memory of the first one
        used.clear()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_state_of_another_number_format_goes_on(package):
    """Without the scaler of fp16, where one computed in bf16 or fp32 before: `--dtype auto` on another card."""
    state = importlib.import_module(f"{package}.state")
    before = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for saved, own, scale in ((None, torch.amp.GradScaler("cpu", init_scale=512.0), 512.0), (before.state_dict(), torch.amp.GradScaler("cpu"), 1024.0),
                              (before.state_dict(), None, None)):
        content = {"step": 3, "history": [], "recent": [], "scaler": saved}
        assert state.restore(Path("state.pt"), content, SimpleNamespace(scaler=own, device="cpu")) == (3, [], [])
        assert own is None or own.get_scale() == scale


@pytest.mark.parametrize("package", PACKAGES)
def test_variables_without_a_launch_mean_nothing(monkeypatch, package):
    for name, value in (("WORLD_SIZE", ""), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
        with importlib.import_module(f"{package}.device").processes() as share:
            assert share == (0, 1)


def test_a_training_trains_on_the_second_card(monkeypatch, card, tmp_path):
    """accelerate's "cuda" is the card that is current, which stays the second."""
    current = []
    card(set_device=current.append, current_device=lambda: current[-1].index, is_bf16_supported=lambda *_, **__: True)
    monkeypatch.setattr(devices, "compute_something", lambda device: None)
    AcceleratorState._reset_state(True)
    try:
        assert prepare(settings(device="cuda:1"), tmp_path)[0].device == torch.device("cuda") and current == [torch.device("cuda:1")]
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("capability, name, among, expected", [
    ((6, 1), "GTX 1080 Ti", ("bf16", "fp16"), "fp32"), ((7, 0), "V100", ("bf16", "fp16"), "fp16"), ((7, 5), "RTX 2080 Ti", ("bf16", "fp16"), "fp16"),
    ((7, 5), "GTX 1660", ("bf16", "fp16"), "fp32"), ((8, 0), "A100", ("bf16", "fp16"), "bf16"), ((9, 0), "H100", ("bf16", "fp16"), "bf16"),
    ((7, 5), "RTX 2080 Ti", ("bf16",), "fp32"), ((8, 6), "RTX 3080", ("bf16",), "bf16")])
def test_the_number_format_is_one_that_the_card_computes_fast(card, capability, name, among, expected):
    card(capability, f"NVIDIA {name}")
    assert devices.name_of(devices.pick_dtype("auto", torch.device("cuda:0"), among)) == expected


@pytest.mark.parametrize("capability, name, slow", [((7, 5), "RTX 2080 Ti", ["bf16"]), ((6, 1), "GTX 1080 Ti", ["bf16", "fp16"]), ((8, 0), "A100", [])])
def test_a_slow_number_format_is_taken_with_a_note(card, capability, name, slow, capsys):
    card(capability, f"NVIDIA {name}")
    for asked, dtype in devices.DTYPES.items():
        assert devices.pick_dtype(asked, torch.device("cuda:0")) == dtype
        assert (f"{name}) computes {asked} slower than fp32" in capsys.readouterr().err) == (asked in slow)


# --- half precision and several processes ---

@pytest.mark.parametrize("fast, expected", [(("bf16",), torch.bfloat16), (("bf16", "fp16"), torch.bfloat16), (("fp16",), torch.float32), ((), torch.float32)])
def test_muon_computes_in_bf16_only_where_it_is_fast(monkeypatch, fast, expected):
    """Elsewhere a processor takes twenty times as long, and Pascal refuses such products of many matrices."""
    computed = []
    monkeypatch.setattr(devices, "fast_dtypes", lambda device: fast)
    monkeypatch.setattr(torch, "baddbmm", lambda a, b, c, **factors: computed.append(b.dtype) or a)
    orthogonalised(torch.randn(2, 3, 5))
    assert set(computed) == {expected}


def test_gradients_are_unscaled_once_and_an_overflow_stops_both_optimisers():
    """As accelerate does: unscale for clipping, then step through the scaler."""
    kernel, bias = torch.nn.Parameter(torch.randn(6, 6, 3, 3, generator=torch.Generator().manual_seed(0))), torch.nn.Parameter(torch.zeros(6))
    optimizer, scaler = MuonAdamW([kernel], [], [bias], 0.01, 0.0, (0.9, 0.99)), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = kernel.detach().clone()
    for factor, moved, scale in ((float("inf"), False, 512.0), (1.0, True, 512.0)):
        optimizer.zero_grad()
        scaler.scale((kernel.square().sum() + bias.sum()) * factor).backward()
        scaler.unscale_(optimizer)
        if moved:
            assert torch.allclose(kernel.grad, 2 * before) and torch.allclose(bias.grad, torch.ones(6))
        scaler.step(optimizer)
        scaler.update()
        assert (not torch.equal(kernel, before), bool(bias.any()), scaler.get_scale()) == (moved, moved, scale)


def test_dropout_differs_by_process_and_step_and_not_by_call():
    def mask(*args):
        seed_dropout(*args)
        return torch.nn.functional.dropout(torch.ones(64))

    assert torch.equal(mask(0, 5, 0), mask(0, 5, 0))
    assert not any(torch.equal(mask(0, 5, 0), mask(*other)) for other in ((0, 5, 1), (0, 6, 0), (1, 5, 0)))


# --- torch.compile ---

@pytest.mark.parametrize("package", ["p1_cfg_ddpm", "p2_ddim"])
def test_the_networks_compile_whole_and_once(package):
    """No graph breaks (fullgraph raises), and another moment, as each step of a sampler has, is no new graph."""
    model = importlib.import_module(f"{package}.model")
    if package == "p1_cfg_ddpm":
        net, rest = model.UNet(model.SIZES["tiny"]), (torch.tensor([3, 4]), torch.tensor([0, 1]))
    else:
        net, rest = model.UNet(model.UNetConfig((32, 32), (1,), 1)), ()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, x = torch.compile(net.eval(), backend=count, fullgraph=True), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        for t in (999, 500, 0):
            assert torch.allclose(compiled(x, torch.full((2,), t), *rest), net(x, torch.full((2,), t), *rest), atol=1e-5)
    assert len(graphs) == 1


def test_blocks_are_compiled_and_nothing_else(monkeypatch):
    """Each of P1's and P2's networks by itself, for shapes that do not change; without a compiler here."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    for package, config in (("p1_cfg_ddpm", lambda model: model.SIZES["tiny"]), ("p2_ddim", lambda model: model.UNetConfig((32, 32), (1,), 1))):
        model = importlib.import_module(f"{package}.model")
        net = model.UNet(config(model))
        importlib.import_module(f"{package}.device").compile_blocks(net, model.Block)
        blocks = [module for module in net.modules() if isinstance(module, model.Block)]
        assert len(blocks) > 3 and [(id(module), options) for module, options in compiled] == [(id(block), {"dynamic": False}) for block in blocks]
        compiled.clear()


# --- what is seen of the work ---

def test_without_a_terminal_there_is_a_plain_line_each_half_minute(monkeypatch):
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with devices.progress(total=100, unit="step", desc="training", file=file) as bar:
        for _ in range(100):
            now[0] += 1
            bar.update()
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and len(lines) == 3, lines
    assert [line.split("steps")[0] for line in lines] == [f"training: {n} of 100 " for n in (30, 60, 90)] and all(" left, " in line for line in lines), lines
