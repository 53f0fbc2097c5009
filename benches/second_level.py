#!/usr/bin/env python3
"""How often the operands of a 1×1 convolution's backward come from memory: a model of the second level of cache.

    python benches/second_level.py                  # V2-S at 300 px, batch 256, and some of V2-M; f16 or bf16
    python benches/second_level.py "160→960 @19"    # one of them

Nothing here is measured. Both gradients have blocks of their own in one launch (kernels/pointwise.cu), which read g, y and
x of the same pixels; the model says how much of the second reading the order of blocks leaves to the second level. It supposes
that blocks start in the order of their numbers, two on each of 132 multiprocessors; that a step takes as long as its
instructions (counted: record/versions.md), and each block up to 5 % more or less; and that the second level keeps what was used last, of 25 or 40 MB. 1.00 is g, y and x once each. `time` is that of the
launch if memory were no limit, over the other order's.
"""
import heapq
import random
import sys
from collections import OrderedDict
from dataclasses import dataclass

SLOTS = 2 * 132
# Of 50 MB, whose halves may both hold a line.
CAPACITIES = (25e6, 40e6)
# What is kept or not: 32 pixels by 64 channels, of g and y 8 KB together.
ROWS, CHANNELS = 32, 64
PAIR, SINGLE = 2 * ROWS * CHANNELS * 2, ROWS * CHANNELS * 2
# Outputs of a tile of the gradient of the weights.
TILE_OUTPUTS = 64
# As in src/kernels/pointwise.rs.
RUN_STEPS, TOGETHER, LEAST_WINDOWS, MOST_RUNS, LEAST_STEPS = 16, 132, 3, 512, 8


def ceil_div(a, b):
    return -(-a // b)


@dataclass
class Layer:
    """Of `images` images of `pixels` pixels."""
    images: int
    pixels: int
    inputs: int
    outputs: int
    gated: bool = False

    @property
    def in_pairs(self):
        """Whether tiles of 256 inputs are no more products than those of 128."""
        return ceil_div(self.inputs, 128) == 2 * ceil_div(self.inputs, 256)

    @property
    def tile_pixels(self):
        """Pixels of a tile of the gradient of the input."""
        return 64 if self.gated or self.in_pairs else 128

    @property
    def columns(self):
        """Inputs of a tile of the gradient of the input."""
        if self.gated:
            return 128
        return 256 if self.in_pairs else 128 if self.inputs > 64 else 64

    @property
    def tile_inputs(self):
        """Inputs of a tile of the gradient of the weights."""
        return 256 if self.in_pairs else 128

    @property
    def blocks(self):
        """What the gradient of the weights aims at."""
        return LEAST_WINDOWS * TOGETHER if self.in_pairs else 4 * TOGETHER

    @property
    def pace(self):
        """Instructions of the weights' gradient over those of the other, for as many products."""
        return 0.9 if self.in_pairs and not self.gated else 1.3

    @property
    def rows(self):
        return self.images * self.pixels

    @property
    def groups(self):
        return ceil_div(self.inputs, self.columns)

    @property
    def weight_tiles(self):
        return ceil_div(self.outputs, TILE_OUTPUTS) * ceil_div(self.inputs, self.tile_inputs)

    @property
    def operands(self):
        """Bytes of g, y and x."""
        return 2 * self.rows * (2 * self.outputs + self.inputs)

    def splits(self, blocks):
        """Of the pixels, for the gradient of the weights in about so many blocks; and steps of each."""
        steps = ceil_div(self.rows, ROWS)
        each = max(LEAST_STEPS, ceil_div(steps, max(1, blocks // self.weight_tiles)))
        return ceil_div(steps, each), each

    def tiles(self, run, units):
        """First pixel and number of each tile of a run of the input's gradient: an image, or tiles one after the other."""
        if self.gated:
            first = run * self.pixels
            each = self.tile_pixels
            return [(first + i, min(each, self.pixels - i)) for i in range(0, self.pixels, each)]
        return [(i * self.tile_pixels, self.tile_pixels) for i in units]

    def input_block(self, tiles, group):
        """The steps of a block of the input's gradient: role, duration, and what it touches, (key, bytes, is read)."""
        share = self.columns * self.tile_pixels / (128 * 128)
        duration = 4.0 * share * (1.15 if self.columns == 64 else 1.0)
        columns = range(group * self.columns // CHANNELS, (group + 1) * self.columns // CHANNELS)
        columns = [c for c in columns if c * CHANNELS < self.inputs]
        for first, count in tiles:
            rows = range(first // ROWS, ceil_div(first + count, ROWS))
            for k in range(ceil_div(self.outputs, CHANNELS)):
                yield "input", duration, [(("pair", r, k), PAIR, True) for r in rows]
            places = [(r, c) for c in columns for r in rows]
            # x where SiLU's slope is asked of it, the skip's gradient elsewhere, which is none of the operands.
            touched = [(("x", *place), SINGLE, True) if self.gated else (("skip", *place), SINGLE, False) for place in places]
            yield "input", share, touched + [(("dx", *place), SINGLE, False) for place in places]

    def weight_block(self, tile, steps):
        across = ceil_div(self.inputs, self.tile_inputs)
        down, right = divmod(tile, across)
        wide = self.tile_inputs // CHANNELS
        columns = [c for c in range(wide * right, wide * (right + 1)) if c * CHANNELS < self.inputs]
        for s in steps:
            inside = s * ROWS < self.rows
            touched = [(("pair", s, down), PAIR, True)] + [(("x", s, c), SINGLE, True) for c in columns]
            yield "weights", self.pace * self.tile_inputs / 128, touched if inside else []

    def one_after_the_other(self, blocks=None):
        """The order of two passes."""
        splits, steps = self.splits(blocks or self.blocks)
        for split in range(splits):
            for tile in range(self.weight_tiles):
                yield self.weight_block(tile, range(split * steps, (split + 1) * steps))
        units = self.images if self.gated else ceil_div(self.rows, self.tile_pixels)
        each = 1 if self.gated else ceil_div(units, min(MOST_RUNS, 2048 // self.groups))
        for run in range(ceil_div(units, each)):
            own = self.tiles(run, range(run * each, min(units, (run + 1) * each)))
            for group in range(self.groups):
                yield self.input_block(own, group)

    def in_windows(self, blocks=None):
        """The order of windows."""
        splits, _ = self.splits(blocks or self.blocks)
        together = ceil_div(2 * TOGETHER - self.weight_tiles, 2 * self.weight_tiles)
        together = min(max(1, together), max(1, splits // LEAST_WINDOWS))
        units = self.images if self.gated else ceil_div(self.rows, self.tile_pixels)
        each = 1 if self.gated else ceil_div(RUN_STEPS, ceil_div(self.outputs, 32))
        runs = ceil_div(units, each)
        of_window = ceil_div(runs, splits // together)
        pixels = self.pixels if self.gated else self.tile_pixels * each
        steps = ceil_div(of_window * pixels, together * ROWS)
        for first_run in range(0, runs, of_window):
            first = first_run // of_window * steps * together
            for split in range(together):
                for tile in range(self.weight_tiles):
                    yield self.weight_block(tile, range(first + split, first + steps * together, together))
            for run in range(first_run, min(runs, first_run + of_window)):
                own = self.tiles(run, range(run * each, min(units, (run + 1) * each)))
                for group in range(self.groups):
                    yield self.input_block(own, group)


def from_memory(layer, order, slower, capacities=CAPACITIES, slots=SLOTS):
    """Bytes of operands read from memory, over those of g, y and x, for each capacity; and when the last block ends. The
    steps of the weights' gradient take `slower` times what is supposed."""
    chance = random.Random(1)
    held, used, missed = [OrderedDict() for _ in capacities], [0] * len(capacities), [0] * len(capacities)
    blocks, running, number, end = iter(order), [], 0, 0.0

    def start(time):
        nonlocal number
        block = next(blocks, None)
        if block is not None:
            number += 1
            heapq.heappush(running, (time, number, block, chance.uniform(0.95, 1.05)))

    for _ in range(slots):
        start(0.0)
    while running:
        time, own, block, pace = heapq.heappop(running)
        step = next(block, None)
        if step is None:
            start(time)
            continue
        role, duration, touched = step
        for key, size, is_read in touched:
            for i, lines in enumerate(held):
                if key in lines:
                    lines.move_to_end(key)
                    continue
                lines[key] = size
                used[i] += size
                missed[i] += size if is_read else 0
                while used[i] > capacities[i]:
                    used[i] -= lines.popitem(last=False)[1]
        duration *= pace * (slower if role == "weights" else 1.0)
        end = max(end, time + duration)
        heapq.heappush(running, (time + duration, own, block, pace))
    return [read / layer.operands for read in missed], end


LAYERS = {
    "160→960 @19": Layer(256, 19 * 19, 160, 960),
    "128→768 @19": Layer(256, 19 * 19, 128, 768),
    "128→512 @19": Layer(256, 19 * 19, 128, 512),
    "64→256 @38": Layer(256, 38 * 38, 64, 256),
    "256→1536 @10": Layer(256, 10 * 10, 256, 1536),
    "512→128 @19, gated": Layer(256, 19 * 19, 512, 128, gated=True),
    "960→160 @19, gated": Layer(256, 19 * 19, 960, 160, gated=True),
    "1536→256 @10, gated": Layer(256, 10 * 10, 1536, 256, gated=True),
    "304→1824 @12, M": Layer(128, 12 * 12, 304, 1824),
    "512→3072 @12, M": Layer(128, 12 * 12, 512, 3072),
}
PACES = (0.8, 1.0, 1.25)


def main():
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        return
    unknown = [name for name in sys.argv[1:] if name not in LAYERS]
    if unknown:
        sys.exit(f"{unknown[0]}: not one of {', '.join(LAYERS)}")
    print("steps of the weights' gradient at " + ", ".join(f"{pace}" for pace in PACES) + " of what is supposed")
    for name in sys.argv[1:] or LAYERS:
        layer, ends = LAYERS[name], {}
        for way, order in [("two passes", layer.one_after_the_other), ("windows", layer.in_windows)]:
            found = [from_memory(layer, order(), slower) for slower in PACES]
            ends[way] = [end for _, end in found]
            cells = "   ".join(" ".join(f"{value:.2f}" for value in values) for values, _ in found)
            print(f"{name:20} {way:10}   {cells}", flush=True)
        times = " ".join(f"{new / old:.2f}" for new, old in zip(ends["windows"], ends["two passes"]))
        print(f"{name:20} {'time':10}   {times}", flush=True)


if __name__ == "__main__":
    main()
