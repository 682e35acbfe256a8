"""`bench matmul`'s expectations for TPUs: what is read of libtpu's schedules, and what is refused."""

import importlib.util

import pytest
from rich.console import Console

from launch import bench_matmul_aot
from launch.bench_matmul_aot import Expected, Schedule
from research.core.errors import UserError

SCHEDULE = """
     0   :  { %10 = vsyncpa [#allocation9], 0 }
   0x6 LB: > { %s1 = sst [smem:[#allocation16_spill]] %s2 }
   0x7   : > { %s3 = sadd.s32 1, %s4 }
   0x8 LB: >> { %s5 = sshll.u32 %s6, 1 }
   0x9   : >> { %p7 = scmp.ge.s32.totalorder %s8, 16 /* loop exit test */ }
   0xa PF: > { %v9 = vld [vmem:[%s10] sm:$0xff] }
   0xb LB: >> { %v11 = vadd.f32 %v12, %v13 }
   0xc   : > { %p14 = scmp.ge.s32.totalorder %s15, 10 /* loop exit test */ }
   0xd   :  { %16 = vsyncpa [#allocation9], 1 }
"""


def test_loops_of_a_schedule_are_counted():
    assert bench_matmul_aot.read(SCHEDULE) == Schedule(own=4, inside=(2, 1), turns=8)
    assert bench_matmul_aot.read("no schedule") is None


def test_a_report_compares_with_bfloat16():
    console = Console(record=True, width=140)
    dense = Expected("bfloat16", "v5e:2x2", 1, (4096, 4096), 9e4, 6e4, 6e4)
    bench_matmul_aot.report([dense, dense._replace(name="W4A16", instructions=1e4, memory=1.5e4, bound=1.5e4)], console)
    row = next(line for line in console.export_text().splitlines() if "W4A16" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")][-4:] == ["10.0", "15.0", "15.0", "4.00"]


@pytest.mark.parametrize("name", ["h100:8", "7x:2x2x1"])
def test_chips_whose_cycles_are_not_known_are_refused(name):
    with pytest.raises(UserError, match=f"--aot {name}: cycles are known of v4, v5e, v5p, v6e"):
        next(bench_matmul_aot.measure([name], [(512, 256)], [1], {"W4A16": (4, None)}, 128))


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_small_product_is_expected_to_take_cycles():
    dense, few = bench_matmul_aot.measure(["v5e:2x2"], [(4096, 1024)], [1], {"W4A16": (4, None)}, 128)
    assert dense.name == "bfloat16" and dense.instructions > 0
    assert dense.bound == dense.memory == pytest.approx(2 * (4096 * 1024 + 4096 + 1024) / 545.58, rel=1e-3)
    assert few.memory == pytest.approx((4096 * 1024 // 2 + 4 * 32 * 1024 + 2 * (4096 + 1024)) / 545.58, rel=1e-3)
    # 512 x 1024 words take 12 operations each, 1,024 at a time in four units.
    assert 512 * 12 / 4 < few.instructions < 4 * 512 * 12 / 4
