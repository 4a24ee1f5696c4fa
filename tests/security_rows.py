"""Read a source with hostile rows in a process that may be lost: prints what data.load() makes of
them and what each row took.

    python tests/security_rows.py MODEL SOURCE    # -> {"bad", "keep", "megabytes", "seconds"}"""
import json
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [f"{Path(__file__).parent.parent}"]
import data  # noqa: E402

SECONDS = 20  # no row may keep the others waiting longer


def status(name):
    """A number of kB that Linux knows of this process, in MB."""
    line = next(x for x in Path("/proc/self/status").read_text().split("\n") if name in x)
    return int(line.split()[1]) / 1e3


def late(*_):
    raise TimeoutError(f"no end after {SECONDS} s")


def main(model, source):
    megabytes, seconds, read_row = [], [], data.read_row

    def measured(*args):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, start = status("VmHWM"), time.process_time()
        signal.alarm(SECONDS)
        try:
            return read_row(*args)
        finally:
            signal.alarm(0)
            megabytes.append(round(status("VmHWM") - before))
            seconds.append(round(time.process_time() - start, 2))

    data.read_row = measured
    signal.signal(signal.SIGALRM, late)
    room = int((status("VmSize") + 6000) * 1e6)  # what is not refused must not end the machine
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    cfg = SimpleNamespace(prompt_template="{question}", max_prompt_tokens=4096, min_pixels=64 * 64,
                          max_pixels=512 * 512, max_bad_rows=1.0)
    loaded = data.load(source, data.load_processor(model), cfg, ["X_RAY"])
    print(json.dumps({"bad": loaded.bad, "keep": loaded.keep, "megabytes": megabytes,
                      "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
