"""python3 -m unittest discover benches: what compare.py and the peers compute without measuring."""
import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "peers"))
import compare
import pytorch


def step(mode, median, peak=None, **more):
    result = {"kind": "step", "model": "s", "pass": "training", "size": 300, "batch": 256, "dtype": "bf16",
              "mode": mode, "time": {"median": median}, **more}
    return {**result, "peak_bytes": peak} if peak else result


def report(*results):
    return {"results": list(results)}


class Compare(unittest.TestCase):
    def test_the_fastest_mode_counts_over_all_turns(self):
        ours = [report(step("graph", 10.0, 100)), report(step("graph", 14.0, 120))]
        theirs = [report(step("eager", 30.0), step("compile", 20.0, 480)), report(step("eager", 11.0),
                                                                                 step("compile", 16.0, 400))]
        (row,) = compare.compare(ours, theirs)
        self.assertEqual((row["ours_ms"], row["pytorch_ms"], row["pytorch_mode"]), (12.0, 18.0, "compile"))
        self.assertEqual((row["ratio"], row["memory_ratio"]), (1.5, 0.25))

    def test_failures_and_what_only_one_side_has_make_no_row(self):
        failed = {**step("compile", 1.0), "error": "out of memory"}
        self.assertEqual(compare.compare([report(step("plain", 10.0))], [report(failed)]), [])
        other = step("eager", 10.0)
        other["dtype"] = "f16"
        self.assertEqual(compare.compare([report(step("plain", 10.0))], [report(other)]), [])

    def test_operations_are_compared_whatever_they_load(self):
        def op(layer, median, **more):
            return {"kind": "op", "model": "s", "size": 300, "operation": "conv", "layer": layer,
                    "input": [8, 10, 10, 64], "dtype": "f16", "time": {"median": median}, **more}
        ours = [report(op("pointwise 1×1 64→16, gated", 3.0), op("pointwise 1×1 64→16, silu", 2.0))]
        (row,) = compare.compare(ours, [report(op("pointwise 1×1 64→16", 4.0, mode="eager"))])
        self.assertEqual(row["ratio"], 2.0)

    def test_the_table_is_aligned(self):
        rows = compare.compare([report(step("plain", 10.0, 5))], [report(step("eager", 25.0, 10))])
        lines = compare.table(rows).splitlines()
        self.assertEqual(len({len(line) for line in lines}), 1)
        self.assertIn("| s 300 px, batch 256, bf16: training |", lines[2])
        self.assertIn("| eager            |  2.50 |   0.50 |", lines[2])


class Peers(unittest.TestCase):
    def test_shapes_are_those_of_the_rust_side(self):
        places = pytorch.places("s", 300)
        self.assertEqual(sum(place["count"] for place in places), 40)
        first, last = places[0], places[-1]
        self.assertEqual((first["inputs"], first["outputs"], first["side"], first["count"]), (24, 24, 150, 2))
        self.assertEqual((last["inputs"], last["outputs"], last["side"], last["count"]), (256, 256, 10, 14))

    def test_every_convolution_of_s_is_listed_once(self):
        layers = pytorch.layers("s", 300)
        self.assertEqual(len(layers), len(set(layers)))
        self.assertEqual(layers[0], (3, 24, 3, 2, 1, 300))
        self.assertEqual(layers[-1], (256, 1280, 1, 1, 1, 10))
        self.assertIn((960, 960, 3, 2, 960, 19), layers)


if __name__ == "__main__":
    unittest.main()
