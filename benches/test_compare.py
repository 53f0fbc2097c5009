"""python3 -m unittest discover benches: what compare.py and the peers compute without measuring."""
import json
import os
import sys
import tempfile
import time
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


    def test_what_takes_too_long_is_ended_with_all_it_has_started(self):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            # As pytorch.py: a process that runs its cases in others, and ends with them when it is asked to.
            path = os.path.join(folder, "pid")
            inner = f"import os, time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(60)"
            outer = ("import signal, subprocess, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
                     f"subprocess.run([sys.executable, '-c', {inner!r}])")
            self.assertFalse(compare.run([sys.executable, "-c", outer], 3))
            with open(path) as file:
                pid = int(file.read())
        self.assertLess(time.monotonic() - start, 20)
        with self.assertRaises(ProcessLookupError):
            os.kill(pid, 0)
        self.assertTrue(compare.run([sys.executable, "-c", ""], 60))
        self.assertFalse(compare.run([sys.executable, "-c", "raise SystemExit(1)"], 60))
        self.assertFalse(compare.run(["/nonexistent"], 60))

    def test_the_table_so_far_is_written(self):
        head = {"tool": {"name": "x"}, "machine": {"device": "cpu"}}
        ours, theirs = {**report(step("plain", 10.0)), **head}, {**report(step("eager", 25.0)), **head}
        with tempfile.TemporaryDirectory() as folder:
            self.assertEqual(compare.write(folder, [ours], []), [])
            (row,) = compare.write(folder, [ours], [theirs])
            with open(os.path.join(folder, "compare.json"), encoding="utf-8") as file:
                written = json.load(file)
            self.assertEqual((written["rows"], written["machines"]), ([row], [head["machine"]] * 2))
            self.assertTrue(os.path.getsize(os.path.join(folder, "compare.md")) > 100)


class Peers(unittest.TestCase):
    def test_shapes_are_those_of_the_rust_side(self):
        places = pytorch.places("s", 300)
        self.assertEqual(sum(place["count"] for place in places), 40)
        first, last = places[0], places[-1]
        self.assertEqual((first["inputs"], first["outputs"], first["side"], first["count"]), (24, 24, 150, 2))
        self.assertEqual((last["inputs"], last["outputs"], last["side"], last["count"]), (256, 256, 10, 14))

    def test_the_fastest_modes_are_among_those_that_a_gpu_is_asked_for(self):
        class Args:
            what, pass_, modes, device = "step", "both", None, "cuda"
        cases = pytorch.cases(Args)
        for mode in ("graph", "compile-graph", "max-autotune"):
            self.assertIn((mode, "training"), cases)
        self.assertIn(("max-autotune", "inference"), cases)
        Args.device = "cpu"
        self.assertNotIn(("graph", "training"), pytorch.cases(Args))

    def test_a_case_that_fails_or_takes_too_long_says_so(self):
        class Args:
            what, model, size, batch, dtype = "step", "s", 32, 1, "f32"
            given = ["step", "--model", "no such model", "--device", "cpu"]
        (failed,) = pytorch.one_case(Args, "eager", "training", 60)
        self.assertTrue(failed["error"] and "time" not in failed)
        (late,) = pytorch.one_case(Args, "eager", "inference", 0.001)
        self.assertEqual((late["error"], late["pass"]), ("not done after 0 s", "inference"))

    def test_every_convolution_of_s_is_listed_once(self):
        layers = pytorch.layers("s", 300)
        self.assertEqual(len(layers), len(set(layers)))
        self.assertEqual(layers[0], (3, 24, 3, 2, 1, 300))
        self.assertEqual(layers[-1], (256, 1280, 1, 1, 1, 10))
        self.assertIn((960, 960, 3, 2, 960, 19), layers)


if __name__ == "__main__":
    unittest.main()
