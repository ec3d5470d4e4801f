"""Build and install the package, with the compiled loss where torch and a C++ compiler are available."""

import platform
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (ROOT / "encourage_mt/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX512"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
    "default": [],
}


def native_loss():
    """Return the arguments of `setup` that compile encourage_mt/loss/native.cpp, once for each instruction set.

    Empty where torch cannot be imported (a build in isolation) and outside Linux. The extensions are optional: without
    a working compiler the installation succeeds, and the loss runs in plain PyTorch.
    """
    if sys.platform != "linux":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    extensions = [
        CppExtension(
            f"encourage_mt.loss._native_{name}",
            ["encourage_mt/loss/native.cpp"],
            depends=["encourage_mt/loss/native_vectors.h"],
            # -fopenmp only here: torch has its own copy of the library, and a second one would start more threads
            extra_compile_args=["-O3", "-fopenmp", "-g0", "-Wno-psabi", *FLAGS[name]],
            optional=True,
        )
        for name in (["avx512", "avx2"] if platform.machine() == "x86_64" else ["default"])
    ]
    # without ninja, because with it a failed compilation would also fail the installation
    build_ext = BuildExtension.with_options(use_ninja=False, no_python_abi_suffix=True)
    return {"ext_modules": extensions, "cmdclass": {"build_ext": build_ext}}


setup(
    name="encourage-mt",
    version=version,
    description="The encouraging loss for PyTorch and fairseq, with recipes from raw text to tested results",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="encourage-mt contributors",
    license="MIT",
    keywords=["loss function", "label smoothing", "machine translation", "fairseq", "pytorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["encourage_mt", "encourage_mt.*"]),
    package_data={"encourage_mt": ["py.typed", "**/*.j2", "**/*.cpp", "**/*.h"]},
    **native_loss(),
    install_requires=["torch>=2.8"],
    extras_require={
        # the plugin: a fairseq that builds on this Python. Leave this extra out if you have a fairseq of your own
        "fairseq": [
            "fairseq==0.12.2; python_version < '3.11'",
            "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
        ],
        # the command encourage-mt: data, training, scores, reports; training also needs a fairseq
        "recipes": [
            "jinja2",
            "matplotlib",
            "numpy",
            "pydantic>=2.11",
            "pyyaml>=5.1",
            "regex",
            "requests>=2.28",
            "sacrebleu>=2.3",
            "sacremoses>=0.1",
            "scipy",
            "sentencepiece>=0.2",
            "subword-nmt>=0.3.8",
            "tabulate",
            "tqdm",
            "typing_extensions",
            "urllib3",
        ],
        # export and fast translation; needs the extra recipes too
        "serving": ["ctranslate2>=4.5,<5"],
        "transformers": ["transformers>=5.0", "accelerate>=1.1"],
        # examples/graphs
        "classification": ["torch_geometric>=2.5"],
        "bench": ["liger-kernel"],
        "comet": ["unbabel-comet"],
        "test": [
            "coverage>=7.10",
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "selenium",
            "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["encourage-mt = encourage_mt.cli:main"]},
)
