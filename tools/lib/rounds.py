"""The runner: rounds, ratios, tables.

Why: on a shared or virtual machine absolute numbers drift more than the programs differ. So all
contenders of a case run one after another within each round (A B C, B C A, C A B, ...), a ratio
is taken within a round only, and the median and the range over the rounds are what counts.
Never: hides a row. A contender that is not installed, fails, or beats us has its row.
Start at `Bench.compare`.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from lib import procs
from lib.corpus import GIB, KIB, MIB


@dataclasses.dataclass
class Sample:
    """One run of one contender."""

    value: float
    """In the unit of the case; more is better."""
    wall_s: float
    work: float
    """What the CPU time is divided by: requests or bytes, as the case says."""
    client_cpu_s: float
    server_cpu_s: float
    p99_us: float | None = None
    rss_bytes: int | None = None
    allocated_bytes: int | None = None
    written_bytes: int | None = None

    @property
    def cpu_per_work(self):
        return (self.client_cpu_s + self.server_cpu_s) / self.work


@dataclasses.dataclass
class Contender:
    """A program, or a way to use it, that does the work of a case."""

    name: str
    run: Callable[[], Sample] | None
    ours: bool = False
    absent: str = ""
    """Why there is nothing to run: `not installed`, or what went wrong."""
    floor: bool = False
    """No peer: it leaves work out, and shows what nobody can be faster than."""
    samples: list[Sample] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Case:
    """One workload, done by several contenders."""

    group: str
    workload: str
    size_bytes: int
    depth: str
    unit: str
    """`B/s`, `IOPS` or `opens/s`."""
    work_unit: str
    """`op` or `GiB`: what CPU time is given per."""
    reference: str
    contenders: list[Contender]

    def title(self):
        depth = f", depth {self.depth}" if self.depth else ""
        return f"{self.group}: {self.workload}, {size(self.size_bytes)}{depth}"


@dataclasses.dataclass
class Bench:
    """What every group of cases is given, and where it leaves its results."""

    scratch: procs.Scratch
    program: Path
    quick: bool
    rounds: int
    seconds: float
    prefix: tuple[str, ...]
    """Put before every client and server: `chrt -r 1`, `nice -n -20` or nothing."""
    cases: list[Case] = dataclasses.field(default_factory=list)
    notes: list[dict] = dataclasses.field(default_factory=list)
    """Results that are no comparison, and bounds, for `--json`."""
    failures: list[str] = dataclasses.field(default_factory=list)

    def fail(self, message):
        """Notes something that has to turn the exit status."""
        self.failures.append(message)
        say(f"  FAILED: {message}")

    def bound(self, where, what, ratio, most=None, least=None):
        """Prints a bound that the project has set itself, met or missed; a miss is no failure.

        `where` is the title of what was measured, for `--json`; `ratio` is (median, least,
        greatest), `None` if there was nothing to measure.
        """
        limit = f"at most {most:g}" if least is None else f"at least {least:g}"
        if ratio is None:
            verdict = "not measured"
        elif ratio[0] <= most if least is None else ratio[0] >= least:
            verdict = "met"
        else:
            verdict = "MISSED"
        say(f"  bound: {what}: {limit}: {ratio_text(ratio)}  {verdict}")
        self.notes.append({"case": where, "bound": what, "most": most, "least": least,
                           "measured": ratio, "verdict": verdict})

    def compare(self, cases, most_rounds=None):
        """Runs every contender of every case once per round, then prints a table per case."""
        count = min(self.rounds, most_rounds or self.rounds)
        for index in range(count):
            say(f"  round {index + 1} of {count}", transient=True)
            for case in cases:
                count = len(case.contenders)
                for turn in range(count):
                    self._run_once(case, case.contenders[(turn + index) % count])
        say("", transient=True)
        for case in cases:
            self.cases.append(case)
            print_table(case)

    def _run_once(self, case, contender):
        if contender.run is None:
            return
        say(f"  {case.workload}: {contender.name}", transient=True)
        try:
            contender.samples.append(contender.run())
        except (procs.Failure, OSError) as failure:
            contender.run = None
            contender.absent = "failed, see below"
            message = f"{case.title()}: {contender.name}: {failure}"
            if contender.ours:
                self.fail(message)
            else:
                say(f"  {message}")


# ---- ratios ----

def ratios(over, under, of):
    """`of(over) / of(under)` in each round in which both ran: (median, least, greatest)."""
    pairs = [of(top) / of(bottom) for top, bottom in zip(over.samples, under.samples)
             if of(bottom) > 0]
    if not pairs:
        return None
    return statistics.median(pairs), min(pairs), max(pairs)


def speed(sample):
    return sample.value


def wall(sample):
    return sample.wall_s


def cpu(sample):
    return sample.cpu_per_work


def client_cpu(sample):
    return sample.client_cpu_s


def spread(values):
    """(median, least, greatest) of some numbers; `None` of none."""
    values = [value for value in values if value is not None]
    return (statistics.median(values), min(values), max(values)) if values else None


def named(case, name):
    return next(contender for contender in case.contenders if contender.name == name)


def losses(case):
    """The peers that beat our first contender by the median: (peer, ratio ours / peer)."""
    ours = first_ours(case)
    found = []
    for peer in case.contenders:
        ratio = None if peer.ours or peer.floor else ratios(ours, peer, speed)
        if ratio is not None and ratio[0] < 1.0:
            found.append((peer, ratio))
    return found


def first_ours(case):
    return next(contender for contender in case.contenders if contender.ours)


def mark(ratio):
    """`LOST` if slower in every round, `lost?` if by the median only."""
    median, _, greatest = ratio
    if median >= 1.0:
        return ""
    return "LOST" if greatest < 1.0 else "lost?"


def comparisons(case):
    """How many peers our first contender met in this case."""
    return sum(1 for peer in case.contenders
               if not (peer.ours or peer.floor) and peer.samples)


# ---- printing ----

_COLUMNS = ("rate", "p99", "client CPU", "server CPU", "max RSS", "allocated", "written",
            "/ reference", "CPU / ref", "bedplate / this", "")


def print_table(case):
    """One row per contender; a peer that is faster than ours is marked."""
    say(f"\n{case.title()}\n  reference: {case.reference}")
    rows = [("", _COLUMNS)]
    rows += [(contender.name, _cells(case, contender) if contender.samples else None)
             for contender in case.contenders]
    filled = [cells for _, cells in rows[1:] if cells]
    used = [column for column in range(len(_COLUMNS))
            if any(cells[column] not in ("", "-") for cells in filled)]
    widths = {column: max(len(cells[column]) for cells in [_COLUMNS, *filled]) for column in used}
    name_width = max(len(name) for name, _ in rows)
    absent = {contender.name: contender.absent for contender in case.contenders}
    for name, cells in rows:
        texts = [cells[column].rjust(widths[column]) for column in used] if cells else [absent[name]]
        say("  " + "  ".join([name.ljust(name_width), *texts]).rstrip())


def _cells(case, contender):
    samples, reference = contender.samples, named(case, case.reference)

    def middle(of, show):
        values = [of(sample) for sample in samples if of(sample) is not None]
        return show(statistics.median(values)) if values else "-"

    def per_work(seconds):
        return cpu_text(case.work_unit, seconds)

    spent = ratios(contender, reference, cpu)
    against = None if contender.ours or contender.floor else ratios(first_ours(case), contender, speed)
    return (
        middle(speed, lambda value: rate(case.unit, value)),
        middle(lambda sample: sample.p99_us, micros),
        middle(lambda sample: sample.client_cpu_s / sample.work, per_work),
        # Without a server there is nothing to show.
        middle(lambda sample: sample.server_cpu_s / sample.work or None, per_work),
        middle(lambda sample: sample.rss_bytes, size),
        middle(lambda sample: sample.allocated_bytes, size),
        middle(lambda sample: sample.written_bytes, size),
        ratio_text(ratios(contender, reference, speed)),
        f"{spent[0]:.2f}" if spent else "-",
        ratio_text(against),
        mark(against) if against else "",
    )


def print_losses(cases):
    """What a reader looks for first, at the end: where we are slower."""
    met = sum(comparisons(case) for case in cases)
    found = [(case, peer, ratio) for case in cases for peer, ratio in losses(case)]
    if not met:
        return
    surely = sum(1 for _, _, ratio in found if mark(ratio) == "LOST")
    say(f"\nbedplate is slower by the median in {len(found)} of {met} comparisons, "
        f"in every round in {surely}:")
    for case, peer, ratio in found:
        say(f"  {mark(ratio):<5}  {case.title()}: {ratio_text(ratio)} of {peer.name}")


def ratio_text(ratio):
    return "-" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}..{ratio[2]:.2f}]"


def rate(unit, value):
    if unit == "IOPS":
        return f"{value / 1000:.1f}k IOPS"
    if unit == "opens/s":
        return f"{value:.0f} opens/s"
    return f"{value / GIB:.2f} GiB/s" if value >= GIB / 10 else f"{value / MIB:.1f} MiB/s"


def micros(value):
    return f"{value / 1000:.1f} ms" if value >= 10_000 else f"{value:.0f} us"


def cpu_text(work_unit, seconds):
    return f"{seconds * 1e6:.1f} us/op" if work_unit == "op" else f"{seconds * GIB:.2f} s/GiB"


def size(count):
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}".replace(".0 ", " ")
    return f"{count:.0f} B"


def say(text, transient=False):
    """Prints a line; a transient one is seen on a terminal only, and written over."""
    if sys.stdout.isatty():
        sys.stdout.write("\r\x1b[K")
    if transient:
        if sys.stdout.isatty():
            sys.stdout.write(text)
    else:
        sys.stdout.write(text + "\n")
    sys.stdout.flush()


def as_json(case):
    """A case with every sample, for a machine."""
    return {
        "group": case.group, "workload": case.workload, "size_bytes": case.size_bytes,
        "depth": case.depth, "unit": case.unit, "reference": case.reference,
        "contenders": [
            {"name": contender.name, "ours": contender.ours, "absent": contender.absent,
             "samples": [dataclasses.asdict(sample) for sample in contender.samples]}
            for contender in case.contenders],
    }
