"""Packaging of the SeCo toolkit. The wheel's top level is exactly seco, pipelines, shards, cli."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "seco/__init__.py").read_text()).group(1)

setup(
    name="seco-video",
    version=VERSION,
    description="SeCo: learn visual representations from unlabelled video (AAAI 2021)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # Named, not found: the layout puts four names on the top level and nothing else may join them.
    packages=[*find_packages(include=["seco", "seco.*"]), "pipelines", "shards"],
    py_modules=["cli"],
    package_data={
        "seco": ["py.typed", "templates/*.j2"],
        "pipelines": ["py.typed"],
        "shards": ["py.typed"],
    },
    install_requires=[
        "braceexpand",
        "click>=8.1",
        "ffmpeg-python>=0.2",
        "fsspec",
        "imageio-ffmpeg>=0.5",
        "jinja2>=3.1",
        "matplotlib>=3.7",
        "msgspec>=0.19",
        "numpy>=1.26",
        "rich>=13",
        "safetensors>=0.4",
        "simplejpeg>=1.7",
        "tenacity>=8.2",
        "tensorboard",
        "tomli; python_version < '3.11'",
        "tomli-w>=1.0",
        "torch>=2.9",
        "torchvision>=0.24",
        "webdataset>=0.2.86",
    ],
    extras_require={
        # Two packages own the import name faiss and two own PIL: install exactly one of each.
        "cpu": ["faiss-cpu>=1.8", "pillow>=10", "scikit-learn"],
        "gpu": ["faiss-gpu>=1.8", "pillow>=10", "scikit-learn"],
        "simd": ["pillow-simd>=9"],
        "ray": ["ray>=2.9"],
        "s3": ["s3fs"],
        "parquet": ["pyarrow"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow-skinny>=2"],
        "hub": ["huggingface_hub>=1"],
        "onnx": ["onnx>=1.16", "onnxscript>=0.5"],
        "timm": ["timm>=1.0.16"],
        "docs": ["mkdocs-material>=9.5"],
        "dev": [
            "av",
            "got10k",
            "huggingface_hub>=1",
            "hypothesis",
            "ipykernel",
            "mkdocs-material>=9.5",
            "mlflow-skinny>=2",
            "moto[server]",
            "mypy",
            "nbclient",
            "onnx>=1.16",
            "onnxruntime",
            "onnxscript>=0.5",
            "pyarrow",
            "pytest",
            "pytest-cov",
            "pytest-timeout",
            "pytest-xdist",
            "ray>=2.9",
            "ruff",
            "s3fs",
            "scikit-learn",
            "six",  # which got10k needs and does not name
            "timm>=1.0.16",
            "transformers>=4.49",
            "wandb",
        ],
    },
    entry_points={"console_scripts": ["seco=seco.__main__:main"]},
)
