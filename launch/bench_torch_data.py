"""Images through PyTorch's DataLoader and timm's transforms, for `launch.bench_data` to compare with; nothing of ours.

Started as a process of its own. It answers one JSON line to each line on stdin: first {"version": text} or
{"error": text}; then, for a line `workers seconds`, {"rate": images a second}.
"""

import argparse
import io
import itertools
import json
import os
import sys
import time
import zipfile


class Images:
    """The images at `path` (a folder or a zip) as timm's transform leaves them, picked by number round and round."""

    def __init__(self, path, transform):
        self.path, self.transform, self.zips = path, transform, {}
        if os.path.isdir(path):
            names = [os.path.join(place, name) for place, _, files in os.walk(path) for name in files]
        else:
            with zipfile.ZipFile(path) as file:
                names = file.namelist()
        self.names = sorted(name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png")))

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        from PIL import Image

        name = self.names[index % len(self.names)]
        if os.path.isdir(self.path):
            file = open(name, "rb")
        else:
            if os.getpid() not in self.zips:  # a forked worker must not share its parent's place in the file
                self.zips = {os.getpid(): zipfile.ZipFile(self.path)}
            file = io.BytesIO(self.zips[os.getpid()].read(name))
        with file:
            return self.transform(Image.open(file).convert("RGB")), index


def transform(options):
    """timm's transform of a recipe, up to uint8 pixels, as its prefetching loader has it."""
    from timm.data import create_transform

    same = {"input_size": (3, options.size, options.size), "use_prefetcher": True}
    if options.recipe == "eval":
        return create_transform(**same, is_training=False, interpolation="bicubic", crop_pct=0.95)
    auto = "rand-m7-mstd0.5" if options.recipe == "a2" else None
    return create_transform(**same, is_training=True, interpolation="random", color_jitter=None, auto_augment=auto)


def rate(images, batch, workers, seconds):
    """Images a second, counted once the buffers are drained; a CPU second of this process where it works alone."""
    from torch.utils.data import DataLoader

    clock = time.perf_counter if workers else time.process_time
    batches = iter(DataLoader(images, batch_size=batch, num_workers=workers))
    for _ in range(2 * workers + 1):
        next(batches)
    begin = clock()
    for count in itertools.count(1):
        next(batches)
        spent = clock() - begin
        if spent > seconds:
            return count * batch / spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--recipe", required=True)
    for name in ("size", "batch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    answer = sys.stdout
    sys.stdout = sys.stderr  # the libraries' chatter must not mix with the answers
    try:
        import timm
        import torch

        torch.set_num_threads(1)
        images = Images(options.path, transform(options))
        images[0]
    except Exception as error:  # whatever the reason, the comparison is left out and the reason is told
        text = str(error).strip().splitlines() or [""]
        print(json.dumps({"error": f"{type(error).__name__}: {text[0]}"[:300]}), file=answer, flush=True)
        return 1
    version = f"torch {torch.__version__}, timm {timm.__version__}"
    print(json.dumps({"version": version}), file=answer, flush=True)
    pins = hasattr(os, "sched_setaffinity")
    everywhere = os.sched_getaffinity(0) if pins else set()
    for line in sys.stdin:
        workers, seconds = line.split()
        if pins:
            os.sched_setaffinity(0, everywhere if int(workers) else {min(everywhere)})
        speed = rate(images, options.batch, int(workers), float(seconds))
        print(json.dumps({"rate": speed}), file=answer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
