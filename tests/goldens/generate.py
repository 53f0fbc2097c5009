"""Writes the golden files in this folder: what PyTorch (timm, torchvision) computes for
EfficientNetV2 models whose weights and inputs come from a closed formula, so that no weights need
to be shipped. Needs: pip install torch timm torchvision numpy.

    python generate.py OUT_DIR CASE...          (no CASE: every case of CASES)

The formula (all integers modulo 2**64):
    fnv1a64(name)  the 64-bit FNV-1a hash of the UTF-8 bytes of `name`
    splitmix64(z)  z += 0x9E3779B97F4A7C15; z = (z ^ z>>30) * 0xBF58476D1CE4E5B9;
                   z = (z ^ z>>27) * 0x94D049BB133111EB; return z ^ z>>31
    u(name, i)     (splitmix64(fnv1a64(name) + i) >> 40) / 2**23 - 1       in [-1, 1), exact in f32
Values, i being the flat index in PyTorch's own (row-major) layout of the tensor called `name`:
    weight of a convolution or linear layer    u * sqrt(6 / fan_in)   fan_in = elements / out_channels
    weight of a BatchNorm                      1 + 0.2 u
    any bias                                   0.1 u
    running_mean                               0.1 u
    running_var                                1 + 0.3 u
    the input image batch, name "input"        2 u                    layout N,C,H,W
    the labels                                 (7 * n + 3) mod classes
The loss is the mean cross entropy without label smoothing; dropout and stochastic depth are off.

A golden file is JSON:
    model, source, batch, image_size, classes, parameters (count of trainable values)
    eval.logits       N x classes, BatchNorm on its running statistics
    calibrated.logits the same after one batch has set the running statistics (momentum 1). With the closed-form
                      statistics nothing normalises the activations, and 40 blocks amplify rounding a billionfold:
                      PyTorch in float64 repeats its own eval.logits of the S models to 3e-7 only, in float32 to 5e-2.
                      Calibrated networks are well conditioned.
    train.logits, train.loss                   BatchNorm on batch statistics
    train.grads[name]   {norm: L2 norm, dot: sum_i grad_i * u("probe/" + name, i), head: first values}
    train.input_grad    the same for the gradient of the loss with respect to the input
    train.buffers[name] the same summary of running_mean and running_var after that one step
    train.reduced[dtype]   the same step by PyTorch in bf16 and f16 (autocast, channels last, float32 weights), the yardstick
                      for anybody else's: its loss, and cosines[name] of its gradients with those in float64,
                      of the tensors whose gradient's norm is at least 1e-3 of the largest
All else computed in float64, so a float32 run should agree to about 1e-4 relative to the norms.
"""
import json, math, sys
from pathlib import Path
import numpy as np
import torch

MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def fnv1a64(name):
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def u(name, count):
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a64(name)) + np.arange(count, dtype=np.uint64)
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0


def fill(name, tensor, is_norm):
    values = u(name, tensor.numel()).reshape(tuple(tensor.shape))
    if name.endswith("running_mean"):
        values = 0.1 * values
    elif name.endswith("running_var"):
        values = 1.0 + 0.3 * values
    elif name.endswith("bias"):
        values = 0.1 * values
    elif is_norm:
        values = 1.0 + 0.2 * values
    else:
        values = values * math.sqrt(6.0 / (tensor.numel() / tensor.shape[0]))
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.asarray(values)))


def summary(name, tensor, head=2):
    flat = tensor.detach().double().reshape(-1)
    probe = torch.from_numpy(u("probe/" + name, flat.numel()))
    return {"norm": flat.norm().item(), "dot": (flat * probe).sum().item(), "head": flat[:head].tolist()}


def nano():
    """A four-stage toy with every block kind, small enough for exhaustive checks."""
    from timm.models.efficientnet import EfficientNet
    from timm.models._efficientnet_builder import decode_arch_def
    from functools import partial
    arch = [["cn_r1_k3_s1_e1_c8_skip"], ["er_r2_k3_s2_e4_c16"],
            ["ir_r2_k3_s2_e4_c24_se0.25"], ["ir_r1_k5_s1_e6_c32_se0.25"]]
    return EfficientNet(decode_arch_def(arch), num_features=64, stem_size=8, num_classes=10, pad_type="same",
                        norm_layer=partial(torch.nn.BatchNorm2d, eps=1e-3, momentum=0.1), act_layer=torch.nn.SiLU,
                        round_chs_fn=lambda c, *a, **k: c)


def timm_model(name):
    import timm
    return lambda: timm.create_model(name, pretrained=False, drop_rate=0.0, drop_path_rate=0.0)


def torchvision_model(name):
    import torchvision
    return lambda: getattr(torchvision.models, name)(weights=None, dropout=0.0, stochastic_depth_prob=0.0)


# case: (source, build, image size, batch)
CASES = {
    "nano_24": ("timm.EfficientNet, stages er/ir as in nano()", nano, 24, 3),
    "nano_odd_37": ("timm.EfficientNet, stages er/ir as in nano()", nano, 37, 2),
    "tf_b0_64": ("timm tf_efficientnetv2_b0", timm_model("tf_efficientnetv2_b0"), 64, 2),
    "tf_s_96": ("timm tf_efficientnetv2_s", timm_model("tf_efficientnetv2_s"), 96, 2),
    "torchvision_s_64": ("torchvision efficientnet_v2_s", torchvision_model("efficientnet_v2_s"), 64, 2),
}


def calibrated(build, model, x):
    """Logits in evaluation mode of a copy of `model` whose running statistics are those of the batch `x`."""
    copy = build().double()
    copy.load_state_dict(model.state_dict())
    for module in copy.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        copy.train()(x)
        return copy.eval()(x)


def closed_form(build):
    """The model in float64, its weights and running statistics filled by the formula."""
    model = build().double()
    norms = {name for name, m in model.named_modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            fill(name, tensor, name.rpartition(".")[0] in norms)
    return model


def reduced(build, x, labels, exact, dtype):
    """The training step in `dtype`, measured against the gradients `exact`."""
    model = closed_form(build).float().to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", dtype=dtype):
        logits = model(x.detach().float().to(memory_format=torch.channels_last))
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    largest = max(gradient.norm() for gradient in exact.values())
    cosines = {}
    for name, p in model.named_parameters():
        a, b = p.grad.double().flatten(), exact[name].flatten()
        if b.norm() >= 1e-3 * largest:
            cosines[name] = round((torch.dot(a, b) / (a.norm() * b.norm())).item(), 6)
    return {"loss": loss.item(), "cosines": cosines}


def golden(source, build, size, batch):
    torch.manual_seed(0)
    model = closed_form(build)
    x = torch.from_numpy(2.0 * u("input", batch * 3 * size * size).reshape(batch, 3, size, size))
    model.eval()
    with torch.no_grad():
        eval_logits = model(x)
    calibrated_logits = calibrated(build, model, x)
    classes = eval_logits.shape[1]
    labels = torch.tensor([(7 * n + 3) % classes for n in range(batch)])
    model.train()
    x.requires_grad_(True)
    logits = model(x)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    exact = {name: p.grad for name, p in model.named_parameters()}
    return {
        "source": source, "batch": batch, "image_size": size, "classes": classes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bn_eps": next(m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)),
        "bn_momentum": next(m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)),
        "eval": {"logits": eval_logits.tolist()},
        "calibrated": {"logits": calibrated_logits.tolist()},
        "train": {
            "logits": logits.tolist(), "loss": loss.item(),
            "grads": {n: summary(n, g) for n, g in exact.items()},
            "input_grad": summary("input", x.grad),
            "buffers": {n: summary(n, b) for n, b in model.named_buffers() if b.dtype == torch.float64},
            "reduced": {name: reduced(build, x, labels, exact, dtype)
                        for name, dtype in [("bf16", torch.bfloat16), ("f16", torch.float16)]},
        },
    }


def main():
    out = Path(sys.argv[1])
    for case in sys.argv[2:] or CASES:
        record = {"model": case, **golden(*CASES[case])}
        (out / f"{case}.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
        print(case, record["parameters"], f"loss {record['train']['loss']:.6f}")


if __name__ == "__main__":
    main()
