"""Which job next, on which worker. Pure state: no Ray, no clock, no files.

Ready jobs wait in one heap per cell, cells in one heap per model; what becomes out of date in a model's heap is dropped
when it comes up. Handing out a job takes a logarithm of the number of jobs, and a step per cell that a worker holds.
Jobs that failed and are tried again stand apart, before all others.

Where workers share no directory, an artifact stays where it was made, its home, and only workers of that home take the
cell's evaluations: heaps of cells are kept by home, so that nobody looks through what is not theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from heapq import heappop, heappush

from orchestrator.plan import Job

# What starts first: what every comparison needs, then everything else.
_UNQUANTIZED, _OTHER = range(2)
# Of ready jobs the least is the best: class, the longest chain that hangs on it (negative), order, job id.
_Rank = tuple[int, float, int, str]

SHARED = ""
"""The home of artifacts that lie in the output directory, and of the workers that see it."""


class Schedule:
    """Jobs that are waiting, running, finished and failed."""

    def __init__(
        self, jobs: Iterable[Job], finished: Iterable[str] = (), seconds: Mapping[str, float] | None = None
    ) -> None:
        """Plan the jobs that are not finished yet.

        Args:
            jobs: in the order in which they should start, where `seconds` does not say otherwise.
            finished: ids of jobs whose rows are already in the store.
            seconds: job id -> estimated seconds; long jobs start first, with what needs them counted. None: all alike.
        """
        self.finished = set(finished)
        self.ended = list(self.finished)  # finished, failed and skipped, in the order in which they ended
        self.failed: set[str] = set()
        self.skipped: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.running: dict[str, Job] = {}
        self._waiting = {job.id: job for job in jobs if job.id not in self.finished}
        self._cell_of: dict[str, str] = {}  # worker -> key of the cell that it holds
        self._holders: dict[str, int] = {}  # key of a cell -> how many workers hold it
        self._model_of: dict[str, str] = {}  # worker -> the model that it holds
        self._dependents: dict[str, list[Job]] = {}
        for job in self._waiting.values():
            if job.needs is not None:
                self._dependents.setdefault(job.needs, []).append(job)
        self._ready: dict[str, list[_Rank]] = {}  # key of a cell -> heap
        # Home (None: what any worker may have) -> model -> heap of its cells' best
        self._cells: dict[str | None, dict[str, list[tuple[_Rank, str]]]] = {}
        self._workers_homes: dict[str, str] = {}  # worker -> its home, where that is not the shared one
        self._homes: dict[str, str] = {}  # key of a cell -> where its artifact lies; none before there is one
        self._used: set[str] = set()  # homes of artifacts
        self._models: dict[str, str] = {}  # key of a cell -> its model
        self._again: dict[str, frozenset[str]] = {}  # ready once more -> workers that should not have it
        chains = {} if seconds is None else self._chains(seconds)
        self._ranks: dict[str, _Rank] = {}
        for order, job in enumerate(self._waiting.values()):
            kind = _UNQUANTIZED if job.kind == "evaluate" and job.cell.scheme is None else _OTHER
            self._ranks[job.id] = (kind, -chains.get(job.id, 0.0), order, job.id)
            self._models[job.cell.key] = job.cell.model
            if job.needs in self.finished:
                self._homes[job.cell.key] = SHARED  # else it would not count as finished
                self._used.add(SHARED)
            if job.needs is None or job.needs in self.finished:
                self._add(job)

    def _chains(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Job id -> seconds of it and of the longest job that needs it."""
        return {
            name: seconds[name] + max((seconds[other.id] for other in self._dependents.get(name, ())), default=0.0)
            for name in self._waiting
        }

    @property
    def unfinished(self) -> int:
        """Jobs that are waiting or running."""
        return len(self._waiting) + len(self.running)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self.unfinished

    def next_for(self, worker: str, others: Collection[str] = ()) -> Job | None:
        """Start the best job for an idle worker; None if none is ready.

        In order of preference: a job that failed before; an evaluation of the cell whose weights the worker holds; a
        job of a cell that no other worker holds, of the worker's own model before another; any ready job. Evaluations
        whose artifact has another home than the worker are not among them.

        Args:
            worker: the idle one.
            others: workers that are alive, to whom a job is left that should not come back to this one.
        """
        name = self._once_more(worker, others)
        if name is not None:
            del self._again[name]
            job = self._waiting.pop(name)
        else:
            own = self._cell_of.get(worker)
            rank = self._own_evaluation(own, worker) or self._unheld(worker) or self._held(worker)
            if rank is None:
                return None
            job = self._waiting.pop(rank[3])
            self._take(job)
        self.running[worker] = job
        self.attempts[job.id] = self.attempts.get(job.id, 0) + 1
        self._hold(worker, job)
        return job

    def _once_more(self, worker: str, others: Collection[str]) -> str | None:
        """The first failed job that may come to this worker: not one that should avoid it while another could take
        it."""
        for name, avoid in self._again.items():
            cell = self._waiting[name].cell.key
            if self._may(worker, cell) and (
                worker not in avoid or avoid.issuperset(other for other in others if self._may(other, cell))
            ):
                return name
        return None

    def _home(self, worker: str) -> str:
        return self._workers_homes.get(worker, SHARED)

    def _may(self, worker: str, cell: str) -> bool:
        """Whether a worker can do what is to be done next with a cell."""
        home = self._homes.get(cell)
        return home is None or home == self._home(worker)

    def _own_evaluation(self, cell: str | None, worker: str) -> _Rank | None:
        best = self._best(cell) if cell is not None and self._may(worker, cell) else None
        return best if best is not None and self._waiting[best[3]].kind == "evaluate" else None

    def _unheld(self, worker: str) -> _Rank | None:
        """The best job of a cell that no other worker holds: of the worker's model, else of any."""
        own_model, homes = self._model_of.get(worker), (None, self._home(worker))
        if own_model is not None:
            own = (self._best_unheld(home, own_model, worker) for home in homes)
            best = min((rank for rank in own if rank is not None), default=None)
            if best is not None:
                return best
        models = ((home, model) for home in homes for model in self._cells.get(home, ()) if model != own_model)
        others = (self._best_unheld(home, model, worker) for home, model in models)
        return min((rank for rank in others if rank is not None), default=None)

    def _best_unheld(self, home: str | None, model: str, worker: str) -> _Rank | None:
        heap, aside, found = self._cells.get(home, {}).get(model, []), [], None
        while heap and found is None:
            rank, cell = heap[0]
            if rank != self._best(cell) or self._homes.get(cell) != home:
                heappop(heap)  # out of date: the cell's best of now has an entry of its own
            elif self._is_others(cell, worker):
                aside.append(heappop(heap))
            else:
                found = rank
        for entry in aside:
            heappush(heap, entry)
        return found

    def _held(self, worker: str) -> _Rank | None:
        mine = (None, self._home(worker))
        bests = (self._best(cell) for cell in self._holders if self._homes.get(cell) in mine)
        return min((rank for rank in bests if rank is not None), default=None)

    def _is_others(self, cell: str, worker: str) -> bool:
        return self._holders.get(cell, 0) > (self._cell_of.get(worker) == cell)

    def _best(self, cell: str) -> _Rank | None:
        heap = self._ready.get(cell)
        return heap[0] if heap else None

    def _add(self, job: Job) -> None:
        """A waiting job becomes ready."""
        heap = self._ready.setdefault(job.cell.key, [])
        heappush(heap, self._ranks[job.id])
        self._offer(job.cell.key)

    def _take(self, job: Job) -> None:
        """A ready job, the best of its cell, is ready no longer."""
        heappop(self._ready[job.cell.key])
        self._offer(job.cell.key)

    def _offer(self, cell: str) -> None:
        best = self._best(cell)
        if best is None:
            self._ready.pop(cell, None)
        else:
            of_home = self._cells.setdefault(self._homes.get(cell), {})
            heappush(of_home.setdefault(self._models[cell], []), (best, cell))

    def _hold(self, worker: str, job: Job) -> None:
        self.forget_worker(worker)
        self._cell_of[worker], self._model_of[worker] = job.cell.key, job.cell.model
        self._holders[job.cell.key] = self._holders.get(job.cell.key, 0) + 1

    def finish(self, worker: str) -> Job:
        """The worker's job is finished."""
        job = self.running.pop(worker)
        self.finished.add(job.id)
        self.ended.append(job.id)
        if job.kind == "quantize":
            self._homes[job.cell.key] = self._home(worker)
            self._used.add(self._home(worker))
        for dependent in self._waiting_dependents(job):
            self._add(dependent)
        return job

    def fail(self, worker: str, *, retry: bool, avoid: frozenset[str] = frozenset()) -> Job:
        """The worker's job failed; without `retry` it is given up, and so is what needs it.

        Args:
            worker: whose job.
            retry: whether to try it again.
            avoid: workers that should not have it then, if there are others.
        """
        job = self.running.pop(worker)
        if retry:
            self._waiting[job.id] = job
            if job.needs is None or job.needs in self.finished:
                self._again[job.id] = avoid
            return job
        self.failed.add(job.id)
        self.ended.append(job.id)
        for dependent in list(self._waiting_dependents(job)):
            self._again.pop(dependent.id, None)
            del self._waiting[dependent.id]
            self.skipped.add(dependent.id)
            self.ended.append(dependent.id)
        return job

    def redo(self, job: Job) -> bool:
        """What a finished job made is gone: it is to be done again before the rest of what needs it; False where it
        is waiting or running again already."""
        if job.id not in self.finished:
            return False
        self.finished.discard(job.id)
        self._homes.pop(job.cell.key, None)
        self._ready.pop(job.cell.key, None)  # only what needs it is left of its cell
        for dependent in self._waiting_dependents(job):
            self._again.pop(dependent.id, None)
        self._waiting[job.id] = job
        self._again[job.id] = frozenset()
        return True

    def _waiting_dependents(self, job: Job) -> Iterator[Job]:
        return (other for other in self._dependents.get(job.id, ()) if other.id in self._waiting)

    def settle(self, worker: str, home: str) -> None:
        """A worker is there, and says where its artifacts lie: `SHARED`, or a place that only workers of it see."""
        self._workers_homes.pop(worker, None)
        if home != SHARED:
            self._workers_homes[worker] = home

    def deserted(self, workers: Iterable[str]) -> set[str]:
        """Homes of artifacts of which none of these workers is, those from which none was taken back included."""
        if not self._workers_homes:
            return set()  # all share one, as they nearly always do
        return self._used - {self._home(worker) for worker in workers}

    def left_at(self, home: str) -> list[str]:
        """Finished jobs whose artifacts lie there and are waited for. They are to be done again: the home counts as
        used no longer. Looks at all that waits."""
        self._used.discard(home)
        waiting = (job for job in self._waiting.values() if job.needs in self.finished)
        return list(dict.fromkeys(str(job.needs) for job in waiting if self._homes.get(job.cell.key) == home))

    def forget_worker(self, worker: str) -> None:
        """The worker lost what it held in memory."""
        cell = self._cell_of.pop(worker, None)
        self._model_of.pop(worker, None)
        if cell is not None:
            self._holders[cell] -= 1
            if not self._holders[cell]:
                del self._holders[cell]
