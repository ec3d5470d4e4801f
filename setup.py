from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (ROOT / "encourage_mt/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

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
    install_requires=["torch>=2.1"],
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
        "transformers": ["transformers>=5.0", "accelerate>=1.1"],
        "bench": ["liger-kernel"],
        "comet": ["unbabel-comet"],
        "test": [
            "coverage>=7.10",
            "hypothesis",
            "mypy",
            "pytest",
            "ruff",
            "selenium",
            "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["encourage-mt = encourage_mt.cli:main"]},
)
