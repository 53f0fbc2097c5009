#!/usr/bin/env python3
"""Ours against PyTorch, in turns, and one table of ratios.

    cargo build --release && pip install torch timm
    python benches/compare.py --model s --size 300 --batch 256 --dtypes bf16,f16 --out runs/compare

Runs `effnetv2 bench WHAT` and `benches/peers/pytorch.py WHAT` one after the other, `--turns` times, so that a machine that
warms up or slows down does so for both. A ratio is PyTorch's time in its fastest mode over ours: above 1 we are faster.
In --out it leaves every report as it came, and the table as compare.json and compare.md.
"""
import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def key(result):
    """What is compared with what; none for what has no counterpart."""
    if result["kind"] == "step":
        return ("step", result["model"], result["dtype"], result["size"], result["batch"], result["pass"])
    if result["kind"] == "block":
        shape = tuple(result[k] for k in ("inputs", "outputs", "expansion", "kernel", "stride", "side"))
        return ("block", result["model"], result["dtype"], *shape, result["batch"], result["form"])
    # How the input is transformed on load is no part of a peer's operation.
    layer = result["layer"].split(",")[0]
    return ("op", result["model"], result["dtype"], result["operation"], layer, *result["input"])


def label(case):
    if case[0] == "step":
        _, model, dtype, size, batch, pass_ = case
        return f"{model} {size} px, batch {batch}, {dtype}: {pass_}"
    if case[0] == "block":
        _, model, dtype, inputs, outputs, expansion, kernel, stride, side, batch, form = case
        return f"{model} {inputs}→{outputs} ×{expansion} k{kernel} s{stride} @{side}, batch {batch}, {dtype}: {form}"
    _, model, dtype, operation, layer, batch, side, *_ = case
    return f"{model} {operation} {layer} @{side}, batch {batch}, {dtype}"


def milliseconds(result):
    if result["kind"] == "block":
        return result["forward"]["median"] + result["backward"]["median"]
    return result["time"]["median"]


def collect(reports):
    """case → mode → the times and peaks of all turns. Of several rows with one key, one layer under several loads,
    the fastest counts, for a peer's bare operation loads its input as it is."""
    found = {}
    for report in reports:
        turn = {}
        for result in report["results"]:
            if "error" in result or result["kind"] not in ("step", "block", "op"):
                continue
            at = (key(result), result.get("mode", "plain"))
            if at not in turn or milliseconds(result) < milliseconds(turn[at]):
                turn[at] = result
        for (case, mode), result in turn.items():
            entry = found.setdefault(case, {}).setdefault(mode, {"times": [], "peaks": []})
            entry["times"].append(milliseconds(result))
            if result.get("peak_bytes"):
                entry["peaks"].append(result["peak_bytes"])
    return found


def fastest(modes):
    """(milliseconds, mode, peak) of the mode whose median over the turns is least."""
    best = min(modes, key=lambda mode: statistics.median(modes[mode]["times"]))
    peaks = modes[best]["peaks"]
    return statistics.median(modes[best]["times"]), best, max(peaks) if peaks else None


def compare(ours, theirs):
    """A row for each case that both have measured."""
    ours, theirs, rows = collect(ours), collect(theirs), []
    for case in ours:
        if case not in theirs:
            continue
        (our_time, our_mode, our_peak), (time_, mode, peak) = fastest(ours[case]), fastest(theirs[case])
        row = {"case": label(case), "ours_ms": our_time, "ours_mode": our_mode, "pytorch_ms": time_,
               "pytorch_mode": mode, "ratio": time_ / our_time}
        if our_peak and peak:
            row["memory_ratio"] = our_peak / peak
        rows.append(row)
    return rows


def table(rows):
    """GitHub's Markdown, aligned."""
    head = ["case", "ours ms", "PyTorch ms", "its fastest mode", "ratio", "memory"]
    cells = [[row["case"], f"{row['ours_ms']:.3f}", f"{row['pytorch_ms']:.3f}", row["pytorch_mode"],
              f"{row['ratio']:.2f}", f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""]
             for row in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    left = {0, 3}
    line = lambda words: "| " + " | ".join(
        word.ljust(width) if i in left else word.rjust(width)
        for i, (word, width) in enumerate(zip(words, widths))) + " |"
    rule = "|" + "|".join("-" * (w + 2) if i in left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, cells)]) + "\n"


def run(command, seconds):
    """Whether it ended well within its time; what went wrong goes to standard error."""
    print("+", " ".join(command), flush=True)
    try:
        process = subprocess.Popen(command)
    except OSError as problem:
        print(f"not done: {problem}", file=sys.stderr, flush=True)
        return False
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        print(f"not done after {seconds:.0f} s", file=sys.stderr, flush=True)
        return False
    finally:
        # Asked first, so that it can end what it has started itself.
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return [json.load(file)]
    except (OSError, ValueError):
        return []


def default_program():
    name = "effnetv2.exe" if os.name == "nt" else "effnetv2"
    return os.path.join(HERE, "..", "target", "release", name)


def write(folder, ours, theirs):
    """The table so far, as JSON and Markdown; gives its rows."""
    rows = compare(ours, theirs)
    head = {"command": sys.argv}
    for name in ("tool", "machine"):
        head[name + "s"] = [report[name] for report in [*ours[:1], *theirs[:1]]]
    with open(os.path.join(folder, "compare.json"), "w", encoding="utf-8") as file:
        json.dump({**head, "rows": rows}, file, indent=1, ensure_ascii=False)
    with open(os.path.join(folder, "compare.md"), "w", encoding="utf-8") as file:
        file.write(table(rows))
    return rows


def main():
    # So that what is under way ends with this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="step", help="step, blocks, ops; comma-separated")
    parser.add_argument("--model", default="s")
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtypes", help="default: bf16,f16 on a GPU, f32 on the CPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--modes", help="of PyTorch, comma-separated; default: all")
    parser.add_argument("--program", default=default_program(), help="default: target/release/effnetv2")
    parser.add_argument("--python", default=sys.executable, help="a Python that has torch and timm")
    parser.add_argument("--seconds", type=int, default=3600, help="limit of one run of one side")
    parser.add_argument("--total", type=float, default=math.inf, help="limit of all in seconds; default: none")
    parser.add_argument("--out", default="runs/compare")
    args = parser.parse_args()
    if not os.path.exists(args.program):
        parser.exit(3, f"{args.program}: there is no such program; cargo build --release makes it\n")
    os.makedirs(args.out, exist_ok=True)
    dtypes = (args.dtypes or ("bf16,f16" if args.device == "cuda" else "f32")).split(",")
    ours, theirs, complete = [], [], True
    start = time.monotonic()
    for turn, what, dtype in [(turn, what, dtype) for turn in range(args.turns) for what in args.what.split(",")
                              for dtype in dtypes]:
        left = lambda: min(args.seconds, args.total - (time.monotonic() - start))
        if left() < 20:
            print(f"turn {turn + 1}, {what}, {dtype}: no time is left", file=sys.stderr)
            complete = False
            continue
        began = time.monotonic()
        stem = os.path.join(args.out, f"{what}-{dtype}-{turn + 1}")
        shared = ["--model" if what != "blocks" else "--models", args.model, "--size", str(args.size),
                  "--batch", str(args.batch), "--rounds", str(args.rounds), "--threads", str(args.threads),
                  "--device", args.device, "--dtype", dtype]
        complete &= run([args.program, "bench", what, *shared, "--out", stem], left())
        ours += read(os.path.join(stem, f"{what}.json"))
        shared[0] = "--model"
        modes = ["--modes", args.modes] if args.modes else []
        limit = [] if math.isinf(args.total) else ["--total-seconds", f"{max(1.0, left() - 8):.0f}"]
        path = f"{stem}-pytorch.json"
        complete &= run([args.python, os.path.join(HERE, "peers", "pytorch.py"), what, *shared, *modes, *limit,
                         "--json", path], left())
        theirs += read(path)
        print(f"turn {turn + 1}, {what}, {dtype}: {time.monotonic() - began:.0f} s\n", flush=True)
        # After each, so that whoever stops this has what was measured until then.
        write(args.out, ours, theirs)
    rows = write(args.out, ours, theirs)
    print(table(rows))
    if not rows:
        sys.exit("nothing was measured on both sides; see above")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
