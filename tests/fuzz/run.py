"""``make fuzz``: both targets for a bounded time, guided by coverage where atheris is installed, at random elsewhere.

    python tests/fuzz/run.py [--seconds 60] [--target binding|functions] [--random] [--junit-xml FILE]

A finding ends it with an exit code other than 0: an exception that a user should not see, or a crash, whose input
libFuzzer leaves as a file crash-* in build/fuzz/.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzz")]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=("binding", "functions"), help="default: both, one after the other")
    parser.add_argument("--random", action="store_true", help="without atheris")
    parser.add_argument("--junit-xml", type=Path, help="where both targets' outcome goes, in the form that pytest has")
    options = parser.parse_args()
    if options.target is None:
        common = [__file__, "--seconds", str(options.seconds), *(["--random"] if options.random else [])]
        began, names = time.monotonic(), ("binding", "functions")
        statuses = [subprocess.call([sys.executable, *common, "--target", name]) for name in names]
        if options.junit_xml:
            bad, seconds = sum(map(bool, statuses)), time.monotonic() - began
            options.junit_xml.parent.mkdir(parents=True, exist_ok=True)
            options.junit_xml.write_text(
                f'<testsuites><testsuite tests="{len(names)}" failures="{bad}" errors="0" skipped="0"'
                f' time="{seconds:.1f}"/></testsuites>\n'
            )
        return int(any(statuses))
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None or options.random:
        return at_random(options.target, options.seconds)
    guided(atheris, options.target, options.seconds)
    return 0


def at_random(name: str, seconds: int) -> int:
    import targets

    seed, end, done, through = secrets.randbelow(2**31), time.monotonic() + seconds, 0, 0
    print(f"{name}: from seed {seed}", flush=True)
    while time.monotonic() < end:
        through += targets.once(targets.TARGETS[name], targets.RandomPick(seed + done))
        done += 1
    print(f"{name}: {done} calls, {through} went through, the others were refused; no finding")
    return 0


def guided(atheris, name: str, seconds: int) -> None:
    folder = ROOT / "build" / "fuzz"
    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    with atheris.instrument_imports(
        include=["ffcl_fast.functional", "ffcl_fast.backends.cpu", "ffcl_fast.backends.panels"]
    ):
        import targets

    class Pick:
        def __init__(self, data: bytes) -> None:
            self.data = atheris.FuzzedDataProvider(data)

        def integer(self, low: int, high: int) -> int:
            return self.data.ConsumeIntInRange(low, high)

        def of(self, values):
            return values[self.data.ConsumeIntInRange(0, len(values) - 1)]

    target = targets.TARGETS[name]
    flags = [sys.argv[0], f"-max_total_time={seconds}", "-max_len=256", "-rss_limit_mb=8192", str(corpus)]
    atheris.Setup(flags, lambda data: targets.once(target, Pick(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
