"""Law 2: methods reproduce the reference vectors, through adapters that hold no formula of their own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tests.laws.paths import called_by, not_reached_by_users

ADAPTERS = Path(__file__).parent.parent / "conformance"
VECTORS = Path(os.environ.get("LOWBIT_REFERENCE_VECTORS", ADAPTERS.parents[1].parent / "shared" / "golden"))
ADAPTED = sorted(path for path in ADAPTERS.glob("[a-z]*.py") if path.stem != "conftest" and not path.stem.startswith("test_"))


def cases() -> list[object]:
    """One parameter for each case of each method that has an adapter and vectors."""
    found: list[object] = []
    for adapter in ADAPTED:
        folder = VECTORS / adapter.stem
        if (folder / "cases.json").exists():
            content = json.loads((folder / "cases.json").read_text())
            found += [pytest.param(adapter, case, id=f"{adapter.stem}-{case['id']}") for case in content["cases"]]
    missing = pytest.mark.skip(reason=f"no reference vectors at {VECTORS}; set LOWBIT_REFERENCE_VECTORS to their folder")
    return found or [pytest.param(None, None, marks=missing, id="none")]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"conformance_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("adapter", "case"), cases())
def test_reproduces_the_reference_vectors(adapter: Path, case: dict[str, dict[str, object]]) -> None:
    tensors = load_file(VECTORS / adapter.stem / "tensors.safetensors")
    inputs = {key: tensors[value].clone() if isinstance(value, str) else value for key, value in case["inputs"].items()}
    outputs = getattr(load(adapter), str(case["function"]))(dict(case["params"]), inputs)
    for name, value in case["expected"].items():
        expected = (tensors[value] if isinstance(value, str) else torch.as_tensor(value)).double()
        got = torch.as_tensor(outputs[name]).detach().double().reshape(expected.shape)
        if name in case.get("at_most", ()):
            assert bool((got <= expected * (1 + case.get("rtol", 1e-5)) + case.get("atol", 1e-6)).all()), name
        else:
            torch.testing.assert_close(got, expected, rtol=case.get("rtol", 1e-5), atol=case.get("atol", 1e-6), equal_nan=True, msg=name)


METHODS = {
    "bi_real_net": ("bi_real_net", "react_net"),
    "dsg": ("dsg", "zeroq"),
    "hawq": ("hawq", "hawq_v2"),
    "sr_networks": (),
}  # of adapters whose vectors are those of more than their own method
CALLED_BY_USERS = {
    "integer_only": ("formats/fixed_point/",),  # what runtimes compute, operator by operator, for users to hold their chips against
    "sr_networks": ("data/image_data", "measure/picture_quality", "qat/task", "resize"),  # a task, no method
}


def called_for_all_cases(adapter: Path) -> set[str]:
    """The functions of lowbit that an adapter calls itself in all its cases."""
    content = json.loads((VECTORS / adapter.stem / "cases.json").read_text())["cases"]
    tensors, module = load_file(VECTORS / adapter.stem / "tensors.safetensors"), load(adapter)

    def work() -> None:
        for case in content:
            inputs = {key: tensors[value].clone() if isinstance(value, str) else value for key, value in case["inputs"].items()}
            getattr(module, case["function"])(dict(case["params"]), inputs)

    return called_by(adapter, work)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTED, ids=lambda path: path.stem)
def test_adapters_call_only_what_runs_when_users_work_with_the_method(adapter: Path) -> None:
    if not (VECTORS / adapter.stem / "cases.json").exists():
        pytest.skip(f"no reference vectors at {VECTORS}; set LOWBIT_REFERENCE_VECTORS to their folder")
    called = called_for_all_cases(adapter)
    assert called, "an adapter that calls nothing of lowbit checks nothing"
    if adapter.stem in CALLED_BY_USERS:
        called = {name for name in called if not name.startswith(CALLED_BY_USERS[adapter.stem])}
    for method in METHODS.get(adapter.stem, (adapter.stem,)):
        called = not_reached_by_users(method, called)
    assert sorted(called) == []


ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
# fmt: off
FORMULA_CALLS = frozenset({
    "abs", "add", "amax", "amin", "ceil", "clamp", "clip", "div", "exp", "exp2", "floor", "log",
    "log2", "matmul", "maximum", "mean", "minimum", "mul", "norm", "pow", "relu", "rsqrt", "round", "sigmoid",
    "sign", "softmax", "sqrt", "square", "std", "sub", "tanh", "var", "where",
})
# fmt: on


def formulas(source: str) -> list[str]:
    """Lines of an adapter that compute something themselves: arithmetic, or calls of mathematical functions on tensors."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ARITHMETIC)) or (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.rstrip("_") in FORMULA_CALLS
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("adapter", ADAPTED, ids=lambda path: path.stem)
def test_adapters_hold_no_formula(adapter: Path) -> None:
    assert formulas(adapter.read_text()) == []


def test_a_formula_in_an_adapter_would_be_found() -> None:
    assert formulas("def f(params, inputs):\n    return {'y': method(inputs['x'], **params)}\n") == []
    assert formulas("y = inputs['x'] * 2\n") == ["line 1: inputs['x'] * 2"]
    assert formulas("y = torch.round(x)\n") == ["line 1: torch.round(x)"]
    assert formulas("x.clamp_(0, 1)\n") == ["line 1: x.clamp_(0, 1)"]
