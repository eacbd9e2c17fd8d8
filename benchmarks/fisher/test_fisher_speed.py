"""The ways of bench_fisher_diagonal under pytest-benchmark (extra [bench]); no part of `make test`.

    python -m pytest benchmarks/fisher/test_fisher_speed.py --benchmark-group-by=param:key [-k "a and fastfip"]

Every way is compared with the definition first; one that is wrong, or fails, is skipped with what it says.
"""

import pytest

from benchmarks.fisher.bench_fisher_diagonal import checked, is_good
from benchmarks.fisher.fisher_ways import MAKE, ways, workload

pytest.importorskip("pytest_benchmark", reason="no pytest-benchmark (pip install fastfip[bench])")


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("key", MAKE)
def test_speed(benchmark, key, way):
    w, call = workload(key), ways()[way]
    if way != "plain":
        error, left_out = checked(w, call)
        if not is_good(way, error):
            pytest.skip(error)
        benchmark.extra_info.update(error=error, left_out=left_out)
    benchmark.pedantic(call, (w,), rounds=3, warmup_rounds=1)
