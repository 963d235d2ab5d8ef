"""The examples in the docstrings of `hf_usp.sharding` are run, and no public function is without one."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest

import hf_usp.sharding
from hf_usp.sharding import load_balance
from hf_usp.sharding.load_balance import ORDERS, fixed_assignment
from hf_usp.sharding.masks import Documents, Mask

MODULES = sorted(found.name for found in pkgutil.iter_modules(hf_usp.sharding.__path__))
every_module = pytest.mark.parametrize("name", MODULES)


@every_module
def test_examples_are_right(name: str) -> None:
    module = importlib.import_module(f"hf_usp.sharding.{name}")
    result = doctest.testmod(module)
    assert result.attempted >= 2 and result.failed == 0, result


@every_module
def test_public_functions_have_an_example(name: str) -> None:
    module = importlib.import_module(f"hf_usp.sharding.{name}")
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ">>> " in (ast.get_docstring(node) or ""), node.name


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrices_of_load_balance_are_right(order: str) -> None:
    """Each pair has the rank that holds its query; the counts below them are those of the schedule's mask."""
    shards = fixed_assignment(8, 2, order)
    owner = {int(position): rank for rank, shard in enumerate(shards) for position in shard}
    text = load_balance.__doc__ or ""
    rows = re.findall(r"^ +\d  ([01.][ 01.]{13}[01.]) +\d  ([01.][ 01.]{13}[01.])$", text, re.M)
    assert len(rows) == 8
    for query, drawn in enumerate(row[ORDERS.index(order)] for row in rows):
        assert drawn.split() == [str(owner[query]) if key <= query else "." for key in range(8)]
    counts = re.findall(r"pairs: rank 0 (\d+), rank 1 (\d+)", text)[ORDERS.index(order)]
    mask = Mask(Documents.from_bounds([0, 8]))
    assert [int(count) for count in counts] == [mask.area(np.asarray(shard)) for shard in shards]
