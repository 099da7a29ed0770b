"""Sharded, replicated and reloaded runs on 2 and 4 processes (gloo) equal the run in one process, after every step.

A spawn runs many cases (importing torch takes longer than most of them); each is a test of its own here.
"""

from __future__ import annotations

import distributed_file_cases
import distributed_plan_cases
import pytest
import ranks
import torch
from refusals_distributed import job

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

MODULES = (
    "distributed_cases", "distributed_lora_cases", "distributed_file_cases", "distributed_training_cases",
    "distributed_tensor_parallel_cases", "distributed_plan_cases", "distributed_movement_cases",
)  # fmt: skip
LOADING = ("distributed_loading_cases",)
EIGHT = ("distributed_eight_cases",)
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What cases leave for others: checkpoints."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="session")
def four(folder):
    return ranks.run(4, MODULES, ranks.cases_of(MODULES), folder)


@pytest.fixture(scope="session")
def two(folder, four):
    """After four: it loads what those saved."""
    names = {**ranks.cases_of(LOADING), **ranks.cases_of(MODULES)}
    return ranks.run(2, (*LOADING, *MODULES), [name for name in names if not name.startswith("save ")], folder)


@pytest.fixture(scope="session")
def eight(folder):
    return ranks.run(8, EIGHT, ranks.cases_of(EIGHT), folder)


@pytest.mark.parametrize("case", ranks.cases_of(EIGHT))
def test_eight_ranks_load_their_rows(eight, case):
    assert not eight[case], eight[case]


@pytest.mark.parametrize("case", ranks.cases_of(MODULES))
def test_on_four_ranks(four, case):
    assert not four[case], four[case]


@pytest.mark.parametrize("case", [n for n in ranks.cases_of((*LOADING, *MODULES)) if not n.startswith("save ")])
def test_on_two_ranks(two, case):
    assert not two[case], two[case]


@pytest.mark.parametrize("variant", distributed_file_cases.VARIANTS)
def test_one_process_loads_what_four_saved(four, folder, variant):
    assert not four[f"save {variant}"]
    distributed_file_cases.load_checkpoint(variant, False, folder / "one")


@pytest.mark.parametrize("case", [name for name in distributed_plan_cases.CASES if "hsdp" not in name])
def test_plan_of_one_process(case, tmp_path):
    function, *arguments = distributed_plan_cases.CASES[case]
    with job(world=1, backend="gloo"):
        function(*arguments, tmp_path)
