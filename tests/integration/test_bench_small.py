"""Each benchmark runs at a small size, so that it cannot rot. Its figures mean nothing here; its rows must be rows."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
NEEDS = {"bench_attested": pytest.mark.spire, "bench_signing": pytest.mark.softhsm}
NAMES = sorted(path.stem for path in BENCH.glob("bench_*.py"))
SCOPE_KINDS = ("policy", "ticket", "approval", "session", "process_exit")
PROMISED = {
    "bench_attested": {"attested_token_rate_vs_spire_signed"},
    "bench_double": {"double_redemptions"},
    "bench_guard": {"guard_per_signature_check", "guard_per_two_signature_checks_dpop"},
    "bench_ledger": {"ledger_10m_rows_vs_empty"},
    "bench_policies": {"policies_10000_vs_10"},
    "bench_signing": {"keyless_signature_per_two_empty_rpcs", "hsm_signature_per_two_empty_rpcs"},
    "bench_scope": {
        *(f"refuse_ms_{kind}" for kind in SCOPE_KINDS),
        *(f"refuse_{kind}_p99_per_bare_fanout" for kind in SCOPE_KINDS),
        "mass_suspend_ms",
        "mass_decide_per_bare_decisions",
        "mass_request_p99_per_idle",
    },
    "bench_stages": {"stages_per_empty_rpc"},
}


def _load(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_promised_benchmark_is_there() -> None:
    assert set(NAMES) == PROMISED.keys()


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS.get(name, ())) for name in NAMES])
def test_a_benchmark_runs_and_says_what_it_promises(name: str) -> None:
    rows = _load(name).measure("small")
    assert PROMISED[name] <= {row["name"] for row in rows}
    for row in rows:
        assert row.keys() == {"name", "value", "unit", "bound", "holds"}
        assert row["value"] > 0
        assert isinstance(row["holds"], bool)
        assert (row["bound"] is not None) == (row["name"] in PROMISED[name])
