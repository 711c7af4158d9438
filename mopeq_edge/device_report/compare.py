"""Two reports side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mopeq_edge.device_report.document import FAILED, PASSED, Report, TestResult

MISSING = "not run"
SAID = ("_text", "_tokens")
"""What the names of texts end in that the model said; the others are remarks."""

SECTIONS = ("device", "llama_cpp", "model", "options")


@dataclass(frozen=True)
class Value:
    """A value of a section in both reports."""

    section: str
    name: str
    first: Any
    second: Any

    @property
    def differs(self) -> bool:
        return bool(self.first != self.second)


@dataclass(frozen=True)
class Outcome:
    """A test whose outcome is not the same, with the reasons."""

    name: str
    first: str
    second: str
    first_reason: str | None
    second_reason: str | None

    @property
    def contradicts(self) -> bool:
        """Passed in one and failed in the other."""
        return {self.first, self.second} == {PASSED, FAILED}


@dataclass(frozen=True)
class Figure:
    """A number of a test in both reports; ``ratio`` is second to first, None where there is none."""

    test: str
    name: str
    first: float | None
    second: float | None

    @property
    def ratio(self) -> float | None:
        if self.first is None or self.second is None or self.first == 0:
            return None
        return self.second / self.first


@dataclass(frozen=True)
class Text:
    """What the model said to the same prompt, where it is not the same; ``same_words`` at the begin are."""

    test: str
    name: str
    first: str
    second: str

    @property
    def same_words(self) -> int:
        pairs = list(zip(self.first.split(), self.second.split(), strict=False))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    values: tuple[Value, ...]
    outcomes: tuple[Outcome, ...]
    figures: tuple[Figure, ...]
    texts: tuple[Text, ...]
    same_file: bool
    """Whether header and size of the tested files are the same."""

    @property
    def contradictions(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.contradicts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "same_file": self.same_file,
            "values": [{**asdict(value), "differs": value.differs} for value in self.values],
            "outcomes": [{**asdict(one), "contradicts": one.contradicts} for one in self.outcomes],
            "figures": [{**asdict(one), "ratio": one.ratio} for one in self.figures],
            "texts": [{**asdict(one), "same_words_count": one.same_words} for one in self.texts],
        }


def compare(first: Report, second: Report) -> Comparison:
    """Every value of both, and of the tests what is in both or differs."""
    a, b = ({test.name: test for test in report.tests} for report in (first, second))
    both = [(a[name], b[name]) for name in a if name in b]
    values = [
        value
        for section in SECTIONS
        for value in _values(section, _flat(getattr(first, section)), _flat(getattr(second, section)))
    ]
    values.insert(0, Value("mopeq_edge", "version", first.mopeq_edge_version, second.mopeq_edge_version))
    identity = ("header_sha256", "file_bytes")
    return Comparison(
        tuple(values),
        tuple(_outcomes(a, b)),
        tuple(
            Figure(x.name, name, x.figures[name], y.figures[name])
            for x, y in both
            for name in x.figures
            if name in y.figures and not (x.figures[name] is None and y.figures[name] is None)
        ),
        tuple(
            Text(x.name, name, x.texts[name], y.texts[name])
            for x, y in both
            for name in x.texts
            if name.endswith(SAID) and name in y.texts and x.texts[name] != y.texts[name]
        ),
        all(first.model.get(name) == second.model.get(name) for name in identity),
    )


def _values(section: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Value]:
    return [Value(section, name, a.get(name), b.get(name)) for name in dict.fromkeys((*a, *b))]


def _outcomes(a: Mapping[str, TestResult], b: Mapping[str, TestResult]) -> list[Outcome]:
    found = []
    for name in dict.fromkeys((*a, *b)):
        x, y = a.get(name), b.get(name)
        first, second = (MISSING if test is None else test.outcome for test in (x, y))
        if first != second:
            found.append(Outcome(name, first, second, x.reason if x else None, y.reason if y else None))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names; an item of a list by its number."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            found |= _flat({str(number): item for number, item in enumerate(value)}, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
