"""Check GPU kernels compiled without a GPU: no spills, and memory accesses as wide as the alignment allows."""

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
