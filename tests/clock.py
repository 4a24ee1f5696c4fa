"""A wall clock that jumps, for this process's children; see shift_clock.c."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def preload():
    """Build shift_clock.c and start this script anew with it, its clock not shifted yet. Without a
    compiler: nothing happens. To be called before the imports that take long."""
    if there() or "SHIFT_CLOCK_BUILT" in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="clock"), "shift_clock.so")
    source = Path(__file__).parent / "shift_clock.c"
    os.environ["SHIFT_CLOCK_BUILT"] = "tried"
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    except (OSError, subprocess.CalledProcessError):
        return
    os.environ["LD_PRELOAD"] = str(library)
    os.execv(sys.executable, [sys.executable, *sys.argv])


def there():
    return "shift_clock" in os.environ.get("LD_PRELOAD", "")
