"""The GPU kernels compiled for GPUs that are not there: no spills, and accesses as wide as rows are aligned."""

from compiled_kernels import check_compiled


def test_core_cases():
    widths = {(each["dtype"], each["vocabulary"]): each["width"] for each in check_compiled("core")}
    assert widths == {
        ("bfloat16", 32768): 128,
        ("bfloat16", 248): 128,
        ("bfloat16", 249): 16,
        ("float32", 248): 128,
        ("float32", 249): 32,
    }
