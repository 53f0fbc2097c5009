import unittest

from second_level import Layer, from_memory


class SecondLevel(unittest.TestCase):
    """Capacities for which the figure follows from the definition."""

    def test_all_or_nothing(self):
        for gated in (False, True):
            layer = Layer(4, 256, 128, 128, gated=gated)
            for order in (layer.one_after_the_other, layer.in_windows):
                (everything, nothing), _ = from_memory(layer, order(64), 1.0, capacities=(1e9, 0))
                self.assertAlmostEqual(everything, 1.0)
                # g and y for each gradient; x for both tiles of 64 outputs and, through a gate, for its own gradient.
                asked = 2 * 2 * 128 + (3 if gated else 2) * 128
                self.assertAlmostEqual(nothing, asked / (2 * 128 + 128))

    def test_windows_are_closer(self):
        layer, capacity = Layer(64, 19 * 19, 160, 960), 30e6
        for slower in (0.8, 1.0, 1.25):
            (before,), _ = from_memory(layer, layer.one_after_the_other(), slower, capacities=(capacity,))
            (windows,), _ = from_memory(layer, layer.in_windows(), slower, capacities=(capacity,))
            self.assertGreater(before, 1.85)
            self.assertLess(windows, 1.5)


if __name__ == "__main__":
    unittest.main()
