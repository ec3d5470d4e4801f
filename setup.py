from pathlib import Path

from setuptools import find_packages, setup

init = Path(__file__).with_name("encourage_mt") / "__init__.py"
version = next(
    line.split('"')[1] for line in init.read_text(encoding="utf-8").splitlines() if line.startswith("__version__")
)

setup(
    name="encourage-mt",
    version=version,
    description="The encouraging loss for training translation models: a fairseq plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["encourage_mt", "encourage_mt.*"]),
    package_data={"encourage_mt.report": ["*.j2"]},
    install_requires=[
        "fairseq==0.12.2; python_version < '3.11'",
        "fairseq-fixed==0.12.3.1; python_version >= '3.11'",
        "torch>=2.1",
        "jinja2",
        "matplotlib",
        "numpy",
        "pooch>=1.7",
        "pyyaml>=5.1",
        "regex",
        "requests>=2.28",
        "sacrebleu>=2.3",
        "sacremoses>=0.1",
        "scipy",
        "sentencepiece>=0.2",
        "subword-nmt>=0.3.8",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "ruff", "selenium", "triton; platform_system == 'Linux' and platform_machine == 'x86_64'"],
        "bench": ["liger-kernel"],
        "comet": ["unbabel-comet"],
    },
    entry_points={"console_scripts": ["encourage-mt = encourage_mt.cli:main"]},
)
