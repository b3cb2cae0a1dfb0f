"""What a run of `peers.py` has measured so far, and how far it is."""

import json
import pathlib
import time


class Record:
    """The figures so far, written to a file (if any) after each, and read from it at the start."""

    def __init__(self, path: str | None, settings: dict, about: dict, missing: dict):
        self._path = pathlib.Path(path) if path else None
        self.found = {
            "settings": settings, "machine": about, "missing": missing, "details": {}, "results": {}
        }  # fmt: skip
        if self._path and self._path.exists():
            old = json.loads(self._path.read_text(encoding="utf-8"))
            kept = old.get("settings", {})
            differing = [
                name for name in settings if kept.get(name) != settings[name]
                and (name in kept or not name.startswith("packages of "))  # A peer that is new.
            ]  # fmt: skip
            if differing:
                said = ", ".join(f"{x} {kept.get(x)} (now {settings[x]})" for x in differing)
                raise ValueError(f"--output {path} holds figures of other settings: {said}")
            self.found = {**old, "settings": {**kept, **settings}, "missing": missing}

    def rates(self, task: str, name: str) -> list[float]:
        return self.found["results"].get(task, {}).get(name, {"rates": []})["rates"]

    def write(self) -> None:
        if self._path:
            # Never half a file: an interruption leaves the one before.
            part = self._path.with_name(self._path.name + ".part")
            part.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
            part.replace(self._path)


class Progress:
    """Says a line for each measurement, with the time gone and an estimate of the time left.

    A measurement is `(kind, name, task)`; one not made yet is taken to last as long as those made
    that share most of this.
    """

    def __init__(self, plan: list[tuple[str, str, str]], say, clock=time.monotonic):
        self._left, self._say, self._clock = list(plan), say, clock
        self._began = self._last = clock()
        self._seconds: list[tuple[tuple[str, str, str], float]] = []
        say(f"{len(plan)} measurements to make")

    def _estimate(self, unit: tuple[str, str, str]) -> float:
        known = []
        for length in (3, 2, 1, 0):
            known = known or [s for made, s in self._seconds if made[:length] == unit[:length]]
        return sum(known) / len(known)

    def left(self) -> float:
        """Seconds that the measurements left will about take."""
        return sum(self._estimate(unit) for unit in self._left)

    def drop(self, side: str, line: str) -> None:
        """Takes what a side had left off the plan, and says why."""
        self._left = [unit for unit in self._left if unit[1].split()[0] != side]
        self._last = self._clock()
        self._say(line)

    def done(self, unit: tuple[str, str, str], line: str) -> None:
        now = self._clock()
        self._seconds.append((unit, now - self._last))
        self._left.remove(unit)
        self._last = now
        gone = (now - self._began) / 60
        self._say(f"[{gone:.1f} min, about {self.left() / 60:.1f} left] {line}")
