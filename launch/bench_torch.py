"""The same steps in PyTorch, for `launch.bench_train` and `bench_backbones`; needs torch and timm, nothing of ours.

Started as a process of its own, so that the two frameworks' thread pools do not meet. It answers one JSON line to each
line on stdin: first {"ready": parameters, "version": text} or {"error": text}; then, for a number of training steps, or
of forward passes in evaluation (`10 forward`), {"seconds": their time}.
"""

import argparse
import json
import sys
import time
import warnings


def timed(options):
    """((name, count) -> seconds of so many calls on a fixed batch, number of parameters)."""
    import timm
    import torch

    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as JAX's default precision
    torch.backends.cudnn.benchmark = True
    sized = {"img_size": options.size} if options.sized else {}
    model = timm.create_model(options.model, num_classes=options.classes, **sized)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    images = torch.rand(options.batch, 3, options.size, options.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, options.classes, (options.batch,), device=device)
    dtype = getattr(torch, options.dtype)
    run = torch.compile(model) if options.compile else model

    narrow = lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def step():
        with narrow():
            loss = torch.nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward():
        with torch.inference_mode(), narrow():
            run(images)

    def window(name, count):
        """Seconds of `count` calls of "train" or "forward"."""
        model.train(name == "train")
        call = {"train": step, "forward": forward}[name]
        begin = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    return window, sum(p.numel() for p in model.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    for name in ("batch", "size", "classes"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sized", action="store_true", help="the model takes its image size as an argument")
    options = parser.parse_args()
    answer = sys.stdout
    sys.stdout = sys.stderr  # the libraries' chatter must not mix with the answers
    try:
        window, parameters = timed(options)
        window("train", 3)
        import timm
        import torch
    except Exception as error:  # whatever the reason, the comparison is left out and the reason is told
        text = str(error).strip().splitlines() or [""]
        print(json.dumps({"error": f"{type(error).__name__}: {text[0]}"[:300]}), file=answer, flush=True)
        return 1
    version = f"torch {torch.__version__}, timm {timm.__version__}"
    print(json.dumps({"ready": parameters, "version": version}), file=answer, flush=True)
    for line in sys.stdin:
        count, *name = line.split()
        print(json.dumps({"seconds": window(name[0] if name else "train", int(count))}), file=answer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
