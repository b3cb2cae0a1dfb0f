"""Peak memory of loading a backbone, read from the operating system.

    python benchmarks/loading.py [--size t5_1_1_large] [--folder DIR]

Makes a random checkpoint of that size in every format and type, loads each in a process of its own
as float32 and as bfloat16, and prints a line for each: bytes of the loaded parameters, peak
resident memory over what the process held before, and seconds. Linux; needs 4 GB of disk for the
large size.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile

import ml_dtypes
import numpy as np

from softprompt import backbone, convert, t5_config, tree
from softprompt.formats import Stored

MEASURE = """
import re, sys, time
import jax
from softprompt import backbone
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
jax.block_until_ready(jax.numpy.ones(3))
before, began = peak(), time.monotonic()
loaded = backbone.load(sys.argv[1], sys.argv[2])
size = sum(x.nbytes for x in loaded.params.values())
print(size, peak() - before, peak(), time.monotonic() - began)
"""


def stored(size: str, dtype: type) -> Stored:
    """A random backbone whose tensors are drawn as they are read."""
    cfg = t5_config.config(size)
    shapes = {k: x.shape for k, x in tree.flatten(backbone.abstract(cfg)["params"]).items()}
    rng = np.random.default_rng(0)

    def read(path: str) -> np.ndarray:
        return rng.standard_normal(shapes[path], np.float32).astype(dtype)

    return Stored(size, size, cfg, shapes, read, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="t5_1_1_large", choices=list(t5_config.SIZES))
    parser.add_argument("--folder", help="where the checkpoints go for a while")
    args = parser.parse_args()
    print("| stored | loaded as | parameters, GB | peak over start, GB | allowed, GB | seconds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for kind, save in convert.BACKBONES.items():
        for source in (np.float32, ml_dtypes.bfloat16):
            folder = pathlib.Path(tempfile.mkdtemp(dir=args.folder))
            try:
                save(folder, stored(args.size, source))
                for dtype in ("float32", "bfloat16"):
                    run = subprocess.run(
                        [sys.executable, "-c", MEASURE, str(folder), dtype],
                        check=True, stdout=subprocess.PIPE, text=True,
                    )  # fmt: skip
                    size, over, peak, seconds = map(float, run.stdout.split())
                    print(
                        f"| {kind}, {np.dtype(source).name} | {dtype} | {size / 1e9:.2f} | "
                        f"{over / 1e9:.2f} (in all {peak / 1e9:.2f}) | {1.2 * size / 1e9 + 1:.2f} "
                        f"| {seconds:.0f} |",
                        flush=True,
                    )
            finally:
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()
