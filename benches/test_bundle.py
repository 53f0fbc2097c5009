"""python3 -m unittest discover benches: the script of the bundle, around programs that only pretend."""
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = """#!/bin/sh
case $1 in
devices) [ -z "$FAKE_GPU" ] || echo 'GPU 0: "a \\\\ GPU"' ;;
bench)
    case $2 in
    step)
        case $FAKE_STEP$* in
        old*overlap*) echo 'error: --overlap = on: too old' >&2 && exit 2 ;;
        bad*overlap* | bench*) echo 'error: step cannot' >&2 && exit 1 ;;
        *overlap*) echo 'training   300  18.75   0.4 %' ;;
        *) echo 'training   300  20.5   0.4 %' && echo 'inference   300  5.1   0.4 %' ;;
        esac ;;
    blocks) echo $$ >"$FAKE_PID" && exec sleep 60 ;;
    esac ;;
esac
"""
WELL = "#!/bin/sh\n[ $EFFNETV2_TEST_DEVICE = cuda ] || exit 9\necho 'not run: this'\necho 'test result: ok. 3 passed; 0 failed'\n"
BADLY = "#!/bin/sh\necho 'test result: FAILED. 1 passed; 1 failed'\nexit 101\n"
LONG = "#!/bin/sh\necho begun\nexec sleep 60\n"


def runs(pid):
    """Whether there is such a process, and not only what nobody has collected of it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@unittest.skipUnless(shutil.which("xz") and shutil.which("timeout"), "the script needs xz and timeout")
class Bundle(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        path = lambda *names: os.path.join(self.folder, *names)
        shutil.copy(os.path.join(HERE, "bundle", "run.sh"), self.folder)
        os.makedirs(path("peers"))
        shutil.copy(os.path.join(HERE, "peers", "libraries.sh"), path("peers"))
        with open(path("VERSION"), "w") as file:
            file.write("abc\n")
        programs = {"bin/effnetv2": PROGRAM, "test/a_kernels": WELL, "test/b": BADLY, "test/c_kernels": LONG}
        with tarfile.open(path("programs.tar.xz"), "w:xz") as archive:
            for name, text in programs.items():
                os.makedirs(os.path.dirname(path("source", name)), exist_ok=True)
                with open(path("source", name), "w") as file:
                    file.write(text)
                os.chmod(path("source", name), 0o755)
                archive.add(path("source", name), name)

    def run_script(self, *args, gpu="1", step=""):
        """Exit code, the parts of the summary by their names, and the summary."""
        environment = {**os.environ, "FAKE_GPU": gpu, "FAKE_STEP": step, "FAKE_PID": os.path.join(self.folder, "pid")}
        command = [os.path.join(self.folder, "run.sh"), "--out", os.path.join(self.folder, "results"),
                   "--python", "/nonexistent", *args]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        with open(os.path.join(self.folder, "results", "summary.json"), encoding="utf-8") as file:
            summary = json.load(file)
        for part in summary["parts"]:
            self.assertIn(f"{part['part']} ", done.stdout)
        return done.returncode, {part["part"]: part for part in summary["parts"]}, summary

    def test_what_fails_or_takes_too_long_loses_nothing_else(self):
        code, parts, summary = self.run_script("--only", "devices,tests,step,fusion,peers", "--seconds", "24")
        self.assertEqual((code, summary["gpu"], summary["commit"]), (1, 'GPU 0: "a \\ GPU"', "abc"))
        self.assertEqual([part["state"] for part in parts.values()], ["passed", "failed", "failed", "passed", "not run"])
        self.assertEqual(parts["tests"]["note"], "1 of 3 programs well, 4 tests passed, 1 not run; failed: b; "
                                                 "not finished: c_kernels")
        self.assertEqual(parts["step"]["note"], "error: step cannot")
        self.assertEqual(parts["peers"]["note"], "no /nonexistent")

    def test_a_step_is_measured_with_kernels_that_overlap_where_that_can_be(self):
        for step, state, note in (
                ("new", "passed", "on the GPU: a training step takes 20.5 ms, with --overlap on 18.75 ms: step.json, overlap/step.json"),
                ("old", "passed", "on the GPU: a training step takes 20.5 ms, --overlap on cannot be: step.json"),
                ("bad", "failed", "on the GPU: step.json, step.svg")):
            with self.subTest(step):
                _, parts, _ = self.run_script("--only", "step", step=step)
                self.assertEqual((parts["step"]["state"], parts["step"]["note"]), (state, note))

    def test_a_part_that_takes_too_long_is_ended(self):
        start = time.monotonic()
        code, parts, _ = self.run_script("--only", "blocks,ops", "--seconds", "7")
        self.assertEqual((code, parts["blocks"]["state"], parts["ops"]["state"]), (1, "out of time", "not run"))
        self.assertTrue(parts["blocks"]["note"].startswith("stopped after "))
        self.assertLess(time.monotonic() - start, 25)
        with open(os.path.join(self.folder, "pid")) as file:
            self.assertFalse(runs(int(file.read())))

    def test_programs_that_do_not_finish_are_told_apart_from_those_that_fail(self):
        os.remove(os.path.join(self.folder, "programs.tar.xz"))
        with tarfile.open(os.path.join(self.folder, "programs.tar.xz"), "w:xz") as archive:
            for name in ("bin/effnetv2", "test/a_kernels", "test/c_kernels"):
                archive.add(os.path.join(self.folder, "source", name), name)
        code, parts, _ = self.run_script("--only", "tests", "--seconds", "12")
        self.assertEqual((code, parts["tests"]["state"]), (1, "out of time"))
        self.assertEqual(parts["tests"]["note"], "1 of 2 programs well, 3 tests passed, 1 not run; "
                                                 "not finished: c_kernels")

    def test_without_a_gpu_only_what_the_cpu_can_do_is_run(self):
        code, parts, summary = self.run_script("--only", "tests,sanitizer,libraries,tune,criterion,ops", gpu="")
        self.assertEqual((code, summary["gpu"], parts["ops"]["state"]), (0, None, "passed"))
        for name in ("tests", "sanitizer", "libraries", "tune", "criterion"):
            self.assertEqual((parts[name]["state"], parts[name]["note"]), ("not run", "no GPU"))


if __name__ == "__main__":
    unittest.main()
