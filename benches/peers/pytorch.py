#!/usr/bin/env python3
"""What PyTorch makes of the work that `effnetv2 bench` measures, in the same JSON.

    pip install torch timm
    python benches/peers/pytorch.py step   --model s --size 300 --batch 256 --dtype bf16 --json step.json
    python benches/peers/pytorch.py blocks --model s --size 300 --batch 128 --dtype f16 --json blocks.json
    python benches/peers/pytorch.py ops    --model s --size 300 --batch 256 --dtype bf16 --json ops.json

step    a training step (forward, cross entropy, backward, SGD with momentum) and an inference of a timm model
blocks  every distinct block shape, as Fused-MBConv and as MBConv, forward and backward
ops     the bare convolutions of the network, forward and backward, without batch norm and activation: cuDNN's on a GPU,
        and cuBLAS's matrix products for the pointwise ones

Modes, each in a process of its own, so that one that fails loses no other:
    eager-inplace  as timm has it: SiLU in place, for which autograd keeps a copy
    eager          SiLU out of place, which is faster, here and below
    graph          the same, captured in one CUDA graph
    compile        torch.compile
    compile-graph  torch.compile, captured in one CUDA graph
    max-autotune   torch.compile(mode="max-autotune-no-cudagraphs") with 1×1 convolutions as matrix products, captured
Graphs need a GPU. A compiled model must agree with the eager one before it is timed.

channels_last, autocast for f16 and bf16, tf32 as f32 whose products cuDNN and cuBLAS round, a fused optimizer, a constant
loss scale for f16, stochastic depth and dropout 0.2. Images lie on the device already; random data, never zeros. Figures are
medians of rounds after a warm-up.
"""
import argparse
import datetime
import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

SCHEMA = 1
TRAINING = ["eager-inplace", "eager", "graph", "compile", "compile-graph", "max-autotune"]
INFERENCE = ["eager", "graph", "compile", "max-autotune"]
LOSS_SCALE = 1024.0
# The symmetric padding of the models without `tf_` saves PyTorch a kernel in front of strided convolutions.
MODELS = {name: f"efficientnetv2_{name}" for name in ("s", "m", "l", "xl")}
MODELS.update({f"b{i}": f"tf_efficientnetv2_b{i}" for i in range(4)})
MODELS.update({f"v1-b{i}": f"efficientnet_b{i}" for i in range(8)})
# kind, expansion, channels, repeats, stride
STAGES = {
    "s": (24, [("fused", 1, 24, 2, 1), ("fused", 4, 48, 4, 2), ("fused", 4, 64, 4, 2), ("mbconv", 4, 128, 6, 2),
               ("mbconv", 6, 160, 9, 1), ("mbconv", 6, 256, 15, 2)]),
    "m": (24, [("fused", 1, 24, 3, 1), ("fused", 4, 48, 5, 2), ("fused", 4, 80, 5, 2), ("mbconv", 4, 160, 7, 2),
               ("mbconv", 6, 176, 14, 1), ("mbconv", 6, 304, 18, 2), ("mbconv", 6, 512, 5, 1)]),
    "l": (32, [("fused", 1, 32, 4, 1), ("fused", 4, 64, 7, 2), ("fused", 4, 96, 7, 2), ("mbconv", 4, 192, 10, 2),
               ("mbconv", 6, 224, 19, 1), ("mbconv", 6, 384, 25, 2), ("mbconv", 6, 640, 7, 1)]),
}


class Context:
    """Where and how: device, element type, memory format, effort."""

    def __init__(self, args):
        import torch
        self.torch, self.args = torch, args
        self.cuda = args.device == "cuda"
        self.device = torch.device(args.device)
        self.dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(args.dtype, torch.float32)
        # PyTorch by itself lets cuDNN round f32 to tf32, and cuBLAS not.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.dtype == "tf32"
        self.scale = LOSS_SCALE if args.dtype == "f16" else 1.0
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        if args.threads:
            torch.set_num_threads(args.threads)

    def autocast(self, cache=True):
        enabled = self.args.dtype in ("f16", "bf16")
        return self.torch.autocast(self.args.device, dtype=self.dtype, enabled=enabled, cache_enabled=cache)

    def random(self, *shape, grad=False):
        x = self.torch.randn(*shape, device=self.device).to(self.dtype)
        return x.contiguous(memory_format=self.torch.channels_last).requires_grad_(grad)

    def wait(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def seconds(self, work, calls):
        """Of one call, from `calls` in a row."""
        if self.cuda:
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                work()
            end.record()
            self.wait()
            return start.elapsed_time(end) / 1e3 / calls
        start = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - start) / calls

    def alternate(self, *works):
        """Seconds of each piece of work, round by round, the rounds alternating."""
        calls = []
        for work in works:
            spent, one = 0.0, 0.0
            while True:
                one = self.seconds(work, 1)
                spent += one
                if spent >= self.args.warm_up:
                    break
            calls.append(max(1, math.ceil(self.args.round_seconds / one)))
        rounds = [[] for _ in works]
        for _ in range(self.args.rounds):
            for i, work in enumerate(works):
                rounds[i].append(self.seconds(work, calls[i]))
        return rounds

    def captured(self, work):
        """`work` as one CUDA graph."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        self.wait()
        return graph.replay

    def sets(self, number_of_bytes):
        """How many inputs it takes that none is still in the L2 cache when its turn comes again."""
        if not self.cuda:
            return 1
        cache = getattr(self.torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 60 << 20
        return max(1, min(8, math.ceil(3 * cache / number_of_bytes)))


def milliseconds(seconds):
    values = [1e3 * s for s in seconds]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": len(values)}


def out_of_place(module):
    import torch
    for part in module.modules():
        if isinstance(part, torch.nn.SiLU):
            part.inplace = False


def compiled(torch, function, mode):
    if mode == "max-autotune":
        import torch._inductor.config as inductor
        inductor.conv_1x1_as_mm = True
        return torch.compile(function, mode="max-autotune-no-cudagraphs")
    return torch.compile(function) if mode.startswith("compile") else function


def multiply_adds(torch, model, image):
    """Of convolutions and linear layers, for one image."""
    total, hooks = [0], []

    def count(module, _, output):
        total[0] += module.weight[0].numel() * output[0].numel()

    for part in model.modules():
        if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear)):
            hooks.append(part.register_forward_hook(count))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(image)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return total[0]


def must_agree(torch, name, found, expected, bound):
    """Compiled against eager: relative error in the 2-norm."""
    found, expected = found.detach().float(), expected.detach().float()
    error = ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
    if not error < bound:
        raise RuntimeError(f"{name}: the compiled model differs from eager by {error:.2e}, allowed are {bound:.0e}")


# Rounding of the element type, carried through some hundred layers.
BOUNDS = {"f32": 1e-3, "tf32": 2e-2, "f16": 2e-2, "bf16": 1.5e-1}


def step(context):
    """One mode of one pass of a timm model."""
    import timm
    torch, args = context.torch, context.args
    training = args.pass_ == "training"
    rates = {"drop_rate": 0.2, "drop_path_rate": 0.2} if training else {}
    model = timm.create_model(MODELS.get(args.model, args.model), num_classes=args.classes, **rates)
    model = model.to(context.device).to(memory_format=torch.channels_last)
    if args.mode != "eager-inplace":
        out_of_place(model)
    parameters = sum(p.numel() for p in model.parameters())
    macs = multiply_adds(torch, model, torch.zeros(1, 3, args.size, args.size, device=context.device))
    images = [context.random(args.batch, 3, args.size, args.size) for _ in range(3)]
    labels = torch.randint(0, args.classes, (args.batch,), device=context.device)
    captures = args.mode in ("graph", "compile-graph", "max-autotune") and context.cuda
    x = images[0].clone()
    if training:
        work = training_step(context, model, x, labels, captures)
    else:
        work = inference(context, model, x)
    if captures:
        work = context.captured(work)
    turn = [0]

    def once():
        x.copy_(images[turn[0] % len(images)])
        turn[0] += 1
        work()

    once()
    context.wait()
    (rounds,) = context.alternate(once)
    time_ = milliseconds(rounds)
    result = {
        "kind": "step", "model": args.model, "pass": args.pass_, "size": args.size, "batch": args.batch,
        "dtype": args.dtype, "mode": args.mode, "time": time_,
        "images_per_second": args.batch / (time_["median"] / 1e3), "parameters": parameters, "macs": macs,
    }
    peak = peak_bytes(context)
    if peak:
        result["peak_bytes"] = peak
    return [result]


def training_step(context, model, x, labels, captures):
    torch, args = context.torch, context.args
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 1e-5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, fused=context.cuda)
    parameters = list(model.parameters())

    def loss_of(images, labels):
        with context.autocast(cache=not captures):
            return torch.nn.functional.cross_entropy(model(images).float(), labels)

    function = compiled(torch, loss_of, args.mode)
    if function is not loss_of:
        # Without dropout and stochastic depth, whose random numbers differ; batch statistics are the same.
        model.eval()
        must_agree(torch, "loss", function(x, labels), loss_of(x, labels), BOUNDS[args.dtype])
        model.zero_grad(set_to_none=True)
    model.train()

    def one():
        # Gradients are absent before each backward, so that it writes them instead of adding to zeros.
        optimizer.zero_grad(set_to_none=True)
        loss = function(x, labels)
        (loss * context.scale).backward()
        if context.scale != 1.0:
            torch._foreach_div_([p.grad for p in parameters], context.scale)
        optimizer.step()

    return one


def inference(context, model, x):
    torch, args = context.torch, context.args
    model.eval().to(context.dtype)

    def logits():
        with torch.no_grad():
            return model(x)

    function = compiled(torch, logits, args.mode)
    if function is not logits:
        must_agree(torch, "logits", function(), logits(), BOUNDS[args.dtype])
    return function


def peak_bytes(context):
    if context.cuda:
        return context.torch.cuda.max_memory_reserved()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def places(model, size):
    """The distinct block shapes of a network, in forward order, as the Rust side lists them."""
    stem, stages = STAGES[model]
    side, inputs, found = (size + 1) // 2, stem, []
    for stage, (kind, expansion, channels, repeats, stride) in enumerate(stages, 1):
        for block in range(repeats):
            shape = {"inputs": inputs, "outputs": channels, "expansion": expansion, "kernel": 3,
                     "stride": stride if block == 0 else 1, "side": side}
            inputs, side = channels, -(-side // shape["stride"])
            same = [place for place in found if all(place[key] == value for key, value in shape.items())]
            if same:
                same[0]["count"] += 1
            else:
                found.append({"model": model, "stage": stage, "count": 1, "native": kind, **shape})
    return found


def build_block(context, place, form):
    from functools import partial
    import torch.nn as nn
    from timm.models._efficientnet_blocks import (
        ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual, SqueezeExcite)
    inputs, outputs, expansion = place["inputs"], place["outputs"], place["expansion"]
    options = {"stride": place["stride"], "act_layer": nn.SiLU, "norm_layer": partial(nn.BatchNorm2d, eps=1e-3)}
    squeeze = partial(SqueezeExcite, rd_ratio=0.25 / expansion)
    if form == "fused" and expansion == 1:
        block = ConvBnAct(inputs, outputs, 3, skip=True, **options)
    elif form == "fused":
        block = EdgeResidual(inputs, outputs, exp_kernel_size=3, exp_ratio=expansion, **options)
    elif expansion == 1:
        block = DepthwiseSeparableConv(inputs, outputs, 3, se_layer=squeeze, **options)
    else:
        block = InvertedResidual(inputs, outputs, 3, exp_ratio=expansion, se_layer=squeeze, **options)
    out_of_place(block)
    return block.to(context.device).to(memory_format=context.torch.channels_last).train()


def blocks(context):
    """Every block shape in both forms, in one mode."""
    torch, args = context.torch, context.args
    results = []
    for place in places(args.model, args.size):
        for form in ("fused", "mbconv"):
            torch._dynamo.reset()
            gc.collect()
            results.append(block(context, place, form))
    return results


def block(context, place, form):
    torch, args = context.torch, context.args
    module = build_block(context, place, form)
    parameters = list(module.parameters())
    shape = (args.batch, place["inputs"], place["side"], place["side"])
    count = context.sets(math.prod(shape) * context.dtype.itemsize)
    inputs = [context.random(*shape, grad=True) for _ in range(count)]
    with context.autocast(cache=False):
        outputs = module(inputs[0])
    gradients = [torch.randn_like(outputs) for _ in range(count)]
    function = compiled(torch, module, args.mode)
    if function is not module:
        with context.autocast(cache=False):
            must_agree(torch, "block", function(inputs[0]), outputs, BOUNDS[args.dtype])
    macs = multiply_adds(torch, module, inputs[0][:1].detach().float())
    del outputs

    def forward():
        for x in inputs:
            with context.autocast(cache=False):
                function(x)

    def both():
        for x, gradient in zip(inputs, gradients):
            with context.autocast(cache=False):
                y = function(x)
            torch.autograd.grad(y, [x] + parameters, gradient)

    both()
    works = [forward, both]
    if args.mode in ("graph", "compile-graph", "max-autotune") and context.cuda:
        works = [context.captured(work) for work in works]
    ones, alls = context.alternate(*works)
    ones, alls = [s / count for s in ones], [s / count for s in alls]
    more = [max(both - one, 0.0) for one, both in zip(ones, alls)]
    first, second = milliseconds(ones), milliseconds(more)
    seconds = (first["median"] + second["median"]) / 1e3
    return {"kind": "block", **place, "form": form, "batch": args.batch, "dtype": args.dtype, "mode": args.mode,
            "forward": first, "backward": second, "images_per_second": args.batch / seconds, "macs": macs,
            "operations_per_second": 6.0 * macs * args.batch / seconds}


def layers(model, size):
    """The distinct convolutions of a network: (words of the Rust side, input channels, outputs, kernel, stride, groups, side)."""
    stem, _ = STAGES[model]
    found = [(3, stem, 3, 2, 1, size)]
    last = (stem, (size + 1) // 2)
    for place in places(model, size):
        inputs, outputs, side = place["inputs"], place["outputs"], place["side"]
        middle, stride, out = inputs * place["expansion"], place["stride"], -(-place["side"] // place["stride"])
        if place["native"] == "fused" and place["expansion"] == 1:
            found.append((inputs, outputs, 3, stride, 1, side))
        elif place["native"] == "fused":
            found += [(inputs, middle, 3, stride, 1, side), (middle, outputs, 1, 1, 1, out)]
        else:
            found += [(inputs, middle, 1, 1, 1, side), (middle, middle, 3, stride, middle, side),
                      (middle, outputs, 1, 1, 1, out)]
        last = (outputs, out)
    found.append((last[0], 1280, 1, 1, 1, last[1]))
    return list(dict.fromkeys(found))


def ops(context):
    """The bare convolutions, and pointwise ones as matrix products too (mode `matmul`). A backward is that of input and
    weights; of weights alone in the first layer."""
    torch, args = context.torch, context.args
    results = []
    for inputs, outputs, kernel, stride, groups, side in layers(args.model, args.size):
        shape = (args.batch, inputs, side, side)
        count = context.sets(math.prod(shape) * context.dtype.itemsize)
        xs = [context.random(*shape) for _ in range(count)]
        weight = context.random(outputs, inputs // groups, kernel, kernel)
        wanted = [inputs != 3, True, False]
        forward, backward = convolution(torch, weight, stride, groups, wanted)
        ys = [torch.randn_like(forward(x)) for x in xs]
        works = {"cudnn" if context.cuda else "eager": (forward, backward)}
        if kernel == 1:
            works["matmul"] = matrix_product(weight)
        kind = "depthwise" if groups > 1 else "pointwise" if kernel == 1 else "dense"
        words = f"{kind} {kernel}×{kernel} {inputs}→{outputs}" + (f" /{stride}" if stride > 1 else "")
        operations = 2 * weight.numel() * math.prod(ys[0].shape[2:]) * args.batch
        names = ["conv", "conv_backward" if inputs != 3 else "conv_backward_weights"]
        for mode, (forward, backward) in works.items():
            times = context.alternate(*in_turn(count, forward, backward, xs, ys))
            for name, passes, rounds in zip(names, [1, sum(wanted)], times):
                time_ = milliseconds(rounds)
                results.append({
                    "kind": "op", "model": args.model, "size": args.size, "operation": name, "layer": words,
                    "input": [args.batch, side, side, inputs], "dtype": args.dtype, "mode": mode, "time": time_,
                    "operations_per_second": passes * operations / (time_["median"] / 1e3)})
    return results


def in_turn(count, forward, backward, xs, ys):
    """The two on the next input at each call."""
    turn = [0]

    def next_():
        turn[0] += 1
        return turn[0] % count

    return lambda: forward(xs[next_()]), lambda: (lambda i: backward(ys[i], xs[i]))(next_())


def convolution(torch, weight, stride, groups, wanted):
    pad = weight.shape[2] // 2
    backward_of = torch.ops.aten.convolution_backward.default

    def forward(x):
        return torch.nn.functional.conv2d(x, weight, None, stride, pad, 1, groups)

    def backward(y, x):
        return backward_of(y, x, weight, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], groups, wanted)

    return forward, backward


def matrix_product(weight):
    """A pointwise convolution of a channels_last tensor: pixels × channels."""
    matrix = weight.flatten(1)

    def rows(x):
        return x.permute(0, 2, 3, 1).flatten(0, 2)

    def forward(x):
        return rows(x) @ matrix.t()

    def backward(y, x):
        return rows(y) @ matrix, rows(y).t() @ rows(x)

    return forward, backward


WORK = {"step": step, "blocks": blocks, "ops": ops}


def machine(args):
    import torch
    found = {"device": args.device, "name": platform.processor() or platform.machine(),
             "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    if args.device == "cpu":
        try:
            with open("/proc/cpuinfo") as lines:
                found["name"] = next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
        except (OSError, StopIteration):
            pass
        return found
    found["name"] = torch.cuda.get_device_name(0)
    found["driver"] = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        found["clocks"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    return found


def one_case(args, mode, pass_, seconds):
    """Runs a mode in a process of its own, for so many seconds at most; gives its results, or one that holds the error."""
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    command = [sys.executable, os.path.abspath(__file__), *args.given, "--mode", mode, "--pass", pass_,
               "--case", path]
    problem = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode == 0:
            with open(path) as file:
                return json.load(file)
        problem = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
    except subprocess.TimeoutExpired:
        problem = f"not done after {seconds:.0f} s"
    finally:
        os.unlink(path)
    failed = {"kind": args.what.rstrip("s"), "model": args.model, "size": args.size, "batch": args.batch,
              "dtype": args.dtype, "mode": mode, "error": problem}
    if args.what == "step":
        failed["pass"] = pass_
    return [failed]


def cases(args):
    needs_gpu = {"graph", "compile-graph", "max-autotune"}
    if args.what == "ops":
        return [("eager", "training")]
    found = []
    for pass_ in ["training", "inference"] if args.what == "step" and args.pass_ == "both" else [args.pass_]:
        known = INFERENCE if args.what == "step" and pass_ == "inference" else TRAINING
        if args.what == "blocks":
            known = [mode for mode in TRAINING if mode != "eager-inplace"]
        asked = args.modes.split(",") if args.modes else known
        found += [(mode, pass_) for mode in known
                  if mode in asked and (args.device == "cuda" or mode not in needs_gpu)]
    return found


def words(result):
    if "error" in result:
        return f"{result['mode']:14} failed: {result['error']}"
    if result["kind"] == "step":
        memory = f"  peak {result['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in result else ""
        time_ = result["time"]
        return (f"{result['pass']:10} {result['mode']:14} {time_['median']:9.2f} ms  ({time_['min']:.2f} to "
                f"{time_['max']:.2f})  {result['images_per_second']:9.1f} images/s{memory}")
    if result["kind"] == "block":
        shape = (f"{result['inputs']}→{result['outputs']} ×{result['expansion']} s{result['stride']} "
                 f"@{result['side']}")
        return (f"{shape:24} {result['form']:7} {result['mode']:14} forward {result['forward']['median']:8.3f} ms  "
                f"backward {result['backward']['median']:8.3f} ms")
    return (f"{result['operation']:22} {result['layer']:30} @{result['input'][1]:<4} "
            f"{result['mode']:8} {result['time']['median']:8.3f} ms")


def write(args, results):
    """The report so far."""
    import torch
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    tool = {"name": "pytorch", "version": torch.__version__, "commit": torch.version.git_version or "unknown"}
    report = {"schema": SCHEMA, "command": sys.argv, "tool": tool, "machine": machine(args), "date": now,
              "results": results}
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1, ensure_ascii=False)


def main():
    start = time.monotonic()
    # So that a mode under way ends with this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WORK))
    parser.add_argument("--model", default="s", help="s, m, l; for `step` also xl, b0 to b3, v1-b0 to v1-b7")
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", default="bf16", choices=["f32", "tf32", "f16", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--modes", help="comma-separated; default: all that the device can do")
    parser.add_argument("--pass", dest="pass_", default="both", choices=["both", "training", "inference"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=0.2)
    parser.add_argument("--warm-up", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--case-seconds", type=int, default=1800, help="limit of one mode")
    parser.add_argument("--total-seconds", type=float, default=math.inf, help="limit of all of them")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what != "step" and args.model not in STAGES:
        parser.error(f"--model {args.model}: `{args.what}` knows {', '.join(STAGES)}")
    try:
        import torch
    except ImportError:
        parser.exit(3, "PyTorch is not installed here: pip install torch timm\n")
    if args.what != "ops":
        try:
            import timm  # noqa: F401
        except ImportError:
            parser.exit(3, "timm is not installed here: pip install timm\n")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(3, "PyTorch sees no GPU here\n")
    if args.case:
        results = WORK[args.what](Context(args))
        with open(args.case, "w") as file:
            json.dump(results, file)
        return
    args.given = sys.argv[1:] + ["--device", args.device]
    results = []
    for mode, pass_ in cases(args):
        left = args.total_seconds - (time.monotonic() - start)
        for result in one_case(args, mode, pass_, max(1.0, min(args.case_seconds, left))):
            results.append(result)
            print(words(result), flush=True)
        # After each, so that whoever stops this has what was measured until then.
        if args.json:
            write(args, results)
    if not any("error" not in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
