"""What a search found, in words and numbers, the same in every form of the report. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.atlas import labels
from orchestrator.atlas.search_grid import Grid, bits_squares, choice_name, compact, short_choice
from orchestrator.atlas.search_hurt import grid_of, heaviest, levels, worst
from orchestrator.atlas.search_rows import is_finite
from orchestrator.search.space import LEFT_ALONE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from orchestrator.atlas.search_hurt import Level
    from orchestrator.atlas.search_rows import Point, Search, Study
    from orchestrator.atlas.tables import ModelMap
    from orchestrator.search.space import Allocation, Group, Space

TITLE = "Search"
HURT_TITLE = "Which layers hurt"
HURT_HEADINGS = ("group", "choice", "loss", "share")
HURT_NOTE = (
    "Each choice of each group was measured alone. Share: of the summed losses of all groups at this choice; there is "
    "none where one of them is not finite, or holds the loss of the other groups too."
)
_OBJECTIVES = {
    "kl_divergence": ("KL divergence to the unquantized model", "nats"),
    "perplexity": ("perplexity", ""),
}
_NAMED = 3  # groups that a sentence names
_COMPACT_SHOWN = 3  # allocations of a front that are drawn as text


def objective(search: Search) -> str:
    """What is being lowered, with its unit."""
    name, unit = _objective(search)
    return f"{name}, {unit}" if unit else name


def axis_title(search: Search) -> str:
    """The same, short enough for the side of a figure."""
    return "KL to unquantized, nats" if search.objective == "kl_divergence" else objective(search)


def _objective(search: Search) -> tuple[str, str]:
    of_task = search.objective.removeprefix("task")
    if of_task != search.objective:
        return f"cross entropy among the choices of {labels.plain(of_task.strip()) or 'a task'}", "nats"
    return _OBJECTIVES.get(search.objective, (labels.plain(search.objective).replace("_", " ") or "loss", ""))


def title(search: Search) -> str:
    """ "Search: search-demo"."""
    return f"{TITLE}: {labels.plain(search.name)}" if search.name else TITLE


def _choices(groups: Sequence[Group]) -> str:
    choices = {(choice.weight_bits, choice.group_size) for group in groups for choice in group.choices}
    return ", ".join(short_choice(bits, size) for bits, size in sorted(choices))


def about(search: Search) -> str:
    """Of what it is, and what it may choose among."""
    parts = [f"Model {labels.plain(search.model)}"] if search.model else []
    if search.space is not None:
        linears = [group for group in search.space.groups if not group.role]
        count = labels.counted(len(linears), "group")
        weights = sum(group.num_weights for group in linears)
        parts.append(f"{count} of linears, {weights:,} weights, to choose among {_choices(linears)}")
        parts += [
            f"its {group.role}, {group.num_weights:,} weights, among {_choices([group])}"
            for group in search.space.groups
            if group.role
        ]
    if search.objective:
        parts.append(f"the objective is the {objective(search)}")
    if not parts:
        return "It has written nothing to show yet."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An allocation that is drawn."""

    name: str
    allocation: Allocation
    of_front: bool


def shown_allocations(search: Search) -> list[Shown]:
    """What each study chose, or has as its best so far; of a front what stands out, the smallest first."""
    found = []
    for study in search.studies:
        one = study.chosen or study.best
        for point in study.picked or ([one] if one is not None else []):
            if point.allocation is not None:
                bits = "" if point.bits_per_weight is None else f", {point.bits_per_weight:.3f} stored bits per weight"
                so_far = "" if study.ended else ", best so far"
                name = f"{labels.plain(study.name)}{so_far}{bits}"
                found.append(Shown(name=name, allocation=point.allocation, of_front=bool(study.front)))
    return found


def cell_labels_of(maps: Iterable[ModelMap]) -> dict[str, str]:
    """Cell id -> label, of all cells in the sweep."""
    return {cell.cell_id: model_map.cell_labels[cell.key] for model_map in maps for cell in model_map.cells}


def found_sentences(search: Search, study: Study, cell_labels: Mapping[str, str]) -> list[str]:
    """What a study found, beside its starts, what it cost, and why it stopped.

    Args:
        cell_labels: cell id -> label, of cells in the sweep.
    """
    if study.front and study.chosen is None:
        sentences = [_front_sentence(search, study)]
    else:
        sentences = _best_sentences(search, study)
    cell = study.chosen.cell if study.chosen else ""
    if cell:
        label = cell_labels.get(cell, labels.plain(cell))
        sentences.append(f"In the sweep it is the cell {label}.")
    return [*sentences, _cost_sentence(study)]


def _front_sentence(search: Search, study: Study) -> str:
    points = sorted(study.front, key=lambda point: point.bits_per_weight or 0.0)
    name, unit = _objective(search)
    ends = [f"{_bits(one)} stored bits per weight at {f'{_loss(one.loss)} {unit}'.strip()}" for one in points]
    span = ends[0] if len(points) == 1 else f"from {ends[0]} to {ends[-1]}"
    return (
        f"Of {study.tried:,} allocations tried, of any size, {len(points)} "
        f"{'is' if len(points) == 1 else 'are'} on the front, where no other is smaller and better: {span} "
        f"({name} on {_windows(search.num_windows, 'search window')})."
    )


def _best_sentences(search: Search, study: Study) -> list[str]:
    budget = "" if study.budget_bytes is None else f" within {labels.megabytes(study.budget_bytes)} MB"
    found = study.chosen or study.best
    tried = labels.counted(study.tried, "allocation")
    if found is None:
        return [f"No complete measurement yet of {tried} tried{budget}."]
    size = "" if found.stored_bytes is None else f" ({labels.megabytes(found.stored_bytes)} MB)"
    head = f"Of {study.tried:,} allocations tried{budget}, the chosen one"
    if study.chosen is None:
        state = "Nothing was chosen." if study.stopped else "Nothing is chosen yet: it runs or was interrupted."
        head = f"{state} Of {tried} tried{budget}, the best so far"
    sentences = [f"{head} stores {_bits(found)} bits per weight{size}."]
    name, unit = _objective(search)
    loss = f"{_loss(found.loss)} {unit}".strip()
    text = f"Its {name} is {loss} on {_windows(search.num_windows, 'search window')}"
    text += _beside(found.loss, [(start.name, start.loss) for start in study.starts])
    if found.guard_loss is not None:
        text += f"; on {_windows(search.guard_windows, 'held-out guard window')} it is {_loss(found.guard_loss)}"
        text += _beside(found.guard_loss, [(start.name, start.guard_loss) for start in study.starts])
    same = [start.name for start in study.starts if start.allocation and start.allocation == found.allocation]
    if same:
        sentences.append(f"It is the start {labels.plain(same[0])} itself.")
    return [*sentences, f"{text}."]


def _windows(number_of: int | None, noun: str) -> str:
    return f"the {noun}s" if number_of is None else f"the {labels.counted(number_of, noun)}"


def _beside(loss: float | None, starts: Iterable[tuple[str, float | None]]) -> str:
    """ ", 14% below knapsack fp (0.3600) and 40% below uniform 3-g64 (0.5200)"."""
    parts = []
    for name, other in starts:
        if is_finite(loss) and is_finite(other) and other > 0:
            parts.append(f"{_relation(loss / other)} {labels.plain(name) or 'a start'} ({_loss(other)})")
        elif other is not None:
            parts.append(f"beside {labels.plain(name) or 'a start'} ({_loss(other)})")
    if not parts:
        return ""
    return ", " + (parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}")


def _relation(ratio: float) -> str:
    percent = 100 * abs(ratio - 1)
    if percent < 0.05:
        return "equal to"
    if ratio >= 2:
        return f"{ratio:.1f} times"
    return f"{percent:.{0 if percent >= 10 else 1}f}% {'below' if ratio < 1 else 'above'}"


def _cost_sentence(study: Study) -> str:
    parts = []
    if study.window_forwards is not None:
        parts.append(f"{study.window_forwards:,} window forwards")
    if study.seconds is not None:
        parts.append(labels.duration(study.seconds))
    sampler = f" by {labels.plain(study.sampler)}" if study.sampler else ""
    cost = f"It cost {' and '.join(parts)}{sampler}" if parts else f"What it cost{sampler} is not known"
    states = {state: sum(trial.state == state for trial in study.trials) for state in ("complete", "pruned", "failed")}
    told = ", ".join(f"{count:,} {state}" for state, count in states.items() if count)
    cost += f" ({told})" if told else ""
    return f"{cost}; it stopped because {_reason(study.stopped)}." if study.stopped else f"{cost}."


def _reason(stopped: str) -> str:
    return labels.plain(stopped).rstrip(".")


def _bits(point: Point) -> str:
    return labels.UNKNOWN if point.bits_per_weight is None else f"{point.bits_per_weight:.3f}"


def _loss(loss: float | None) -> str:
    if loss is None:
        return labels.UNKNOWN
    return labels.number(loss) if is_finite(loss) else labels.NON_FINITE


@dataclass(frozen=True, kw_only=True)
class HurtTexts:
    """The sensitivities in words: a sentence, and the ten worst, each with a text per heading."""

    sentence: str
    rows: tuple[tuple[str, ...], ...]
    note: str


def hurt_texts(search: Search) -> HurtTexts | None:
    """Which layers hurt; None where nothing was measured."""
    found = levels(search)
    if not found:
        return None
    grid = grid_of(search)
    rows = tuple(
        (
            labels.plain(row.group),
            choice_name(row.level.weight_bits, row.level.group_size),
            _loss(row.loss),
            labels.UNKNOWN if row.share is None else f"{100 * row.share:.1f}%",
        )
        for row in worst(found)
    )
    return HurtTexts(
        sentence=" ".join([_hurt_sentence(search, grid, found[0]), *_missing(search, found)]),
        rows=rows,
        note=HURT_NOTE,
    )


def _hurt_sentence(search: Search, grid: Grid, level: Level) -> str:
    broken = [group for group, loss in level.losses.items() if not is_finite(loss)]
    if broken:
        verb = "gives" if len(broken) == 1 else "give"
        return f"At {level.name}, {_named(grid, broken)} {verb} no finite loss."
    heavy = heaviest(level)
    if not heavy:
        ranked = sorted(level.losses, key=lambda group: -level.losses[group])[:_NAMED]
        most = ", ".join(f"{grid.label(group)} ({_loss(level.losses[group])})" for group in ranked)
        return f"At {level.name}, the loss is highest with {most}."
    named = ", ".join(f"{grid.label(group)} ({100 * (level.share(group) or 0):.0f}%)" for group in heavy[:_NAMED])
    more = "" if len(heavy) <= _NAMED else f" and {labels.counted(len(heavy) - _NAMED, 'other')}"
    of_weights = _share_of_weights(search, level, heavy)
    weights = "" if of_weights is None else f" with {100 * of_weights:.0f}% of the weights"
    count = labels.counted(len(level.losses), "group")
    makes = "makes" if len(heavy) == 1 else "make"
    head = f"At {level.name}, {len(heavy)} of {count}{weights} {makes} half of the summed loss"
    return f"{head}: {named}{more}{_by_kind(grid, level)}."


def _named(grid: Grid, groups: Sequence[str]) -> str:
    text = ", ".join(grid.label(group) for group in groups[:_NAMED])
    return text if len(groups) <= _NAMED else f"{text} and {labels.counted(len(groups) - _NAMED, 'other')}"


def _share_of_weights(search: Search, level: Level, groups: Sequence[str]) -> float | None:
    if search.space is None:
        return None
    sizes = {group.name: group.num_weights for group in search.space.groups}
    if not all(name in sizes for name in level.losses):
        return None
    return sum(sizes[name] for name in groups) / sum(sizes[name] for name in level.losses)


def _by_kind(grid: Grid, level: Level) -> str:
    """ "; by kind, down makes most (54%)"."""
    sums: dict[str, float] = {}
    for (kind, _), names in grid.squares.items():
        sums[kind] = sums.get(kind, 0.0) + sum(level.share(name) or 0.0 for name in names if name in level.losses)
    if len(sums) < 2:
        return ""
    kind = max(sums, key=lambda one: sums[one])
    return f"; of all kinds {kind} makes most of it ({100 * sums[kind]:.0f}%)"


def _missing(search: Search, found: Sequence[Level]) -> list[str]:
    """While sensitivities are being measured, that not all are there."""
    if search.space is None:
        return []
    wanted = {
        (group.name, choice.weight_bits, choice.group_size)
        for group in search.space.groups
        if len(group.choices) > 1
        for choice in group.choices
        if choice.weight_bits != LEFT_ALONE  # of the float model nothing is measured
    }
    measured = {
        (name, level.weight_bits, level.group_size)
        for level in found
        if level.base == found[0].base
        for name in level.losses
    }
    missing = len(wanted - measured)
    return [f"{len(wanted) - missing:,} of {len(wanted):,} choices are measured so far."] if missing else []


@dataclass(frozen=True, kw_only=True)
class CompactMap:
    """An allocation as lines of text: (label, squares), a heading first; several pieces where narrow."""

    title: str
    pieces: list[list[tuple[str, str]]]
    outside: str


def compact_maps(search: Search, width: int | None = None) -> list[CompactMap]:
    """Allocations as text: bits of each block and kind; of a long front only its ends and its middle."""
    if search.space is None:
        return []
    space = search.space
    grid = Grid.of(space)
    shown = shown_allocations(search)
    fronts = [one for one in shown if one.of_front]
    kept = fronts if len(fronts) <= _COMPACT_SHOWN else [fronts[0], fronts[len(fronts) // 2], fronts[-1]]
    maps = []
    for one in shown:
        if one in kept or not one.of_front:
            texts = {place: square.text for place, square in bits_squares(space, grid, one.allocation).items()}
            outside = outside_text(space, one.allocation)
            maps.append(CompactMap(title=one.name, pieces=compact(grid, texts, width), outside=outside))
    return maps


def outside_text(space: Space, allocation: Allocation) -> str:
    """What groups get that lie in no block, and so on no map."""
    outside = Grid.of(space).outside
    parts = [
        f"{labels.plain(group.name)} {choice_name(choice.weight_bits, choice.group_size)}"
        for group, choice in zip(space.groups, space.choices(allocation), strict=True)
        if group.name in outside
    ]
    return f"Outside of blocks: {'; '.join(parts)}." if parts else ""
