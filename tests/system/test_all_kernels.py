"""Compile the GPU kernels for three architectures, three types, every bonus and every alignment of rows."""

from compiled_kernels import check_compiled


def test_every_architecture_type_bonus_and_alignment():
    compiled = check_compiled("all")
    assert {each["architecture"] for each in compiled} == {80, 90, 100}
    assert {each["width"] for each in compiled if each["dtype"] == "bfloat16"} == {16, 32, 64, 128}
    assert {each["width"] for each in compiled if each["dtype"] == "float32"} == {32, 64, 128}
