"""Attack success against utility of the outputs that were evaluated alike: an inline picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from safeshard.manifests.evaluation import percent
from safeshard.manifests.report.axes import LEFT, RIGHT, WIDTH, Axis, Mark, Picture
from safeshard.manifests.report.markup import table

HEIGHT, TOP, BOTTOM = 450, 40, 46
MAX_POINTS = 200
SHAPES = 8  # of marks: as many methods are told apart


@dataclass(frozen=True)
class Point:
    """What one model scores, each with its interval: (value, low, high), shares. `label` stands beside its mark."""

    label: str
    name: str
    method: str  # "" of a model that is no output
    utility: tuple[float, float, float]
    attack: tuple[float, float, float]


def tradeoff(points: Sequence[Point], title: str) -> Picture | None:
    """A mark a model with its intervals, and a line a method through its settings; None with fewer than two models."""
    if len(points) < 2:
        return None
    shown = points[:MAX_POINTS]
    x = Axis(0, 100, LEFT, WIDTH - RIGHT)
    y = Axis(0, 100, HEIGHT - BOTTOM, TOP)
    methods = list(dict.fromkeys(point.method for point in shown if point.method))
    marks = [*_ideal(x, y)]
    shapes = {method: number % SHAPES for number, method in enumerate(methods)}
    named = {method: next(point for point in shown if point.method == method) for method in methods}
    for method, shape in shapes.items():
        marks += _curve(x, y, [point for point in shown if point.method == method], shape)
    for point in shown:
        label = f"{point.label} {point.method}" if named.get(point.method) is point else point.label
        marks += _point(x, y, point, label, shapes.get(point.method))
    best = min(shown, key=lambda point: (point.attack[0], -point.utility[0]))
    return Picture(
        title,
        f"Lower is safer, further to the right keeps more of the task. Numbers are rows of the table above, lines join "
        f"settings of a method, thin bars are 95 % intervals. Least attack success: {best.name}, "
        f"{percent(best.attack[0])} % at {percent(best.utility[0])} % utility.",
        x, y, "utility (%)", "attack success (%)", HEIGHT, marks,
        table("utility and attack success", ["model", "method", "utility %", "95 % interval", "attack success %",
              "95 % interval of attack success"], points, _row, ["utility %", "attack success %"]),
    )  # fmt: skip


def _row(point: Point) -> list[str]:
    cells = [f"{point.label} {point.name}".strip(), point.method]
    for value, low, high in (point.utility, point.attack):
        cells += [percent(value), f"{percent(low)} to {percent(high)}"]
    return cells


def _ideal(x: Axis, y: Axis) -> Iterator[Mark]:
    place: dict[str, float | str] = {"x": x.end, "y": y.start + 40, "text-anchor": "end"}
    yield Mark("text", place, "ideal", text="safe and useful \N{NORTH EAST ARROW}")


def _curve(x: Axis, y: Axis, points: Sequence[Point], shape: int) -> Iterator[Mark]:
    ordered = sorted(points, key=lambda point: (point.utility[0], point.attack[0]))
    if len(ordered) > 1:
        places = " ".join(f"{x.at(100 * p.utility[0])},{y.at(100 * p.attack[0])}" for p in ordered)
        yield Mark("polyline", {"points": Markup(places)}, f"curve m{shape}")


def _point(x: Axis, y: Axis, point: Point, label: str, shape: int | None) -> Iterator[Mark]:
    (utility, left, right), (attack, low, high) = point.utility, point.attack
    at, up = x.at(100 * utility), y.at(100 * attack)
    yield Mark("line", {"x1": x.at(100 * left), "x2": x.at(100 * right), "y1": up, "y2": up}, "interval")
    yield Mark("line", {"x1": at, "x2": at, "y1": y.at(100 * low), "y2": y.at(100 * high)}, "interval")
    what = f"{point.name}: {percent(attack)} % attack success, {percent(utility)} % utility"
    yield Mark("path", {"d": Markup(_outline(at, up, shape))}, "end" if shape is None else f"mark m{shape}", what)
    side = -9 if point.utility[0] > 0.8 else 9  # a name stays inside of the frame
    place: dict[str, float | str] = {"x": at + side, "y": up + (18 if shape is None and attack > 0.05 else -7)}
    yield Mark("text", place | {"text-anchor": "end" if side < 0 else "start"}, "label", text=label)


def _outline(x: float, y: float, shape: int | None) -> str:
    """A closed path about a point: polygons of unlike corners, so that colour is not all that tells methods apart."""
    corners = {
        None: ((-6, -2), (-2, -2), (-2, -6), (2, -6), (2, -2), (6, -2), (6, 2), (2, 2), (2, 6), (-2, 6), (-2, 2),
               (-6, 2)),
        0: ((-5, -5), (5, -5), (5, 5), (-5, 5)),
        1: ((0, -7), (7, 0), (0, 7), (-7, 0)),
        2: ((0, -7), (7, 5), (-7, 5)),
        3: ((0, 7), (7, -5), (-7, -5)),
        4: ((-3, -6), (3, -6), (6, -3), (6, 3), (3, 6), (-3, 6), (-6, 3), (-6, -3)),
        5: ((-7, 0), (5, -7), (5, 7)),
        6: ((7, 0), (-5, -7), (-5, 7)),
        7: ((-6, -6), (0, -3), (6, -6), (3, 0), (6, 6), (0, 3), (-6, 6), (-3, 0)),
    }[shape]  # fmt: skip
    return "M" + " L".join(f"{round(x + dx, 1)},{round(y + dy, 1)}" for dx, dy in corners) + " Z"
