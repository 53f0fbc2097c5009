"""The training step of `benches/training_step.rs` in PyTorch on the CPU: timm models, same sizes, same threads.

    pip install torch timm
    python benches/peers/training_step.py [--threads 2] [--json FILE]

Forward, cross entropy, backward, SGD with momentum; dropout and stochastic depth 0.2; f32, in both memory formats.
Prints the median of the rounds and the peak resident memory of the process, each case in a process of its own.
"""
import argparse, json, resource, statistics, subprocess, sys, time

CASES = [("tf_efficientnetv2_b0", 96, 16), ("tf_efficientnetv2_s", 128, 8)]
FORMATS = ["contiguous", "channels_last"]


def run(model, side, batch, layout, threads, rounds):
    import timm, torch
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    net = timm.create_model(model, pretrained=False, drop_rate=0.2, drop_path_rate=0.2)
    net = net.to(memory_format=memory_format).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    x = torch.randn(batch, 3, side, side).to(memory_format=memory_format)
    labels = torch.arange(batch) * 7
    times = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
        if i >= 2:
            times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"model": model, "side": side, "batch": batch, "format": layout, "torch": torch.__version__,
            "threads": threads, "ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times),
            "peak_mib": peak / 1024, "peak_above_import_mib": (peak - base) / 1024}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        model, side, batch, layout = args.case.split(",")
        print(json.dumps(run(model, int(side), int(batch), layout, args.threads, args.rounds)))
        return
    rows = []
    for model, side, batch in CASES:
        for layout in FORMATS:
            command = [sys.executable, __file__, "--threads", str(args.threads), "--rounds", str(args.rounds),
                       "--case", f"{model},{side},{batch},{layout}"]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(row)
            print(f"{model:22} {side:4} px  batch {batch:3}  {layout:13} {row['ms']:8.1f} ms"
                  f"  (min {row['ms_min']:.1f})  peak {row['peak_mib']:.0f} MiB,"
                  f" {row['peak_above_import_mib']:.0f} MiB above imports", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
