"""The largest published model on a CPU: created, saved, loaded, run; time and peak memory of each.

    python benchmarks/xl.py            # hnet_2stage_XL, random bf16 weights, 1024 bytes of input

Each step runs in a process of its own, so that its peak is its own. Linux and 24 GB of RAM.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from h_net_dynamic_chunking import HNetConfig, HNetLM

STEPS = ("create and save", "load", "load and run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="hnet_2stage_XL", help="name of a preset")
    parser.add_argument("--bytes", type=int, default=1024, help="length of the input in bytes")
    parser.add_argument("--step", choices=STEPS, help="only this step, in --folder")
    parser.add_argument("--folder", type=Path, help="where the model is saved")
    arguments = parser.parse_args()
    if arguments.step:
        one_step(arguments.step, arguments.model, arguments.folder, arguments.bytes)
        return
    with tempfile.TemporaryDirectory() as folder:
        for step in STEPS:
            flags = ["--step", step, "--folder", folder]
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *flags], check=True)


def one_step(step: str, preset: str, folder: Path, length: int) -> None:
    start = time.perf_counter()
    if step == "create and save":
        model = HNetLM(HNetConfig.preset(preset)).bfloat16()
        model.save_pretrained(folder)
    else:
        model = HNetLM.from_pretrained(folder)
        # Touched, because the file is memory mapped and only now read.
        checksum = sum(float(p.detach().flatten()[::512].float().sum()) for p in model.parameters())
        assert checksum == checksum
    if step == "load and run":
        with torch.no_grad():
            logits = model(torch.randint(256, (1, length))).logits
        assert logits.isfinite().all()
    seconds = time.perf_counter() - start
    size = sum(p.nbytes for p in model.parameters()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{preset}, {size:.2f} GB: {step}: {seconds:.1f} s, peak {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
