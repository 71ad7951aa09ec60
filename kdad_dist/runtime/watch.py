"""Names the process that hangs when a launch stands still, whatever the processes wait in.

A collective says, at best, that it has waited too long; NCCL's ends its process without a word. So
each process tells the store of the launch, every few seconds and from a thread of its own, that it
lives, for how long it has not come any further, and where it is. Where nobody has come any further
for too long, those who still answer look who does not. No clock of one machine is compared with
that of another one, and none that can be set back is read.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kdad_dist.errors import PeerLost

log = logging.getLogger(__name__)
INTERVAL = 30.0
"""Seconds between two signs of life, at most."""
FIRST = 1.0
"""Seconds between them until all processes have been seen."""
ROUNDS = 4
"""Intervals without a sign of life after which a process counts as silent."""
NOTING = 10.0
"""Seconds for which a process that gives up waits for its note to be written."""
HOST = os.uname().nodename


class Sign(NamedTuple):
    """What a process says of itself."""

    beat: int
    """Grows with every sign."""
    idle: float
    """Seconds since it came further, by its own clock."""
    order: int
    """How far it is; the same work has the same number on all processes."""
    place: str
    pid: int
    host: str

    def named(self, rank: int, world: int) -> str:
        return f"process {rank} of {world} (pid {self.pid} on {self.host})"


class Watch:
    """Tells of this process, and looks at the others once it comes no further."""

    def __init__(
        self, rank: int, world: int, store: Store, seconds: float, stuck: Callable[[str], None]
    ) -> None:
        """Args:
        store: used by nothing else, since whoever waits for an answer holds it.
        seconds: for which nobody has come further when the launch is given up.
        stuck: notes the reason, called in one process before that ends.
        """
        self.rank, self.world, self.seconds, self._stuck = rank, world, seconds, stuck
        self.interval = min(INTERVAL, seconds / 10)
        self._store = store
        self._order, self._place, self._moved = 0, "its start", time.monotonic()
        self._told = self._moved
        self._beat = self._rounds = self._unheard = 0
        self._first: dict[int, Sign] = {}
        """What was seen of each process when somebody last came further."""
        self._over = Event()
        self._broken = False
        """Whether the one that kept the store has ended."""
        self.signs: dict[int, Sign] = {}
        """The last that was seen of each process."""
        self._threads = [
            Thread(target=work, name="kdad-watch", daemon=True)
            for work in (self._talk, self._mind_the_store)
        ]
        for thread in self._threads:
            thread.start()

    def at(self, order: int, place: str) -> None:
        """Notes that this process has come further; costs nothing."""
        self._order, self._place, self._moved = order, place, time.monotonic()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(1.0)

    def ended(self) -> list[str]:
        """Processes of this machine that are no more; others cannot be told from silent ones."""
        here = [s for s in self.signs.items() if s[1].host == HOST]
        return [sign.named(rank, self.world) for rank, sign in here if is_gone(sign.pid)]

    def _alone(self) -> bool:
        """Whether others have not been seen yet."""
        return len(self.signs) < self.world

    def _idle(self) -> float:
        return time.monotonic() - self._moved

    def _talk(self) -> None:
        while not self._over.wait(min(self.interval, FIRST if self._alone() else INTERVAL)):
            self.tell()
            if self._broken:
                return

    def tell(self) -> None:
        """A round of the talk: gives a sign of life, and looks at the others where it is due."""
        now = time.monotonic()
        silence, self._told = now - self._told, now
        if silence > ROUNDS * self.interval:  # it was paused, perhaps with all others
            self._moved = min(now, self._moved + silence)
        self._beat += 1
        sign = Sign(self._beat, self._idle(), self._order, self._place, os.getpid(), HOST)
        try:
            self._store.set(key(self.rank), json.dumps(sign))
            if self._alone() or self._idle() > self.seconds:
                self._look()
        except RuntimeError:
            self._broken = True
            return
        self._unheard = 0
        silent = {r for r in range(self.world) if self.signs.get(r) == self._first.get(r)}
        working = any(s.idle <= self.seconds for r, s in self.signs.items() if r not in silent)
        if self._idle() <= self.seconds or working:
            self._first, self._rounds = self.signs, 0
        else:
            self._rounds += 1
        if self._rounds > ROUNDS:
            self._give_up(silent - {self.rank})

    def _look(self) -> None:
        ranks, all_came = range(self.world), self._store.check([key(r) for r in range(self.world)])
        came = [rank for rank in ranks if all_came or self._store.check([key(rank)])]
        said = self._store.multi_get([key(rank) for rank in came])
        self.signs = {rank: Sign(*json.loads(s)) for rank, s in zip(came, said, strict=True)}

    def _mind_the_store(self) -> None:
        while not self._over.wait(self.interval):
            self.mind()

    def mind(self) -> None:
        """Ends this process where the one that keeps the store hangs, so that no answer comes, or
        has ended and left this one waiting.
        """
        self._unheard += 1  # rounds, not seconds: who was paused must not blame another for it
        if self._idle() > self.seconds and self._unheard > 2 * ROUNDS:
            name = self.signs[0].named(0, self.world) if 0 in self.signs else "process 0"
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                name = "the launcher of the first machine"
            self._end(f"{name} {'has ended' if self._broken else 'does not answer'}")

    def _give_up(self, silent: set[int]) -> None:
        answering = sorted(self.signs.keys() - silent)
        if self.rank != answering[0]:  # which speaks for all, and ends first
            time.sleep(ROUNDS * self.interval)
            os._exit(PeerLost.exit_code)
        self._end(verdict(self.signs, silent, self.world))

    def _end(self, what: str) -> None:
        problem = f"no process has come any further for {minutes(self.seconds)}: {what}"
        error = PeerLost(problem, REMEDY)
        log.error("kdad: %s", error)
        if not self._broken:  # or it may have noted more than is known here
            # It is perhaps the disk that nobody comes to an end with.
            noting = Thread(target=self._stuck, args=[f"PeerLost: {problem}"], daemon=True)
            noting.start()
            noting.join(NOTING)
        # The main thread waits in a collective, and hears of nothing else.
        os._exit(PeerLost.exit_code)


REMEDY = (
    "see what that process waits for (py-spy dump --pid PID), and whether its machine and its disk "
    "are well; if its work may take so long, raise train.timeout_minutes; then start the same "
    "command again"
)


def verdict(signs: dict[int, Sign], silent: set[int], world: int) -> str:
    """Who is to blame, as far as can be told."""
    if silent:
        names = [
            f"{signs[r].named(r, world)}, last seen at {signs[r].place},"
            if r in signs
            else f"process {r} of {world}"
            for r in sorted(silent)
        ]
        return f"{listed(names)} does not answer"
    last = min(sign.order for sign in signs.values())
    behind = {rank: sign for rank, sign in signs.items() if sign.order == last}
    if len(behind) < len(signs):
        ahead = next(sign for rank, sign in signs.items() if rank not in behind)
        names = [f"{sign.named(rank, world)}, at {sign.place}," for rank, sign in behind.items()]
        return f"{listed(names)} answers, but others are at {ahead.place} and wait"
    return f"all {world} processes answer, and are at {next(iter(signs.values())).place}"


def listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return " and ".join(names[:8]) + more


def key(rank: int) -> str:
    return f"kdad_dist/sign/{rank}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:g} min"


def is_gone(pid: int) -> bool:
    """Whether a process has ended, though its parent may not have noticed; False where the system
    does not tell.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self/stat").exists()
    return state in "ZX"


def open_store(timeout: timedelta) -> Store:
    """A connection of its own to the store through which the processes of the launch met."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
