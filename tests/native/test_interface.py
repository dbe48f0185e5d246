"""The wall between Python and the kernels: what does not fit is an error with words, never memory overwritten."""

# pyright: reportPrivateUsage=false
import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import taipan
from taipan.errors import InputError
from taipan.generation import start_decoding
from taipan.generation.decoding import NativeDecoding
from taipan.native import build, call, interface, invoke, library, native_status
from taipan.native.fields import Index, Int32, Structure, fields_of
from taipan.native.interface import FUNCTIONS, mismatch
from tests.compilers import answer, needs_compiler, needs_kernels, reason, tiny_kernels, write_kernels
from tests.models import VARIANTS, small_model

REALS = {"float": torch.float32, "double": torch.float64}


# ---------------------------------------------------------------------- layouts


@needs_kernels
@pytest.mark.parametrize("real", REALS)
def test_the_library_was_compiled_with_these_structures_and_functions(real: str) -> None:
    loaded: Any = native_status(REALS[real]).library
    said = loaded.taipan_interface().decode()
    assert said.splitlines() == interface.described(real)
    assert mismatch(said, real) is None


@needs_kernels
def test_every_function_has_its_types_and_takes_no_other_arguments() -> None:
    loaded: Any = native_status().library
    for name, arguments in FUNCTIONS.items():
        function = getattr(loaded, f"taipan_{name}")
        assert function.restype is ctypes.c_int
        assert function.argtypes == (ctypes.POINTER(arguments), ctypes.c_int)
        other = interface.Digest if arguments is not interface.Digest else interface.Decode
        for wrong in ((other(), 1), (5, 1), (arguments(),), (arguments(), 1.5)):
            with pytest.raises((ctypes.ArgumentError, TypeError)):
                function(*wrong)


def test_functions_are_called_in_one_place() -> None:
    source = Path(taipan.__file__).parent
    calls = [
        path
        for path in source.rglob("*.py")
        if re.search(r"library\.taipan_|library, f\"taipan_", path.read_text("utf-8"))
    ]
    assert [path.relative_to(source).as_posix() for path in calls] == ["native/library.py"]


Fields = list[tuple[str, Any]]
SLIPS: dict[str, Callable[[Fields], Fields]] = {
    "a word missing": lambda fields: fields[:-1],
    "a word too many": lambda fields: [*fields, ("more", Index)],
    "another order": lambda fields: [fields[1], fields[0], *fields[2:]],
    "another name": lambda fields: [("another", fields[0][1]), *fields[1:]],
    "another type": lambda fields: [*fields[:-1], (fields[-1][0], Int32)],
    "another size": lambda fields: [*fields[:-1], (fields[-1][0], ctypes.c_int32)],
    "more of them": lambda fields: [*fields[:-1], (fields[-1][0], Index * 4)],
}


def planted(name: str, slip: str) -> tuple[type[Structure], ...]:
    """The structures, one of them declared wrongly."""
    given = next(structure for structure in interface.STRUCTURES if structure.__name__ == name)
    fields = SLIPS[slip](list(fields_of(given)))
    wrong = type(name, (Structure,), {"_fields_": fields})
    return tuple(wrong if structure is given else structure for structure in interface.STRUCTURES)


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("name", ["DecodeSizes", "Matrix", "Layer", "State", "SsdSizes", "AttentionSizes"])
@pytest.mark.parametrize("real", REALS)
def test_every_slip_in_a_structure_is_named(name: str, slip: str, real: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "\n".join(interface.described(real))
    monkeypatch.setattr(interface, "STRUCTURES", planted(name, slip))
    problem = mismatch(said, real)
    assert problem is not None
    assert problem.startswith(f"{name} has ")


def test_a_function_with_other_arguments_or_none_is_named() -> None:
    said = "\n".join(interface.described("float"))
    assert "ssd_forward(SsdForward) in Python and ssd_forward(SsdBackward)" in str(
        mismatch(said.replace("ssd_forward(SsdForward)", "ssd_forward(SsdBackward)"), "float")
    )
    assert "the library" in str(mismatch(said.rpartition("\n")[0], "float"))
    assert "the library" in str(mismatch(f"{said}\nmore(Digest)", "float"))
    assert mismatch("", "float") is not None
    assert "float" in str(mismatch(said, "double"))


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    with tiny_kernels(tmp_path) as patch:
        yield patch


@needs_compiler
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_a_reason_and_no_library_is_used(slip: str, tiny: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.setattr(interface, "STRUCTURES", planted("Layer", slip))
    said = reason()
    assert said.startswith("the compiled kernels do not fit the Python code of taipan: Layer has ")
    assert said.endswith("install it again")


@needs_compiler
@pytest.mark.parametrize("wrong", ["another layout", "a function missing"])
def test_a_library_of_another_interface_is_built_again(
    wrong: str, tiny: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.setattr(build, "_key", lambda *_: "0" * 16)
    write_kernels(tmp_path, 41)
    source = tmp_path / "kernels" / "tiny.cpp"
    text = source.read_text("utf-8")
    changed = (
        text.replace("Layer 560", "Layer 552") if wrong == "another layout" else text.replace("taipan_decode", "f")
    )
    source.write_text(changed if changed != text else text.replace("Layer ", "Layer 1"), "utf-8")
    assert "do not fit" in reason()
    write_kernels(tmp_path, 42)
    caplog.clear()
    assert answer() == 42
    assert "Compiling the kernels again" in caplog.text


# ---------------------------------------------------------------------- values


def cross_entropy(**changes: Any) -> dict[str, Any]:
    return {
        "rows": 2,
        "columns": 3,
        "narrow": 0,
        "learns": 1,
        "logits": torch.zeros(2, 3),
        "target": torch.tensor([0, 2]),
        "loss": torch.zeros(2, dtype=torch.float64),
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float64)}, r"CrossEntropy.logits: .* tensor of torch.float64"),
        ({"target": torch.zeros(2, dtype=torch.int32)}, r"CrossEntropy.target: .* tensor of torch.int32"),
        ({"loss": torch.zeros(2)}, r"CrossEntropy.loss: .* tensor of torch.float32"),
        ({"loss": None}, "CrossEntropy.loss: NoneType instead of a tensor"),
        ({"loss": 12345}, "CrossEntropy.loss: int instead of a tensor"),
        ({"rows": 2.0}, "CrossEntropy.rows: .*int"),
        ({"more": 1}, "CrossEntropy has no more"),
    ],
)
def test_a_wrong_value_of_a_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        interface.CrossEntropy.of(torch.float32, **cross_entropy(**changes))


def test_a_missing_value_is_named() -> None:
    for name in cross_entropy():
        values = cross_entropy()
        del values[name]
        with pytest.raises(TypeError, match=f"CrossEntropy needs {name}"):
            interface.CrossEntropy.of(torch.float32, **values)


def test_strides_are_three_numbers() -> None:
    values: dict[str, Any] = {
        name: 1 if kind is Index else (1, 2, 3) for name, kind in fields_of(interface.AttentionSizes)
    }
    assert list(interface.AttentionSizes.of(**values).dout) == [1, 2, 3]
    for wrong in ((1, 2), (1, 2, 3, 4), 5):
        with pytest.raises(TypeError, match=r"AttentionSizes.dout: .* is not 3 whole numbers"):
            interface.AttentionSizes.of(**{**values, "dout": wrong})


def test_a_tensor_of_another_device_is_named() -> None:
    with pytest.raises(InputError, match="a tensor is on meta"):
        interface.CrossEntropy.of(torch.float32, **cross_entropy(logits=torch.zeros(2, 3, device="meta")))


# ---------------------------------------------------------------------- what kernels index by


@needs_kernels
@pytest.mark.parametrize("target", [3, -1, 2**62, -(2**62)])
def test_a_class_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(InputError, match="cross_entropy: a token id, class, row or count is out of range"):
        call(torch.float32, interface.CrossEntropy, **cross_entropy(target=torch.tensor([0, target])))


def decoding(dtype: torch.dtype = torch.float32) -> NativeDecoding:
    model = small_model(("mamba2", "selective_attention", "full_attention", "sliding_attention"), dtype=dtype)
    started = start_decoding(model, model.empty_state(3))
    assert isinstance(started, NativeDecoding)
    started.step(torch.tensor([1, 2, 3]))
    return started


@needs_kernels
@pytest.mark.parametrize("value", [-1, 61, 2**62, -(2**62)])
@pytest.mark.parametrize("field", ["tokens", "rows", "position", "behind", "count"])
def test_a_number_that_decoding_indexes_by_is_checked(field: str, value: int) -> None:
    started = decoding()
    whole = {"tokens": [1, 2, 3], "rows": [0, 1, 2]}
    held = {name: torch.tensor(numbers) for name, numbers in whole.items()}
    arguments, logits = started._arguments, torch.zeros(3, 61)
    arguments.tokens, arguments.rows = (held[name].data_ptr() for name in ("tokens", "rows"))
    arguments.logits, arguments.count = logits.data_ptr(), 3
    if field in held:
        held[field][1] = value
    elif field == "position":
        started._position_B[1] = value
    elif field == "behind":
        started._behind_B[1] = value
    else:
        count_B = started._layers[1].count  # of a selective attention layer
        assert count_B is not None
        count_B[1] = value
    harmless = field in ("position", "count") and value > 0
    if harmless and value < 2**32:
        invoke(torch.float32, arguments)
    elif not harmless:
        with pytest.raises(InputError, match="decode: a token id, class, row or count is out of range"):
            invoke(torch.float32, arguments)


@needs_kernels
@pytest.mark.parametrize("follower", [61, 2**62])
def test_a_remembered_token_that_no_vocabulary_has_is_refused(follower: int) -> None:
    model = small_model("taipan", **VARIANTS["recall"])
    started = start_decoding(model, model(torch.tensor([[5, 1, 2]])).state)
    assert isinstance(started, NativeDecoding)
    assert started._recent_BR is not None
    started._recent_BR[0, -2] = follower  # it came after the 5 that is read again
    with pytest.raises(InputError, match="decode: a token id, class, row or count is out of range"):
        started.step(torch.tensor([5]))
    started._recent_BR[0, -2] = 1
    assert started.step(torch.tensor([5])).isfinite().all()


@needs_kernels
def test_what_recalling_gates_need_is_asked_for() -> None:
    model = small_model("taipan", **VARIANTS["recall"])
    started = start_decoding(model, model.empty_state(2))
    assert isinstance(started, NativeDecoding)
    arguments = started._arguments
    arguments.count = 0
    invoke(torch.float64, arguments)
    layer, state = arguments.layers[1], arguments.states[1]
    for structure, name, wrong in (
        (layer, "recall_query_weight", None),
        (layer, "recall_key_bias", None),
        (layer, "keys_of_all", 0),
        (layer.values, "columns", 24),
        (state, "recent", None),
        (arguments, "orders", None),
        (arguments, "recent", None),
        (arguments.sizes, "window", 8),
        (arguments.sizes, "remembered", 7),
        (arguments.sizes, "orders", 0),
        (arguments.sizes, "rank", 0),
    ):
        field = getattr(structure, name)
        right = getattr(field, "value", field)  # a field is a view of its structure
        setattr(structure, name, wrong)
        with pytest.raises(RuntimeError, match="decode: the kernels do not do this"):
            invoke(torch.float64, arguments)
        setattr(structure, name, right)
        invoke(torch.float64, arguments)
    arguments.sizes.scores = 3  # that no state has
    state.scores = None
    with pytest.raises(RuntimeError, match="decode: the kernels do not do this"):
        invoke(torch.float64, arguments)
    arguments.sizes.scores = 0
    invoke(torch.float64, arguments)
    orders = torch.tensor([1, 3, 2])
    arguments.orders = orders.data_ptr()
    with pytest.raises(RuntimeError, match="decode: the kernels do not do this"):
        invoke(torch.float64, arguments)


@needs_kernels
@pytest.mark.parametrize("value", [-1, 1, 2**62])
def test_states_that_catch_up_are_checked(value: int) -> None:
    started = decoding()
    rows = torch.tensor([0, 2])
    arguments = started._arguments
    arguments.rows, arguments.count = rows.data_ptr(), 2
    call(torch.float32, interface.Settle, decode=arguments)
    started._behind_B[2] = value
    with pytest.raises(InputError, match="settle: a token id, class, row or count is out of range"):
        call(torch.float32, interface.Settle, decode=arguments)
    rows[1] = 3
    with pytest.raises(InputError, match="settle: a token id, class, row or count is out of range"):
        call(torch.float32, interface.Settle, decode=arguments)


@needs_kernels
def test_rows_that_meet_are_refused() -> None:
    started, logits = decoding(), torch.zeros(3, 61)
    tokens, rows = torch.tensor([1, 2, 3]), torch.tensor([0, 0, 1])
    arguments = started._arguments
    arguments.tokens, arguments.rows, arguments.logits = tokens.data_ptr(), rows.data_ptr(), logits.data_ptr()
    for count in (2, 3, 4, -1):
        arguments.count = count
        with pytest.raises(InputError, match="out of range"):
            invoke(torch.float32, arguments)


@needs_kernels
@pytest.mark.parametrize("layer", range(4))
def test_what_does_not_fit_the_sizes_is_refused(layer: int) -> None:
    """A matrix of other rows, an address that is missing, a window without slots: the layers are of every type."""
    started = decoding()
    arguments = started._arguments
    arguments.count = 0
    invoke(torch.float32, arguments)  # no row gets a token

    def refused() -> None:
        with pytest.raises(RuntimeError, match="decode: the kernels do not do this"):
            invoke(torch.float32, arguments)

    own, state = arguments.layers[layer], arguments.states[layer]
    for structure, name, wrong in (
        (own.first, "rows", 7),
        (own.first, "columns", 7),
        (own.first, "weight", None),
        (own.first, "scale", 8),
        (own.last, "rows", 7),
        (own, "norm", None),
        (own, "kind", 4),
        (own, "kind", -1),
        (state, "first", None),
        (state, "second", None),
        *(
            ((own, "conv_weight", None), (own, "A", None), (arguments, "most_behind", 1))
            if layer == 0
            else ((state, "slots", 0), (state, "count", None))
        ),
        *(((own, "threshold", None), (own, "gate_weight", None)) if layer == 1 else ()),
        (arguments.head, "rows", 60),
        (arguments.sizes, "format", 3),
        (arguments.sizes, "heads", 5),
        (arguments.sizes, "groups", 0),
        (arguments.sizes, "hidden", 48),
        (arguments.embedding, "weight", None),
        (arguments.embedding, "rows", 60),
        (arguments, "most_behind", 8),
        (arguments, "most_behind", -1),
        (arguments, "behind", None),
    ):
        field = getattr(structure, name)
        right = getattr(field, "value", field)  # a field is a view of its structure
        setattr(structure, name, wrong)
        refused()
        setattr(structure, name, right)
        invoke(torch.float32, arguments)
    invoke(torch.float32, arguments)


@needs_kernels
def test_a_plan_of_attention_that_leads_out_of_its_tensors_is_refused() -> None:
    from taipan.ops.attention import native

    q, k = torch.randn(1, 16, 2, 16), torch.randn(1, 16, 2, 16)
    inputs = native._Call(q, k, k)
    index = torch.arange(16)[None]
    given = native.AttentionInputs(q_BQHE=q, k_BJGE=k, v_BJGE=k, query_index_BQ=index, key_index_BJ=index, window=4)
    plan = inputs.plan(native.window_codes(given))
    native._forward(inputs, plan)
    for name, wrong in (("key", 16), ("key", -1), ("query", 16), ("first", 17), ("stop", -1), ("counts", 17)):
        field = getattr(plan, name).clone()
        field.view(-1)[0] = wrong
        damaged = plan._replace(**{name: field})
        with pytest.raises(InputError, match="attention_forward"):
            call(
                torch.float32,
                interface.AttentionForward,
                sizes=inputs.sizes(),
                q=q,
                k=k,
                v=k,
                plan=inputs.planned(damaged),
                out=torch.empty_like(q),
                statistics=torch.empty(100_000),
            )


def test_a_library_that_is_none_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "native_status", lambda _: library.NativeStatus(library=None, reason="no compiler"))
    with pytest.raises(RuntimeError, match="no native kernels: no compiler"):
        call(torch.float32, interface.CrossEntropy, **cross_entropy())
